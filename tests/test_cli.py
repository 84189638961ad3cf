"""The command line: what it prints, what it writes, and how it says no."""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from adapters import (
    CONFIG,
    LLAMA,
    PREFIX,
    WEIGHTS,
    edit_tensors,
    effect,
    make_adapter,
    read_config,
    relative,
    snapshot,
)
from commands import prints, refuses
from safetensors.torch import load_file

from lora_squeeze import Analysis, __version__, analyze_adapter, open_adapter
from lora_squeeze.cli import main


@pytest.fixture
def adapter(tmp_path) -> Path:
    return make_adapter(tmp_path / "adapter")


def rows(table: str) -> list[list[str]]:
    """The rows of numbers in a printed table."""
    return [line.split() for line in table.splitlines() if re.match(r"\s*\d+\s", line)]


def test_tables_in_a_pipe_have_no_spaces_at_the_ends_of_lines(adapter):
    lines = prints("analyze", adapter, "--layers").splitlines()
    assert len(lines) > 10
    assert [line for line in lines if line != line.rstrip()] == []


def test_a_plan_does_not_call_its_policy_repeatable():
    def said_of_policies(command: str) -> str:
        text = " ".join(prints(command, "--help").split())
        return text[text.index("How to choose ranks") : text.index("--by")]

    assert "Repeatable" in said_of_policies("compress")
    assert "Repeatable" not in said_of_policies("plan")


# --- analyze ----------------------------------------------------------------------------------------------------


def test_analyze_prints_the_table_with_the_recommended_row_marked(adapter):
    analysis = analyze_adapter(adapter, min_variance_retention=0.8)

    text = prints("analyze", adapter, "--retain", 0.8)

    assert [row[0] for row in rows(text)] == ["1", "2", "4", "8"]
    for row in rows(text):
        rank = int(row[0])
        curves = (analysis.mean_variance, analysis.min_variance, analysis.max_variance, analysis.energy_variance)
        assert row[1:5] == [f"{curve[rank]:.2%}" for curve in curves]
        assert row[5:] == (["<--"] if rank == analysis.recommended_rank else [])
    assert f"Adapter: {adapter}" in text
    assert "Source rank: 8" in text
    assert f"Layers analyzed: {len(analysis.layers)}" in text
    assert f"Recommended rank: {analysis.recommended_rank} (>= 80% variance retained)" in text


@pytest.mark.parametrize(("retain", "shown"), [("0.95", "95%"), ("0.999", "99.9%"), ("0.985", "98.5%")])
def test_the_threshold_is_printed_as_it_was_given(adapter, retain, shown):
    assert f"(>= {shown} variance retained)" in prints("analyze", adapter, "--retain", retain)


def test_analyze_by_worst_says_so(adapter):
    text = prints("analyze", adapter, "--by", "worst")
    assert "in every layer" in text
    expected = analyze_adapter(adapter, by="worst").recommended_rank
    assert f"Recommended rank: {expected} " in text


def test_analyze_looks_at_given_ranks(adapter):
    assert [row[0] for row in rows(prints("analyze", adapter, "--ranks", "5,3,3,100"))] == ["3", "5", "8"]


def test_analyze_prints_a_record_that_can_be_read_back(adapter):
    analysis = Analysis.from_json(prints("analyze", adapter, "--json"))
    assert analysis == analyze_adapter(adapter)


@pytest.mark.parametrize("method", ["gram", "qr", "randomized", "dense"])
def test_every_method_prints_the_same_table(adapter, method):
    assert prints("analyze", adapter, "--method", method) == prints("analyze", adapter)


def test_analyze_shows_every_layer(adapter):
    edit_tensors(adapter, lambda ts: ts[f"{PREFIX}model.layers.0.self_attn.v_proj.lora_B.weight"].zero_())
    text = prints("analyze", adapter, "--layers")
    for layer in analyze_adapter(adapter).layers:
        (line,) = [line for line in text.splitlines() if line.startswith(layer.name)]
        zero = "0.self_attn.v_proj" in layer.name
        assert line.split()[3:] == ["zero" if zero else f"{share:.2%}" for share in layer.variance_at_rank.values()]
    assert "Recommended rank" in text


def test_notes_are_printed(adapter):
    edit_tensors(adapter, lambda tensors: [tensor.zero_() for key, tensor in tensors.items() if "v_proj" in key])
    assert "Note: 2 of 6 layers are exactly zero" in prints("analyze", adapter)


def test_names_with_brackets_are_printed_as_they_are(tmp_path):
    folder = make_adapter(tmp_path / "[bold]adapter[/bold]")
    assert f"Adapter: {folder}" in prints("analyze", folder)
    assert str(tmp_path / "[red]out") in prints("compress", folder, tmp_path / "[red]out", "--rank", 2)


# --- compress ---------------------------------------------------------------------------------------------------


def test_compress_writes_the_rank_that_was_asked_for(tmp_path, adapter):
    text = prints("compress", adapter, tmp_path / "out", "--rank", 3)
    assert read_config(tmp_path / "out")["r"] == 3
    assert relative(effect(LLAMA, tmp_path / "out"), effect(LLAMA, adapter, truncated_to=3)) <= 1e-5
    assert str(tmp_path / "out") in text
    assert "fixed=3" in text
    assert "37.5%" in text  # of the parameters


@pytest.mark.parametrize(("options", "retain"), [(["--retain", "0.8"], 0.8), ([], 0.95)])
def test_compress_chooses_the_recommended_rank(tmp_path, adapter, options, retain):
    prints("compress", adapter, tmp_path / "out", *options)
    expected = analyze_adapter(adapter, min_variance_retention=retain).recommended_rank
    assert open_adapter(tmp_path / "out").rank == expected


def test_compress_by_worst(tmp_path, adapter):
    prints("compress", adapter, tmp_path / "out", "--retain", 0.7, "--by", "worst")
    expected = analyze_adapter(adapter, min_variance_retention=0.7, by="worst").recommended_rank
    assert open_adapter(tmp_path / "out").rank == expected


def test_compress_prints_a_record(tmp_path, adapter):
    record = json.loads(prints("compress", adapter, tmp_path / "out", "--rank", 3, "--json"))
    assert record["record"] == "Compression"
    assert record["policy"] == "fixed=3"
    assert record["bytes_after"] == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert 0 < record["relative_error"] < 1
    assert [layer["rank"] for layer in record["layers"]] == [3] * 6


def test_compress_shows_every_layer(tmp_path, adapter):
    text = prints("compress", adapter, tmp_path / "out", "--rank", 3, "--layers")
    for name in open_adapter(adapter).layers:
        assert any(line.startswith(name) and "→ 3" in line for line in text.splitlines())


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("F16", torch.float16), ("f64", torch.float64)])
def test_compress_writes_another_dtype(tmp_path, adapter, name, dtype):
    prints("compress", adapter, tmp_path / "out", "--rank", 3, "--dtype", name)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {dtype}


def test_compress_overwrites_only_when_told(tmp_path, adapter):
    prints("compress", adapter, tmp_path / "out", "--rank", 3)
    before = snapshot(tmp_path / "out")
    assert "--overwrite" in refuses("compress", adapter, tmp_path / "out", "--rank", 2)
    assert snapshot(tmp_path / "out") == before
    prints("compress", adapter, tmp_path / "out", "--rank", 2, "--overwrite")
    assert open_adapter(tmp_path / "out").rank == 2


def test_rank_and_retain_contradict_each_other(tmp_path, adapter):
    text = refuses("compress", adapter, tmp_path / "out", "--rank", 3, "--retain", 0.9, code=2)
    assert "--rank" in text
    assert "--retain" in text
    assert not (tmp_path / "out").exists()


# --- run --------------------------------------------------------------------------------------------------------


def toml(tmp_path: Path, *, lora_rank: int = 0, **squeeze: object) -> Path:
    """A file with these keys in [squeeze] and, if it is given, [model] lora_rank."""
    lines = ["[squeeze]", *(f"{key} = {json.dumps(value)}" for key, value in squeeze.items())]
    lines += ["[model]", f"lora_rank = {lora_rank}"] if lora_rank else []
    (tmp_path / "squeeze.toml").write_text("\n".join(lines))
    return tmp_path / "squeeze.toml"


def test_run_analyzes(tmp_path, adapter):
    file = toml(tmp_path, adapter_path=str(adapter), min_variance_retention=0.8, target_ranks=[2, 4, 6])
    assert prints("run", file) == prints("analyze", adapter, "--retain", 0.8, "--ranks", "2,4,6")


def test_run_compresses_to_the_recommended_rank(tmp_path, adapter):
    out = str(tmp_path / "out")
    text = prints("run", toml(tmp_path, adapter_path=str(adapter), min_variance_retention=0.8, output_path=out))
    assert "Recommended rank" in text
    assert out in text
    assert open_adapter(out).rank == analyze_adapter(adapter, min_variance_retention=0.8).recommended_rank


def test_run_compresses_as_it_is_told(tmp_path, adapter):
    prints("compress", adapter, tmp_path / "out", "--rank", 2)
    (tmp_path / "out" / "old").write_text("")
    chosen = {"compress_to": 3, "dtype": "bf16", "method": "qr", "by": "worst", "device": "cpu", "overwrite": True}
    file = toml(tmp_path, adapter_path=str(adapter), output_path=str(tmp_path / "out"), lora_rank=8, **chosen)

    assert "in every layer" in prints("run", file)

    assert set(snapshot(tmp_path / "out")) == {CONFIG, WEIGHTS, "README.md"}
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert read_config(tmp_path / "out")["r"] == 3


def test_run_says_how_its_file_replaces_an_output(tmp_path, adapter):
    config = toml(tmp_path, adapter_path=str(adapter), output_path=str(tmp_path / "out"))
    prints("run", config)
    assert "already exists; set overwrite = true in [squeeze] to replace it" in " ".join(refuses("run", config).split())


def test_run_refuses_a_model_rank_that_the_tensors_contradict(tmp_path, adapter):
    file = toml(tmp_path, adapter_path=str(adapter), output_path=str(tmp_path / "out"), lora_rank=64)
    assert "64 was declared" in refuses("run", file)
    assert not (tmp_path / "out").exists()


def test_run_explain_says_what_would_be_done_and_does_nothing(tmp_path, adapter):
    out = str(tmp_path / "out")
    file = toml(tmp_path, adapter_path=str(adapter), output_path=out, compress_to=3, lora_rank=64)
    before = snapshot(tmp_path)

    said = {line.split()[0]: line.split(maxsplit=1)[1] for line in prints("run", file, "--explain").splitlines()}

    assert snapshot(tmp_path) == before
    assert said["mode"] == "squeeze"
    assert said["config"] == str(file)
    assert said["adapter_path"] == str(adapter)
    assert said["source_rank"] == "64"
    assert said["min_variance_retention"].startswith("0.95")
    assert said["output_path"] == out
    assert said["compress_to"] == "3"


def test_run_explain_needs_no_adapter_but_sound_settings(tmp_path):
    assert "nowhere" in prints("run", toml(tmp_path, adapter_path="nowhere"), "--explain")
    assert "did you mean 'adapter_path'" in refuses("run", toml(tmp_path, adapter_pat="nowhere"), "--explain")


# --- saying no --------------------------------------------------------------------------------------------------

USER_ERRORS = {
    "no such path": (["analyze", "nowhere"], 1),
    "no adapter there": (["analyze", "."], 1),
    "an impossible threshold": (["analyze", "adapter", "--retain", "1.5"], 1),
    "an impossible candidate": (["analyze", "adapter", "--ranks", "0"], 1),
    "candidates that are no numbers": (["analyze", "adapter", "--ranks", "4;8"], 2),
    "a source rank that is wrong": (["analyze", "adapter", "--source-rank", "64"], 1),
    "an unknown method": (["analyze", "adapter", "--method", "svd"], 2),
    "an unknown option": (["analyze", "adapter", "--rnak", "4"], 2),
    "a missing argument": (["analyze"], 2),
    "an unknown command": (["analyse", "adapter"], 2),
    "a device that does not exist": (["analyze", "adapter", "--device", "nonsense"], 1),
    "a device that is not there": (["analyze", "adapter", "--device", "cuda:77"], 1),
    "a rank of zero": (["compress", "adapter", "out", "--rank", "0"], 2),
    "a rank that is no number": (["compress", "adapter", "out", "--rank", "many"], 2),
    "an impossible share": (["compress", "adapter", "out", "--retain", "95"], 1),
    "an unknown dtype": (["compress", "adapter", "out", "--rank", "2", "--dtype", "int8"], 2),
    "an output that is the source": (["compress", "adapter", "adapter", "--rank", "2", "--overwrite"], 1),
    "an output that is a file": (["compress", "adapter", "file", "--rank", "2"], 1),
    "no settings": (["run", "nowhere.toml"], 1),
    "settings that are a folder": (["run", "adapter"], 1),
    "settings that are no TOML": (["run", "adapter/adapter_config.json"], 1),
}


@pytest.mark.parametrize(("arguments", "code"), USER_ERRORS.values(), ids=USER_ERRORS)
def test_mistakes_are_answered_with_a_message_and_an_exit_code(tmp_path, monkeypatch, adapter, arguments, code):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    refuses(*arguments, code=code)
    assert snapshot(tmp_path) == before


def test_damaged_values_name_layer_and_tensor(tmp_path, adapter):
    name = "model.layers.0.self_attn.q_proj"
    edit_tensors(adapter, lambda tensors: tensors[f"{PREFIX}{name}.lora_B.weight"].fill_(float("nan")))
    for arguments in (["analyze", adapter], ["compress", adapter, tmp_path / "out", "--rank", 2]):
        text = refuses(*arguments)
        assert name in text
        assert "lora_B" in text


# --- a process of its own ---------------------------------------------------------------------------------------


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from lora_squeeze.cli import main; main(prog_name='lora-squeeze')"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_a_real_process_analyzes_into_a_pipe(adapter):
    done = process("analyze", adapter)
    assert (done.returncode, done.stderr) == (0, "")
    assert "<--" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_real_process_reports_a_mistake_without_a_traceback(tmp_path):
    done = process("compress", tmp_path / "nowhere", tmp_path / "out", "--rank", 2)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: {tmp_path / 'nowhere'}: no such file or folder\n"


def test_the_version(tmp_path):
    done = process("--version")
    assert done.returncode == 0
    assert done.stdout == f"lora-squeeze, version {__version__}\n"


def all_commands(command: click.Command, *path: str) -> list[list[str]]:
    found = [list(path)]
    for name, sub in getattr(command, "commands", {}).items():
        found += all_commands(sub, *path, name)
    return found


def test_help_of_every_command_works_without_torch():
    script = f"""
import sys
from lora_squeeze.cli import main
for path in {all_commands(main)!r}:
    main([*path, "--help"], standalone_mode=False)
print("torch imported:", "torch" in sys.modules, "safetensors" in sys.modules, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.count("Usage: ") == len(all_commands(main))
    assert done.stdout.endswith("torch imported: False False False\n")


def test_explaining_settings_works_without_torch(tmp_path):
    file = toml(tmp_path, adapter_path="nowhere")
    script = f"""
import sys
from lora_squeeze.cli import main
main(["run", {str(file)!r}, "--explain"], standalone_mode=False)
print("torch imported:", "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("torch imported: False\n")


@pytest.mark.parametrize("path", all_commands(main), ids=lambda path: " ".join(path) or "lora-squeeze")
def test_every_command_and_option_has_a_help_text(path):
    command = main
    for name in path:
        command = command.commands[name]
    assert command.help
    assert all(option.help for option in command.params if isinstance(option, click.Option))
