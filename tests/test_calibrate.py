"""`calibrate` and `--calibration` as commands and in a TOML file, and what they refuse."""

import json
import shutil

import pytest
import torch
from adapters import WEIGHTS, edit_tensors
from click.testing import CliRunner
from evaluated import save_adapter
from safetensors.torch import load_file
from tiny import save_tiny_llama

from lora_squeeze import open_adapter
from lora_squeeze.cli import main
from lora_squeeze.errors import AdapterError
from lora_squeeze.moments import check_moments, read_moments


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    base = save_tiny_llama(folder / "base")
    return str(base), {"plain": str(save_adapter(base, folder / "plain"))}


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_calibrate_then_compress(language_model, tmp_path):
    base, adapters = language_model
    moments = tmp_path / "moments.safetensors"
    done = run("calibrate", adapters["plain"], "--base", base, "--data", "builtin:texts:9", "-o", moments)
    assert done.exit_code == 0, done.output
    assert "of 9 examples" in done.output
    for command in (
        ["analyze", adapters["plain"]],
        ["plan", adapters["plain"], "--policy", "params=0.5"],
        ["compare", adapters["plain"]],
        ["compress", adapters["plain"], tmp_path / "out", "--rank", "2"],
    ):
        plain, done = (
            run(*command),
            run(*command, "--calibration", moments, *(["--overwrite"] * ("compress" in command))),
        )
        assert done.exit_code == 0, done.output
        assert done.output != plain.output
    record = json.loads(
        run("compress", adapters["plain"], tmp_path / "again", "--rank", "2", "--calibration", moments, "--json").output
    )
    assert any(note.startswith("calibrated") and "builtin:texts:9" in note for note in record["notes"])
    verified = run("verify", tmp_path / "again", adapters["plain"])
    assert verified.exit_code == 0, verified.output


def test_a_toml_file_names_moments(language_model, tmp_path):
    base, adapters = language_model
    moments = tmp_path / "moments.safetensors"
    run("calibrate", adapters["plain"], "--base", base, "--data", "builtin:texts:9", "-o", moments, "--gradients")
    settings = {"adapter_path": adapters["plain"], "output_path": str(tmp_path / "out"), "calibration": str(moments)}
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    (tmp_path / "squeeze.toml").write_text(f"[squeeze]\n{lines}\ncompress_to = 2\n")
    assert str(moments) in run("run", tmp_path / "squeeze.toml", "--explain").output
    done = run("run", tmp_path / "squeeze.toml")
    assert done.exit_code == 0, done.output
    assert "weighted by the loss's gradients" in done.output
    run("compress", adapters["plain"], tmp_path / "direct", "--rank", "2", "--calibration", moments)
    one, other = (load_file(tmp_path / folder / WEIGHTS) for folder in ("out", "direct"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_shards_are_merged(language_model, tmp_path):
    base, adapters = language_model
    common = [adapters["plain"], "--base", base, "--data", "builtin:texts:9", "--batch-size", "1"]
    parts = []
    for part in (1, 2):
        parts.append(tmp_path / f"{part}.safetensors")
        done = run("calibrate", *common, "--shard", f"{part}/2", "-o", parts[-1])
        assert done.exit_code == 0, done.output
    assert run("calibrate", "--merge", *parts, "-o", tmp_path / "all.safetensors").exit_code == 0
    assert run("calibrate", *common, "-o", tmp_path / "whole.safetensors").exit_code == 0
    merged, whole = (read_moments(tmp_path / f"{name}.safetensors") for name in ("all", "whole"))
    assert merged.tokens == whole.tokens
    for name, layer in whole.layers.items():
        assert torch.allclose(merged.layers[name].down, layer.down, rtol=1e-12)
    twice = run("calibrate", "--merge", parts[0], parts[0], "-o", tmp_path / "twice.safetensors")
    assert "would count twice" in twice.output


def test_a_changed_adapter_is_refused(language_model, tmp_path):
    base, adapters = language_model
    changed = tmp_path / "changed"
    shutil.copytree(adapters["plain"], changed)
    moments = tmp_path / "moments.safetensors"
    run("calibrate", changed, "--base", base, "--data", "builtin:texts:3", "-o", moments)
    edit_tensors(changed, lambda tensors: next(iter(tensors.values())).mul_(2))
    done = run("compress", changed, tmp_path / "out", "--rank", "2", "--calibration", moments)
    assert done.exit_code == 1
    assert "of another adapter" in done.output
    with pytest.raises(AdapterError):
        check_moments(read_moments(moments), open_adapter(changed))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "b", "-o", "m.safetensors", "--data", "x"], "one adapter"),
        (["a", "-o", "m.safetensors"], "--data is missing"),
        (["a", "-o", "m.json", "--data", "x"], "must end in .safetensors"),
        (["a", "-o", "m.safetensors", "--merge", "--data", "x"], "no model and no data"),
        (["a", "-o", "m.safetensors", "--data", "x", "--shard", "3/2"], "is not K/N"),
        (["a", "-o", "m.safetensors", "--data", "x", "--columns", "text"], "OURS=THEIRS"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    done = run("calibrate", *arguments)
    assert done.exit_code != 0
    assert said in done.output
    assert not list(tmp_path.iterdir())
