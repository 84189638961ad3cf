"""Options of ranks: what is refused, and the same in TOML."""

import re
from pathlib import Path

import pytest
from adapters import (
    LLAMA,
    WEIGHTS,
    edit_config,
    make_adapter,
    ranks,
    snapshot,
)
from commands import invoke, prints, refuses, write_plan
from safetensors.torch import load_file

from lora_squeeze import open_adapter
from lora_squeeze.errors import OutputError
from lora_squeeze.formats import save_adapter
from lora_squeeze.serving import RUNTIMES


@pytest.fixture
def adapter(tmp_path) -> Path:
    return make_adapter(tmp_path / "adapter", alpha_pattern={"v_proj": 5})


# --- what is refused --------------------------------------------------------------------------------------------

MISSPELLED = {
    "rank-for without a rank": ["--rank-for", "q_proj"],
    "rank-for with an empty rank": ["--rank-for", "q_proj="],
    "rank-for without a pattern": ["--rank-for", "=4"],
    "rank-for with a text": ["--rank-for", "q_proj=four"],
    "rank-for with a superscript": ["--rank-for", "q_proj=²"],
    "steps that are no numbers": ["--steps", "8;16"],
    "a minimum that is no number": ["--min-rank", "few"],
    "a maximum that is no number": ["--max-rank", "4.5"],
    "an unknown option": ["--minimum-rank", "4"],
    "an unknown by": ["--by", "best"],
    "rank and policy": ["--rank", "4", "--policy", "energy=0.9"],
    "retain and policy": ["--retain", "0.9", "--policy", "energy=0.9"],
    "rank and retain": ["--rank", "4", "--retain", "0.9"],
    "ranks and policy": ["--ranks", "RANKS", "--policy", "energy=0.9"],
    "ranks and rank": ["--ranks", "RANKS", "--rank", "4"],
    "ranks and retain": ["--ranks", "RANKS", "--retain", "0.9"],
    "ranks and a maximum": ["--ranks", "RANKS", "--max-rank", "1"],
    "ranks and a minimum": ["--ranks", "RANKS", "--min-rank", "3"],
    "ranks and an override": ["--ranks", "RANKS", "--rank-for", "q_proj=1"],
    "a rank of 0": ["--rank", "0"],
}


@pytest.mark.parametrize("options", MISSPELLED.values(), ids=MISSPELLED)
def test_options_that_are_wrong_or_contradict_each_other_are_usage_errors(tmp_path, adapter, options):
    plan = write_plan(tmp_path / "ranks.json", adapter)
    before = snapshot(tmp_path)
    options = [str(plan) if one == "RANKS" else one for one in options]
    assert "Usage: " in refuses("compress", adapter, tmp_path / "out", *options, code=2)
    assert snapshot(tmp_path) == before


IMPOSSIBLE = {
    "minimum above maximum": (["--min-rank", "5", "--max-rank", "4"], "min_rank 5 is above max_rank 4"),
    "negative minimum": (["--min-rank", "-1"], "min_rank -1"),
    "maximum of 0": (["--max-rank", "0"], "max_rank 0"),
    "multiple of 0": (["--multiple-of", "0"], "multiple_of 0"),
    "a step of 0": (["--steps", "0,8"], "step 0"),
    "a pattern that matches nothing": (["--rank-for", "c_attn=4"], "'c_attn' matches no layer"),
    "a pattern that is none": (["--rank-for", "q_proj[=4"], "'q_proj['"),
    "a group of nothing": (["--equal", "experts"], "'experts' matches no layer"),
    "overrides that differ in a group": (
        ["--equal", "qkv", "--rank-for", "q_proj=2", "--rank-for", "v_proj=3"],
        "same rank",
    ),
    "everything left out": (["--rank-for", ".*=0"], "nothing"),
    "an unknown policy": (["--policy", "magic=0.9"], "unknown policy 'magic'"),
    "a policy without its value": (["--policy", "energy"], "energy=…"),
    "a value that is none": (["--policy", "energy=lots"], "'lots'"),
    "a fraction above 1": (["--policy", "energy=90"], "energy=90"),
    "a size too small": (["--policy", "size=100"], "smallest"),
    "a size that is none": (["--policy", "size=5iB"], "5iB"),
    "parameters too few": (["--policy", "params=1e-9"], "params"),
    "a retention above 1": (["--retain", "95"], "variance=95"),
    "rank 0 for all": (["--policy", "para-rank=0"], "para-rank=0"),
}


@pytest.mark.parametrize("command", ["plan", "compress"])
@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_is_impossible_is_one_line_and_nothing_is_written(tmp_path, adapter, options, message, command):
    before = snapshot(tmp_path)
    if "--retain" in options and command == "plan":
        options = ["--policy", f"variance={options[1]}"]
    output = [tmp_path / "out"] if command == "compress" else ["-o", tmp_path / "ranks.json"]
    said = refuses(command, adapter, *output, *options)
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert snapshot(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_plan_that_cannot_be_applied_is_not_written(tmp_path):
    adapter = make_adapter(tmp_path / "adapter", use_dora=True)
    message = refuses("plan", adapter, "--policy", "para-rank=0.1", "-o", tmp_path / "ranks.json")
    assert "min_rank" in message
    assert not (tmp_path / "ranks.json").exists()


def test_a_layer_that_cannot_be_left_out_is_named_with_what_to_do(tmp_path):
    adapter = make_adapter(tmp_path / "adapter", use_dora=True)
    arguments = ("compress", adapter, tmp_path / "out", "--policy", "para-rank=0.1")
    message = refuses(*arguments)
    assert "lora_magnitude_vector" in message
    assert "min_rank" in message
    assert not (tmp_path / "out").exists()
    prints("compress", adapter, tmp_path / "out", "--policy", "para-rank=0.3", "--min-rank", 1)
    assert min(ranks(LLAMA, tmp_path / "out").values()) >= 1


# --- TOML -------------------------------------------------------------------------------------------------------


def write_toml(folder: Path, adapter: Path, text: str) -> Path:
    (folder / "squeeze.toml").write_text(
        f"[squeeze]\nadapter_path = '{adapter}'\noutput_path = '{folder / 'out'}'\n{text}"
    )
    return folder / "squeeze.toml"


KEYS = {
    "policy": ("policy = 'energy=0.9'", ["--policy", "energy=0.9"]),
    "size and dtype": ("policy = 'size=8KB'\ndtype = 'bf16'", ["--policy", "size=8KB", "--dtype", "bf16"]),
    "bounds": (
        "policy = 'params=0.5'\nmin_rank = 1\nmax_rank = 6\nmultiple_of = 2",
        ["--policy", "params=0.5", "--min-rank", 1, "--max-rank", 6, "--multiple-of", 2],
    ),
    "a minimum of 0": ("policy = 'params=0.2'\nmin_rank = 0", ["--policy", "params=0.2", "--min-rank", 0]),
    "steps": ("policy = 'energy=0.7'\nsteps = [2, 5]", ["--policy", "energy=0.7", "--steps", "2,5"]),
    "groups": (
        "policy = 'energy=0.7'\nequal = ['qkv', 'layers\\.\\d+']",
        ["--policy", "energy=0.7", "--equal", "qkv", "--equal", r"layers\.\d+"],
    ),
    "overrides": (
        "policy = 'energy=0.9'\n[squeeze.rank_for]\nq_proj = 2\n'layers\\.0\\..*' = 5",
        ["--policy", "energy=0.9", "--rank-for", "q_proj=2", "--rank-for", r"layers\.0\..*=5"],
    ),
    "overrides, turned round": (
        "policy = 'energy=0.9'\n[squeeze.rank_for]\n'layers\\.0\\..*' = 5\nq_proj = 2",
        ["--policy", "energy=0.9", "--rank-for", r"layers\.0\..*=5", "--rank-for", "q_proj=2"],
    ),
    "runtime": (
        "policy = 'params=0.5'\nruntime = 'sglang'\nmax_lora_rank = 3",
        ["--policy", "params=0.5", "--for", "sglang", "--max-lora-rank", 3],
    ),
    "variance in the mean": ("policy = 'variance=0.8'", ["--policy", "variance=0.8"]),
    "variance in the worst layer": (
        "policy = 'variance=0.8'\nby = 'worst'",
        ["--policy", "variance=0.8", "--by", "worst"],
    ),
    "a rank and limits": ("compress_to = 4\nmax_rank = 3", ["--rank", 4, "--max-rank", 3]),
    "a recommended rank and limits": ("multiple_of = 3", ["--multiple-of", 3]),
}


@pytest.mark.parametrize(("text", "options"), KEYS.values(), ids=KEYS)
def test_a_toml_file_does_what_the_options_do(tmp_path, adapter, text, options):
    prints("run", write_toml(tmp_path, adapter, text))
    prints("compress", adapter, tmp_path / "by-options", *options)
    assert ranks(LLAMA, tmp_path / "out") == ranks(LLAMA, tmp_path / "by-options")
    by_toml, by_options = (load_file(tmp_path / folder / WEIGHTS) for folder in ("out", "by-options"))
    assert by_toml.keys() == by_options.keys()
    assert all(tensor.equal(by_options[key]) for key, tensor in by_toml.items())


BAD_KEYS = {
    "an unknown policy": ("policy = 'magic=1'", "unknown policy 'magic'"),
    "a policy and a rank": ("policy = 'energy=0.9'\ncompress_to = 4", "contradict"),
    "a policy that is a number": ("policy = 0.9", "policy"),
    "an unknown runtime": ("policy = 'energy=0.9'\nruntime = 'tgi'", "'vllm'"),
    "an unknown cap": ("policy = 'energy=0.9'\nruntime = 'vllm'\nmax_lora_rank = 17", "max_lora_rank 17"),
    "limits that contradict": ("policy = 'energy=0.9'\nmin_rank = 5\nmax_rank = 4", "min_rank 5"),
    "a negative maximum": ("policy = 'energy=0.9'\nmax_rank = -4", "max_rank -4"),
    "a negative minimum": ("policy = 'energy=0.9'\nmin_rank = -4", "min_rank"),
    "an override of nothing": ("policy = 'energy=0.9'\nrank_for = {c_attn = 4}", "'c_attn' matches no layer"),
    "an override that is a text": ("policy = 'energy=0.9'\nrank_for = {q_proj = '4'}", "q_proj"),
    "overrides in a list": ("policy = 'energy=0.9'\nrank_for = ['q_proj=4']", "rank_for"),
    "a group that is a text": ("policy = 'energy=0.9'\nequal = 'qkv'", "equal"),
    "a server's rank without a server": ("max_lora_rank = 16", "max_lora_rank is what a server allows: say which"),
    "a server's rank for PEFT": ("runtime = 'peft'\nmax_lora_rank = 16", "use max_rank"),
    "a misspelled key": ("policy = 'energy=0.9'\nmax_ranks = 4", "did you mean 'max_rank'"),
}


@pytest.mark.parametrize(("text", "message"), BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_toml_file_that_makes_no_sense_writes_nothing(tmp_path, adapter, text, message):
    file = write_toml(tmp_path, adapter, text)
    before = snapshot(tmp_path)
    result = invoke("run", file)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("runtime", [(), ("--for", "peft")], ids=str)
@pytest.mark.parametrize(
    "command",
    [
        ["compress", "adapter", "out"],
        ["merge", "adapter", "adapter", "out"],
        ["plan", "adapter"],
        ["report", "adapter"],
    ],
    ids=lambda words: words[0],
)
def test_a_server_s_rank_needs_a_server(tmp_path, adapter, monkeypatch, command, runtime):
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    said = refuses(*command, "--max-lora-rank", 8, *runtime, code=2)
    assert "--max-lora-rank is what a server allows" in said
    assert snapshot(tmp_path) == before


def test_explain_tells_the_policy_and_does_nothing(tmp_path, adapter):
    text = "policy = 'size=8KB'\nruntime = 'vllm'\nmax_rank = 4\nrank_for = {q_proj = 2}"
    file = write_toml(tmp_path, adapter, text)
    before = snapshot(tmp_path)
    said = prints("run", file, "--explain")
    assert re.search(r"policy\s+size=8KB", said)
    assert re.search(r"runtime\s+vllm", said)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_help_names_every_runtime_and_every_group(runtime):
    text = prints("compress", "--help")
    assert runtime in text
    assert "qkv" in text
    assert "experts" in text


def test_an_adapter_that_was_damaged_is_one_line_for_every_command(tmp_path, adapter):
    edit_config(adapter, r=3)
    for arguments in (
        ("plan", adapter),
        ("compare", adapter),
        ("check", adapter, "--for", "vllm"),
        ("compress", adapter, tmp_path / "out", "--policy", "energy=0.9", "--policy", "knee"),
    ):
        said = refuses(*arguments)
        assert "declares rank 3" in said
        assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


# --- paths that are empty ---------------------------------------------------------------------------------------

EMPTY = {
    "compress": (["compress", "", "out", "--rank", "2"], 1),
    "to nowhere": (["compress", "adapter", "", "--rank", "2"], 2),
    "convert": (["convert", "adapter", "", "--to", "kohya"], 2),
    "merge": (["merge", "adapter", "", "out"], 1),
    "merge to nowhere": (["merge", "adapter", "adapter", ""], 2),
    "batch": (["batch", "", "--out", "out"], 1),
    "batch to nowhere": (["batch", "adapter", "--out", ""], 2),
    "plan": (["plan", "adapter", "-o", ""], 2),
    "show": (["show", ""], 1),
    "analyze": (["analyze", ""], 1),
    "compare": (["compare", "adapter", ""], 1),
    "continue": (["continue", "", "--base", "b", "--data", "builtin:sums", "--out", "out"], 2),
    "train": (["train", "a.toml", "--out", ""], 2),
    "campaign": (["campaign", "run", "a.toml", "--out", ""], 2),
}


@pytest.mark.parametrize(("arguments", "code"), EMPTY.values(), ids=EMPTY)
def test_an_empty_path_is_not_the_folder_one_is_in(tmp_path, adapter, monkeypatch, arguments, code):
    (tmp_path / "a.toml").touch()
    (tmp_path / "here").mkdir()
    make_adapter(tmp_path / "here")
    (tmp_path / "here" / "adapter").symlink_to(adapter)
    monkeypatch.chdir(tmp_path / "here")
    before = snapshot(tmp_path)
    said = " ".join(refuses(*arguments, code=code).split())
    assert "is empty: is a variable of the shell not set?" in said
    assert snapshot(tmp_path) == before


def test_nothing_is_saved_to_an_empty_path(adapter):
    with pytest.raises(OutputError, match="the path of the output is empty"):
        save_adapter(open_adapter(adapter), "")
