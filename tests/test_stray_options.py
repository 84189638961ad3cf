"""Options and addresses that would mean nothing: they are refused instead of doing nothing."""

from pathlib import Path

import pytest
from adapters import make_adapter
from click.testing import CliRunner, Result

from lora_squeeze import compress, decompose, fixed, open_adapter, squeeze
from lora_squeeze.cli import main
from lora_squeeze.errors import SettingsError


@pytest.fixture
def adapter(tmp_path) -> Path:
    return make_adapter(tmp_path / "adapter")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", 4, "--metric", "accuracy"], "--metric belongs to --keep"),
        (["--rank", 4, "--metric", "loss"], "--metric belongs to --keep"),
        (["--rank", 4, "--labels", "a,b", "--model-device", "cpu"], "--labels and --model-device belong to --keep"),
        (["--rank", 4, "--data", "x.jsonl", "--limit", 0], "belong to --keep"),
        (["--rank", 4, "--by", "worst"], "--by worst is for --policy variance"),
        (["--policy", "energy=0.9", "--by", "worst"], "--by worst is for --policy variance"),
        (["--ranks", "plan.json", "--by", "worst"], "--by worst is for --policy variance"),
    ],
)
def test_options_of_something_else_are_refused(adapter, tmp_path, options, message):
    result = invoke("compress", adapter, tmp_path / "out", *options)
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not (tmp_path / "out").exists()


def test_by_is_for_variance_and_the_default(adapter, tmp_path):
    assert invoke("plan", adapter, "--policy", "energy=0.9", "--by", "worst").exit_code == 2
    for number, options in enumerate(([], ["--retain", 0.9], ["--policy", "energy=0.9", "--policy", "variance=0.9"])):
        result = invoke("compress", adapter, tmp_path / str(number), "--by", "worst", *options)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate A --task piqa --metric loss", "--metric belongs to --data: a --task brings its own"),
        (
            "evaluate A --task piqa --columns text=x --labels a,b --prompt x --max-length 1024",
            "--columns and --labels and --prompt and --max-length belong to --data",
        ),
        ("evaluate A --task piqa --ablate-images", "--ablate-images belongs to --data"),
        ("evaluate A --data x.jsonl --include tasks", "--include belongs to --task"),
        ("evaluate A --data x.jsonl --few-shot 0", "--few-shot belongs to --task"),
        ("calibrate --merge m -o out.safetensors --limit 0", "--limit belongs to measuring: --merge adds up"),
        ("calibrate --merge m -o out.safetensors --labels a --device cpu", "--labels and --device belong to measuring"),
        ("calibrate --merge m -o out.safetensors --gradients --shard 1/2", "--gradients and --shard belong to"),
        ("calibrate --merge m -o out.safetensors --data x", "--data belongs to measuring"),
        ("compress A out --keep 0.1 --data x.jsonl --by worst", "--by worst is for --policy variance"),
        ("report analysis.json --method qr --for vllm", "--for and --method belong to a report of an adapter"),
        ("report analysis.json --calibration m --dtype f16", "--dtype and --calibration belong to a report of"),
        ("compare campaign campaign --method qr", "--method belongs to comparing adapters"),
        ("batch A --out out --workers 2", "--workers belongs to --executor processes or ray"),
        ("verify A --layers", "--layers belongs to a check against SOURCE"),
    ],
)
def test_what_would_do_nothing_is_refused(adapter, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "analysis.json").write_text("{}")
    (tmp_path / "campaign").mkdir()
    (tmp_path / "campaign" / "manifest.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    result = invoke(*(adapter if one == "A" else one for one in arguments.split()))
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("what", [{"method": "qr"}, {"device": "meta"}], ids=str)
def test_a_decomposition_is_used_as_it_was_made_or_not_at_all(adapter, tmp_path, what):
    source = open_adapter(adapter)
    plan = fixed(source.layers.values(), 2)
    made = decompose(source)
    (key,) = what
    with pytest.raises(
        SettingsError, match=f"{key} '{what[key]}' cannot be heeded: .* with {key} '{getattr(made, key)}'"
    ):
        compress(made, plan, **what)
    with pytest.raises(SettingsError, match="cannot be heeded"):
        squeeze(made, plan, tmp_path / "out", **what)
    assert not (tmp_path / "out").exists()
    other = decompose(source, method="dense")
    squeeze(other, plan, tmp_path / "same", method="dense", device="cpu")
    squeeze(other, plan, tmp_path / "default")
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("same", "default"))
    assert one == two


def test_an_address_of_elsewhere_is_named_as_it_was_given():
    result = invoke("show", "https://example.com/a/b")
    assert (result.exit_code, "https://example.com/a/b: no adapters are fetched from there" in result.output) == (
        1,
        True,
    )
