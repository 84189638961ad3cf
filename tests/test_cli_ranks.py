"""plan, compare, check, and the options of compress and run that choose ranks: what they print, write and refuse."""

import json
import re
from pathlib import Path

import pytest
from adapters import (
    BERT,
    LLAMA,
    WEIGHTS,
    edit_config,
    make_adapter,
    ranks,
    read_config,
    relative,
    snapshot,
    truncation,
    updates,
)
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from lora_squeeze import Ranks, decompose, open_adapter
from lora_squeeze.cli import main
from lora_squeeze.comparison import compare_policies
from lora_squeeze.compression import file_cost
from lora_squeeze.limits import Limits
from lora_squeeze.policies import POLICIES
from lora_squeeze.records import outcomes_to_json
from lora_squeeze.serving import RUNTIMES
from lora_squeeze.verbs import choose_ranks, outcome


@pytest.fixture
def adapter(tmp_path) -> Path:
    return make_adapter(tmp_path / "adapter", alpha_pattern={"v_proj": 5})


def invoke(*arguments: object) -> Result:
    """Run a command; anything that is not a clean exit is raised."""
    return CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)


def prints(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def refuses(*arguments: object, code: int = 1) -> str:
    """What a command says that ends with this exit code and prints nothing else."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def chosen(adapter: Path, policy: str = "variance=0.95", **options) -> dict[str, int]:
    return choose_ranks(decompose(open_adapter(adapter)), policy, **options).by_layer


def planned(*arguments: object) -> dict[str, int]:
    return json.loads(prints("plan", *arguments, "--json"))["by_layer"]


# --- plan -------------------------------------------------------------------------------------------------------


def test_plan_prints_what_the_plan_keeps_and_costs_and_writes_nothing(tmp_path, adapter):
    before = snapshot(tmp_path)
    text = prints("plan", adapter, "--policy", "para-rank=0.3")
    decomposition = decompose(open_adapter(adapter))
    plan = choose_ranks(decomposition, "para-rank=0.3")
    found = outcome(decomposition, plan)
    assert "para-rank=0.3" in text
    assert f"{found.source_parameters:,} → {found.parameters:,}" in text
    assert f"{100 * found.energy_kept:.2f}%" in text
    for rank in set(plan.by_layer.values()):
        assert f"{rank} ({list(plan.by_layer.values()).count(rank)} layers)" in text
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("policy", ["energy=0.9", "para-energy=0.8", "params=0.25", "size=8KB", "knee"])
def test_a_plan_is_what_compress_would_take(tmp_path, adapter, policy):
    prints("plan", adapter, "--policy", policy, "-o", tmp_path / "ranks.json")
    assert Ranks.from_json((tmp_path / "ranks.json").read_text()).by_layer == chosen(adapter, policy)

    prints("compress", adapter, tmp_path / "by-plan", "--ranks", tmp_path / "ranks.json")
    prints("compress", adapter, tmp_path / "at-once", "--policy", policy)

    assert snapshot(tmp_path / "by-plan") == snapshot(tmp_path / "at-once")


def test_without_a_policy_a_plan_keeps_95_percent_of_the_variance(adapter):
    assert planned(adapter) == chosen(adapter)


def test_a_plan_is_edited_by_hand_and_applied(tmp_path, adapter):
    file = tmp_path / "ranks.json"
    prints("plan", adapter, "--policy", "fixed=4", "--output", file)
    plan = json.loads(file.read_text())
    dropped, deepened, *others = plan["by_layer"]
    plan["by_layer"] |= {dropped: 0, deepened: 7}
    plan["policy"] = "edited by hand"
    file.write_text(json.dumps(plan))

    text = prints("compress", adapter, tmp_path / "out", "--ranks", file)

    assert "edited by hand" in text
    assert ranks(LLAMA, tmp_path / "out") == {deepened: 7} | dict.fromkeys(others, 4)
    before, after = updates(LLAMA, adapter), updates(LLAMA, tmp_path / "out")
    for name, rank in ranks(LLAMA, tmp_path / "out").items():
        assert relative(after[name], truncation(before[name], rank)) <= 1e-5


def test_a_plan_has_one_policy(adapter):
    message = refuses("plan", adapter, "--policy", "energy=0.9", "--policy", "energy=0.8", code=2)
    assert "one --policy" in message


@pytest.mark.parametrize("place", ["nowhere/ranks.json", "."])
def test_a_plan_that_cannot_be_written_is_an_error(tmp_path, adapter, place):
    before = snapshot(tmp_path)
    assert "cannot be written" in refuses("plan", adapter, "-o", tmp_path / place)
    assert snapshot(tmp_path) == before


def test_a_plan_for_a_runtime_is_one_that_it_loads(adapter):
    assert len(set(planned(adapter, "--policy", "energy=0.9", "--for", "sglang").values())) == 1
    assert max(planned(adapter, "--policy", "fixed=8", "--for", "vllm", "--max-lora-rank", 1).values()) == 1


def test_a_plan_by_size_knows_the_dtype(adapter):
    narrow = sum(planned(adapter, "--policy", "size=8KB", "--dtype", "bf16").values())
    assert narrow > sum(planned(adapter, "--policy", "size=8KB").values())


# --- compress --ranks -------------------------------------------------------------------------------------------


def write_plan(file: Path, adapter: Path, **changes: object) -> Path:
    by_layer = dict.fromkeys(open_adapter(adapter).layers, 2) | changes
    file.write_text(json.dumps({"record": "Ranks", "policy": "by hand", "by_layer": by_layer}))
    return file


Q0 = "model.layers.0.self_attn.q_proj"
BAD_PLANS = {
    "another adapter": ({"bert.encoder.layer.0.attention.self.query": 2}, "bert.encoder.layer.0.attention.self.query"),
    "above its own rank": ({Q0: 9}, f"'{Q0}': rank 9"),
    "negative": ({Q0: -1}, f"'{Q0}': rank -1"),
    "a fraction": ({Q0: 2.5}, "whole numbers"),
    "a text": ({Q0: "4"}, "whole numbers"),
    "a truth": ({Q0: True}, "whole numbers"),
    "nothing": ({Q0: None}, "whole numbers"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_a_plan_that_does_not_fit_is_an_error_and_nothing_is_written(tmp_path, adapter, changes, message):
    file = write_plan(tmp_path / "ranks.json", adapter, **changes)
    before = snapshot(tmp_path)
    assert message in refuses("compress", adapter, tmp_path / "out", "--ranks", file)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "4", '{"by_layer": {}}', '{"record": "Ranks"}', '{"record": "Ranks", "by_layer": {}}', "\x00"],
)
def test_a_file_that_is_no_plan_is_an_error_and_nothing_is_written(tmp_path, adapter, text):
    (tmp_path / "ranks.json").write_text(text)
    before = snapshot(tmp_path)
    refuses("compress", adapter, tmp_path / "out", "--ranks", tmp_path / "ranks.json")
    assert snapshot(tmp_path) == before


def test_a_plan_that_cannot_be_read_is_named(tmp_path, adapter):
    missing = tmp_path / "missing.json"
    assert str(missing) in refuses("compress", adapter, tmp_path / "out", "--ranks", missing)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{")
    assert "binary.json" in refuses("compress", adapter, tmp_path / "out", "--ranks", tmp_path / "binary.json")
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json" in refuses("compress", adapter, tmp_path / "out", "--ranks", tmp_path / "broken.json")


def test_a_plan_of_zeros_is_an_error(tmp_path, adapter):
    file = write_plan(tmp_path / "ranks.json", adapter, **dict.fromkeys(open_adapter(adapter).layers, 0))
    assert "nothing" in refuses("compress", adapter, tmp_path / "out", "--ranks", file)
    assert not (tmp_path / "out").exists()


# --- several policies -------------------------------------------------------------------------------------------

POLICIES_OF_ALL_KINDS = ["energy=0.9", "para-rank=0.25", "params=0.4", "size=6KB", "size=9000", "fixed=3", "knee"]


def test_several_policies_write_what_each_would_write_alone(tmp_path, adapter):
    options = [part for policy in POLICIES_OF_ALL_KINDS for part in ("--policy", policy)]

    text = prints("compress", adapter, tmp_path / "out", *options)

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(POLICIES_OF_ALL_KINDS)
    for policy in POLICIES_OF_ALL_KINDS:
        prints("compress", adapter, tmp_path / "alone" / policy, "--policy", policy)
        assert snapshot(tmp_path / "out" / policy) == snapshot(tmp_path / "alone" / policy)
        assert str(tmp_path / "out" / policy) in text


def test_several_policies_share_limits_and_runtime(tmp_path, adapter):
    options = ["--policy", "energy=0.9", "--policy", "params=0.5", "--for", "llamacpp", "--multiple-of", "2"]
    prints("compress", adapter, tmp_path / "out", *options)
    for policy in ("energy=0.9", "params=0.5"):
        config = read_config(tmp_path / "out" / policy)
        assert config["r"] % 2 == 0
        assert config["rank_pattern"] == {}


def test_several_policies_as_json_are_one_record_each(tmp_path, adapter):
    text = prints("compress", adapter, tmp_path / "out", "--policy", "fixed=2", "--policy", "fixed=4", "--json")
    records, decoder = [], json.JSONDecoder()
    while text := text.strip():
        record, end = decoder.raw_decode(text)
        records.append(record)
        text = text[end:]
    assert [record["policy"] for record in records] == ["fixed=2", "fixed=4"]
    for record in records:
        assert Path(record["output"]) == tmp_path / "out" / record["policy"]
        assert record["bytes_after"] == (tmp_path / "out" / record["policy"] / WEIGHTS).stat().st_size


@pytest.mark.parametrize("second", ["size=10", "params=3", "energy=2", "nonsense=1", "fixed=0", "../outside=1"])
def test_if_one_of_several_policies_is_impossible_nothing_is_written(tmp_path, adapter, second):
    before = snapshot(tmp_path)
    refuses("compress", adapter, tmp_path / "out", "--policy", "fixed=2", "--policy", second)
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_the_same_policy_twice_leaves_nothing_half_done(tmp_path, adapter):
    result = invoke("compress", adapter, tmp_path / "out", "--policy", "fixed=2", "--policy", "fixed=2")
    assert (result.exit_code == 0) == (tmp_path / "out" / "fixed=2").exists()


def test_several_policies_replace_nothing_without_being_told(tmp_path, adapter):
    prints("compress", adapter, tmp_path / "out" / "fixed=2", "--rank", 4)
    before = snapshot(tmp_path)
    arguments = ("compress", adapter, tmp_path / "out", "--policy", "fixed=3", "--policy", "fixed=2")
    assert "--overwrite" in refuses(*arguments)
    assert snapshot(tmp_path) == before
    prints(*arguments, "--overwrite")
    assert read_config(tmp_path / "out" / "fixed=2")["r"] == 2
    assert read_config(tmp_path / "out" / "fixed=3")["r"] == 3


def test_several_policies_do_not_write_into_the_source(tmp_path, adapter):
    before = snapshot(tmp_path)
    assert "source" in refuses("compress", adapter, adapter, "--policy", "fixed=3", "--policy", "fixed=2")
    assert snapshot(tmp_path) == before


# --- compare ----------------------------------------------------------------------------------------------------


def test_compare_shows_all_policies_at_each_budget(tmp_path, adapter):
    before = snapshot(tmp_path)
    text = prints("compare", adapter)
    for share in ("50.00%", "25.00%", "12.50%", "6.25%"):
        assert f"At most {share} of the parameters" in text
    first = text.partition("At most 25.00%")[0]
    for name in POLICIES:
        assert re.search(rf"^{name}=", first, re.MULTILINE), name
    for heading in ("Policy", "Parameters", "Energy kept", "Worst layer", "Largest rank", "Left out", "Weights"):
        assert heading in text
    assert snapshot(tmp_path) == before


def test_compare_as_json_is_what_the_library_finds(adapter):
    decomposition = decompose(open_adapter(adapter))
    cost = file_cost(decomposition.adapter)
    expected = [one for fraction in (0.6, 0.2) for one in compare_policies(decomposition.spectra, fraction, cost=cost)]
    assert json.loads(prints("compare", adapter, "--params", "0.6,0.2", "--json")) == json.loads(
        outcomes_to_json(expected)
    )


@pytest.mark.parametrize(("fractions", "code"), [("2", 1), ("0.5,0", 1), ("-0.5", 1), ("nan", 1), ("half", 2), ("", 2)])
def test_fractions_that_are_none_are_refused(adapter, fractions, code):
    assert "fraction" in refuses("compare", adapter, f"--params={fractions}", code=code)


def test_compare_of_nothing_is_an_error(tmp_path):
    assert "no such file" in refuses("compare", tmp_path / "nowhere")


# --- check ------------------------------------------------------------------------------------------------------


READ_PEFT = [name for name, runtime in RUNTIMES.items() if "peft" in runtime.formats]


@pytest.mark.parametrize("runtime", READ_PEFT)
def test_check_ends_with_0_where_the_adapter_is_loaded(tmp_path, runtime):
    plain = make_adapter(tmp_path / "adapter")
    text = prints("check", plain, "--for", runtime)
    assert f"{plain}: {runtime} loads it" in text
    assert "largest rank 8" in text


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "llamacpp"])
def test_check_ends_with_1_and_says_why_where_it_is_not(tmp_path, runtime):
    adapter = make_adapter(tmp_path / "adapter", BERT, modules_to_save=["classifier"], alpha_pattern={"query": 3})
    result = invoke("check", adapter, "--for", runtime)
    assert result.exit_code == 1
    assert f"{runtime} would not load it" in result.stdout
    assert "modules_to_save" in result.stdout
    assert "scale" in result.stdout
    assert RUNTIMES[runtime].source in result.stdout
    assert result.stderr == ""


def test_check_knows_the_cap_of_the_server(tmp_path):
    adapter = make_adapter(tmp_path / "adapter", r=24)
    result = invoke("check", adapter, "--for", "vllm")
    assert result.exit_code == 1
    assert "rank 24 is above max_lora_rank 16" in result.stdout
    assert "max_lora_rank 32" in prints("check", adapter, "--for", "vllm", "--max-lora-rank", 32)


def test_check_needs_to_know_for_which_runtime(adapter):
    assert "--for" in refuses("check", adapter, code=2)


def test_check_needs_a_runtime_and_a_cap_that_exist(adapter):
    assert "vllm" in refuses("check", adapter, "--for", "ollama", code=2)
    assert "max_lora_rank 17" in refuses("check", adapter, "--for", "vllm", "--max-lora-rank", 17)
    refuses("check", adapter, "--for", "vllm", "--max-lora-rank", 0, code=2)
    refuses("check", adapter.parent / "nowhere", "--for", "vllm")


@pytest.mark.parametrize("runtime", READ_PEFT)
def test_what_compress_writes_for_a_runtime_passes_its_check(tmp_path, adapter, runtime):
    prints("compress", adapter, tmp_path / "out", "--policy", "para-energy=0.8", "--for", runtime)
    assert "loads it" in prints("check", tmp_path / "out", "--for", runtime)


# --- --for and --max-lora-rank ----------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["sglang", "llamacpp"])
@pytest.mark.parametrize("how", [("--rank", 3), ("--retain", 0.9), ("--policy", "params=0.3")], ids=str)
def test_compress_for_runtimes_of_one_rank(tmp_path, runtime, how):
    adapter = make_adapter(tmp_path / "adapter", use_rslora=True, rank_pattern={"v_proj": 2})
    prints("compress", adapter, tmp_path / "out", "--for", runtime, *how)
    config = read_config(tmp_path / "out")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    assert set(ranks(LLAMA, tmp_path / "out").values()) == {config["r"]}


def test_an_edited_plan_is_padded_for_such_a_runtime(tmp_path, adapter):
    file = write_plan(tmp_path / "ranks.json", adapter, **{Q0: 5})
    prints("compress", adapter, tmp_path / "out", "--ranks", file, "--for", "sglang")
    assert set(ranks(LLAMA, tmp_path / "out").values()) == {5}
    before, after = updates(LLAMA, adapter), updates(LLAMA, tmp_path / "out")
    assert all(relative(after[n], truncation(before[n], 5 if n == Q0 else 2)) <= 1e-5 for n in before)


@pytest.mark.parametrize(
    "how", [(), ("--policy", "energy=0.999"), ("--policy", "params=0.9"), ("--retain", 0.999)], ids=str
)
def test_compress_stays_below_what_the_server_allows(tmp_path, how):
    adapter = make_adapter(tmp_path / "adapter", r=24)
    prints("compress", adapter, tmp_path / "default", "--for", "vllm", *how)
    assert read_config(tmp_path / "default")["r"] <= 16
    prints("compress", adapter, tmp_path / "eight", "--for", "vllm", "--max-lora-rank", 8, *how)
    assert read_config(tmp_path / "eight")["r"] <= 8


def test_a_server_that_does_not_exist_is_refused(tmp_path, adapter):
    refuses("compress", adapter, tmp_path / "out", "--for", "tgi", "--rank", 2, code=2)
    message = refuses("compress", adapter, tmp_path / "out", "--for", "vllm", "--max-lora-rank", 24, "--rank", 2)
    assert "16, 32" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "llamacpp"])
def test_what_a_server_cannot_load_is_refused_and_nothing_is_written(tmp_path, runtime):
    adapter = make_adapter(tmp_path / "adapter", use_dora=True)
    message = refuses("compress", adapter, tmp_path / "out", "--for", runtime, "--rank", 2)
    assert "use_dora" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


# --- limits -----------------------------------------------------------------------------------------------------

LIMITS = {
    "--min-rank": (["--min-rank", 3], Limits(min_rank=3)),
    "--max-rank": (["--max-rank", 3], Limits(max_rank=3)),
    "--multiple-of": (["--multiple-of", 4], Limits(multiple_of=4)),
    "--steps": (["--steps", "2,5"], Limits(steps=(2, 5))),
    "--rank-for": (
        ["--rank-for", "q_proj=2", "--rank-for", r"layers\.0\..*=5"],
        Limits(rank_for=(("q_proj", 2), (r"layers\.0\..*", 5))),
    ),
    "--rank-for with =": (["--rank-for", "(?=.*q)q_proj=2"], Limits(rank_for=(("(?=.*q)q_proj", 2),))),
    "--equal": (["--equal", "qkv", "--equal", r"layers\.\d+"], Limits(equal=("qkv", r"layers\.\d+"))),
    "all": (
        ["--min-rank", 1, "--max-rank", 6, "--multiple-of", 2, "--equal", "qkv", "--rank-for", "down_proj=3"],
        Limits(min_rank=1, max_rank=6, multiple_of=2, equal=("qkv",), rank_for=(("down_proj", 3),)),
    ),
}


@pytest.mark.parametrize("policy", ["energy=0.8", "params=0.5", "variance=0.9"])
@pytest.mark.parametrize(("options", "limits"), LIMITS.values(), ids=LIMITS)
def test_limits_are_those_of_the_library(adapter, options, limits, policy):
    assert planned(adapter, "--policy", policy, *options) == chosen(adapter, policy, limits=limits)


@pytest.mark.parametrize(("options", "limits"), LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("how", [("--rank", 4), ("--retain", 0.9), ()], ids=str)
def test_limits_hold_however_the_rank_is_given(tmp_path, adapter, options, limits, how):
    policy = {"--rank": "fixed=4", "--retain": "variance=0.9"}.get(how[0] if how else "", "variance=0.95")
    prints("compress", adapter, tmp_path / "out", *how, *options)
    assert ranks(LLAMA, tmp_path / "out") == chosen(adapter, policy, limits=limits)


def test_by_says_which_layers_must_retain_the_variance(adapter):
    worst = planned(adapter, "--policy", "variance=0.8", "--by", "worst")
    assert worst == chosen(adapter, "variance=0.8", by="worst")
    assert worst != planned(adapter, "--policy", "variance=0.8")


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


def test_explain_tells_the_policy_and_does_nothing(tmp_path, adapter):
    text = "policy = 'size=8KB'\nruntime = 'vllm'\nmax_rank = 4\nrank_for = {q_proj = 2}"
    file = write_toml(tmp_path, adapter, text)
    before = snapshot(tmp_path)
    said = prints("run", file, "--explain")
    assert re.search(r"compress_to\s+size=8KB", said)
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
