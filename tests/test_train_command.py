"""`train` and `continue` at the command line."""

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from quick_runs import models, quick, weights  # noqa: F401
from safetensors.torch import save_file
from test_hub import server  # noqa: F401

from lora_squeeze import open_adapter
from lora_squeeze.cli import main
from lora_squeeze.errors import SettingsError, TrainingError
from lora_squeeze.provenance import provenance_of
from lora_squeeze.sections import document_of, to_toml
from lora_squeeze.training.folder import RunFolder
from lora_squeeze.training.run import train
from lora_squeeze.training.settings import RunSettings


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def write_config(settings: RunSettings, path: Path, more: str = "") -> Path:
    path.write_text(to_toml(document_of(settings)) + more, encoding="utf-8")
    return path


def test_train_trains_and_squeezes(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(quick(), tmp_path / "mine.toml", '\n[squeeze]\noutput_path = "small"\ncompress_to = 2\n')
    result = invoke("train", config)
    assert result.exit_code == 0
    assert re.search(r"Method +sft, rank 4, [\d,]+ parameters", result.stdout)
    assert "Recommended rank:" in result.stdout
    assert "step 6/6  loss" in result.stderr
    assert open_adapter("small").rank == 2
    assert (tmp_path / "logs" / "mine" / "run.json").exists()
    again = invoke("train", config, "--json")
    assert "has finished already" in again.stderr
    assert again.exit_code == 0
    assert "small: has been made of this adapter by these settings already" in again.stderr


CHANGES = {
    "policy": "compress_to = 3",
    "limits": "compress_to = 2\nrank_for = { q_proj = 1 }",
    "dtype": 'compress_to = 2\ndtype = "bf16"',
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_squeeze_of_the_same_run_is_refused_until_its_file_allows_it(quick, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    squeeze = '\n[squeeze]\noutput_path = "small"\n'
    assert invoke("train", write_config(quick(), tmp_path / "a.toml", squeeze + "compress_to = 2\n")).exit_code == 0
    before = (tmp_path / "small" / "adapter_model.safetensors").read_bytes()
    config = write_config(quick(), tmp_path / "a.toml", f"{squeeze}{CHANGES[change]}\n")
    refused = invoke("train", config)
    assert (refused.exit_code, "small: already exists; set overwrite = true in [squeeze]" in refused.output) == (
        1,
        True,
    )
    assert (tmp_path / "small" / "adapter_model.safetensors").read_bytes() == before
    write_config(quick(), config, f"{squeeze}overwrite = true\n{CHANGES[change]}\n")
    assert invoke("train", config).exit_code == 0
    assert (tmp_path / "small" / "adapter_model.safetensors").read_bytes() != before


def test_training_anew_is_refused_before_it_where_the_squeezed_adapter_is_there(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(quick(), tmp_path / "a.toml", '\n[squeeze]\noutput_path = "small"\n')
    assert invoke("train", config).exit_code == 0
    before = (tmp_path / "logs" / "a" / "run.json").read_bytes()
    for option in ("--overwrite", "--explain"):
        refused = invoke("train", config, "--overwrite", option)
        assert (refused.exit_code, "set overwrite = true in [squeeze]" in refused.output) == (1, True), option
    assert (tmp_path / "logs" / "a" / "run.json").read_bytes() == before
    assert invoke("train", config, "--explain").exit_code == 0


@pytest.mark.parametrize("options", [[], ["--explain"]], ids=str)
@pytest.mark.parametrize(
    ("squeeze", "said"),
    [
        ('policy = "paramz=0.3"', "a.toml: [squeeze] unknown policy 'paramz'"),
        ('policy = "energy=95"', "[squeeze] energy=95 is not possible: it is a fraction above 0 and up to 1"),
        ('policy = "params=0"', "[squeeze] params=0 is not possible: it is above 0"),
        ("min_variance_retention = 95", "[squeeze] min_variance_retention = 95 is not possible: it is a fraction"),
        ("min_rank = 8\nmax_rank = 4", "[squeeze] min_rank 8 is above max_rank 4"),
        ("target_ranks = [0]", "[squeeze] candidate rank 0 is not possible"),
        ("compress_to = -1", "[squeeze] compress_to must be at least 0, not -1"),
        ('equal = ["("]', "[squeeze] equal '(' is not a regular expression"),
        ('runtime = "comfyui"\nbase_path = "none"', "[squeeze] base_path: none: no such file or folder"),
        ('output_path = "mine"', "mine: is no adapter's folder"),
        ('output_path = "logs/a/final"', "output and source are the same folder"),
    ],
)
def test_what_a_squeeze_cannot_be_told_is_said_before_training(quick, tmp_path, monkeypatch, squeeze, said, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    text = squeeze if "output_path" in squeeze else f'output_path = "out"\n{squeeze}'
    refused = invoke("train", write_config(quick(), tmp_path / "a.toml", f"\n[squeeze]\n{text}\n"), *options)
    assert refused.exit_code == 1
    assert said in " ".join(refused.output.split())
    assert not (tmp_path / "logs" / "a" / "settings.toml").exists()


def test_explain_says_what_would_be_done_and_does_nothing(quick, tmp_path):
    settings = quick(
        "builtin:arithmetic",
        training={"method": "grpo", "max_steps": 70, "warmup_steps": 3},
        model={"lora_rank": 16},
        in_squeeze={"schedule": "equal", "target_rank": 8},
    )
    result = invoke("train", write_config(settings, tmp_path / "run.toml"), "--explain", "--out", tmp_path / "out")
    assert result.exit_code == 0
    told = dict(re.split(r"  +", line, maxsplit=1) for line in result.output.splitlines())
    assert told["mode"] == "training"
    assert told["method"] == "grpo"
    assert told["in_squeeze"] == "16 for 35 steps, 8 for 35 steps"
    assert told["batch_size"] == "4 prompts × 4 completions"
    assert told["lr"] == "0.005, constant after 3 steps"
    assert (told["reward"], told["advantage_mode"]) == ("exact", "grpo")
    assert not (tmp_path / "out").exists()


def test_epochs_alone_decide_and_are_explained(quick, tmp_path):
    settings = quick("builtin:sums:16", in_squeeze={"schedule": "equal", "target_rank": 1})
    document = document_of(settings)
    del document["training"]["max_steps"]
    document["training"] |= {"epochs": 2.0}
    (tmp_path / "run.toml").write_text(to_toml(document))
    result = invoke("train", tmp_path / "run.toml", "--explain")
    told = dict(re.split(r"  +", line, maxsplit=1) for line in result.output.splitlines())
    assert (told["steps"], told["in_squeeze"]) == ("2 epochs", "equal")
    result = invoke("train", tmp_path / "run.toml", "--out", tmp_path / "run", "--json")
    assert json.loads(result.stdout)["steps"] == 8


def test_continue_is_cont_squeeze(quick, models, tmp_path):
    first = train(quick(), tmp_path / "first")
    command = ["continue", first.adapter, "--data", "builtin:sums:20", "--out", tmp_path / "second", "--rank", 2]
    command += ["--steps", 4, "--warmup", 1, "--lr", "1e-3", "--batch-size", 4, "--device", "cpu", "--json"]
    result = invoke(*command)
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert (record["model"], record["steps"], record["rank"]) == (str(models / "llama"), 4, 2)
    assert re.fullmatch(
        r"the adapter was squeezed to rank 2 first: \d\d\.\d\d% of the variance was retained", *record["notes"]
    )
    assert open_adapter(tmp_path / "second" / "final").rank == 2
    assert invoke(*command[:-1]).exit_code == 0


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--rank", 8], 1, "has rank 4, and a squeeze lowers the rank: 8 is not possible"),
        (["--steps", 5, "--warmup", 5], 2, "--warmup 5 leaves no step at the learning rate: --steps is 5"),
    ],
)
def test_what_continue_cannot_do(quick, tmp_path, options, code, said):
    first = train(quick(training={"max_steps": 1}), tmp_path / "first")
    result = invoke("continue", first.adapter, "--data", "builtin:sums:20", "--out", tmp_path / "second", *options)
    assert (result.exit_code, said in result.output.replace("\n", " ")) == (code, True)


def test_the_warmup_leaves_at_least_half_of_a_short_run(quick, tmp_path):
    first = train(quick(training={"max_steps": 1}), tmp_path / "first")
    result = invoke("continue", first.adapter, "--data", "builtin:sums:20", "--out", tmp_path / "x", "--steps", 6)
    assert result.exit_code == 0
    rates = [entry["learning_rate"] for entry in RunFolder(tmp_path / "x").read_metrics() if "learning_rate" in entry]
    assert rates[3:] == [2e-4] * 3
    assert rates[2] < 2e-4


@pytest.mark.parametrize("rank", [[], ["--rank", 2]])
def test_continue_from_the_hub(quick, models, tmp_path, server, rank):
    first = Path(train(quick(), tmp_path / "first").adapter)
    server.add("user/repo", {file.name: file.read_bytes() for file in first.iterdir()})
    command = ["continue", "hf://user/repo", "--data", "builtin:sums:20", "--out", tmp_path / "second", *rank]
    result = invoke(*command, "--steps", 2, "--warmup", 1, "--batch-size", 4, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["model"], record["rank"]) == (str(models / "llama"), 2 if rank else 4)
    assert record["settings"]["model"]["adapter"] == "hf://user/repo"
    if rank:
        made = provenance_of(open_adapter(tmp_path / "second" / "squeezed"))
        assert made is not None
        assert made.source.startswith("hf://user/repo@")


def test_a_kohya_file_cannot_be_trained_on(tmp_path):
    name = "lora_unet_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "style.safetensors")
    result = invoke("continue", tmp_path / "style.safetensors", "--data", "builtin:sums:20", "--out", tmp_path / "x")
    assert (result.exit_code, "only PEFT adapters can be loaded onto a model" in result.output) == (1, True)


def test_mistakes_are_errors_without_a_traceback(quick, tmp_path):
    config = write_config(quick(), tmp_path / "run.toml")
    config.write_text(config.read_text().replace("max_steps", "max_stepz"))
    result = invoke("train", config)
    assert (result.exit_code, "did you mean 'max_steps'" in result.output) == (1, True)
    result = invoke("train", write_config(quick("nowhere.jsonl"), tmp_path / "no.toml"), "--out", tmp_path / "no")
    assert (result.exit_code, "nowhere.jsonl: no such file" in result.output) == (1, True)
    result = invoke("continue", tmp_path / "none", "--data", "builtin:sums", "--out", tmp_path / "x")
    assert (result.exit_code, f"{tmp_path / 'none'}: no such file or folder" in result.output) == (1, True)
    assert not (tmp_path / "x").exists()


def test_several_processes_are_refused_before_anything_is_made(quick, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke("train", write_config(quick(), tmp_path / "run.toml"), "--out", tmp_path / "out")
    assert (result.exit_code, "WORLD_SIZE = 2: train is one process" in result.output) == (1, True)
    assert not (tmp_path / "out").exists()


def test_a_damaged_record_or_settings_file_is_named(quick, tmp_path):
    train(quick(training={"max_steps": 1}), tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"run\.json: cannot be read"):
        train(quick(training={"max_steps": 1}), tmp_path)
    (tmp_path / "settings.toml").write_text("[")
    with pytest.raises((TrainingError, SettingsError), match=r"settings\.toml"):
        train(quick(training={"max_steps": 1}), tmp_path)
