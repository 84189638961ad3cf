"""plan, compare, check, and the options of compress and run that choose ranks: what they print, write and refuse."""

import json
import re
from pathlib import Path

import pytest
from adapters import (
    LLAMA,
    WEIGHTS,
    make_adapter,
    ranks,
    read_config,
    relative,
    snapshot,
    truncation,
    updates,
)
from commands import invoke, prints, refuses, write_plan

from lora_squeeze import Ranks, decompose, open_adapter
from lora_squeeze.comparison import compare_policies
from lora_squeeze.compression import file_cost
from lora_squeeze.limits import Limits
from lora_squeeze.policies import POLICIES
from lora_squeeze.records import outcomes_to_json
from lora_squeeze.verbs import choose_ranks, outcome


@pytest.fixture
def adapter(tmp_path) -> Path:
    return make_adapter(tmp_path / "adapter", alpha_pattern={"v_proj": 5})


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
    file.write_text(json.dumps(plan))

    text = prints("compress", adapter, tmp_path / "out", "--ranks", file)

    assert "fixed=4, edited by hand" in text
    assert "fixed=4, edited by hand, by" in prints("verify", tmp_path / "out", adapter)
    assert ranks(LLAMA, tmp_path / "out") == {deepened: 7} | dict.fromkeys(others, 4)
    before, after = updates(LLAMA, adapter), updates(LLAMA, tmp_path / "out")
    for name, rank in ranks(LLAMA, tmp_path / "out").items():
        assert relative(after[name], truncation(before[name], rank)) <= 1e-5


def test_a_plan_has_one_policy(adapter):
    message = refuses("plan", adapter, "--policy", "energy=0.9", "--policy", "energy=0.8", code=2)
    assert "one --policy" in message


@pytest.mark.parametrize("place", ["adapter/adapter_config.json/ranks.json", "."])
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


def test_compare_names_the_policies_that_cannot_go_so_low(adapter):
    text = prints("compare", adapter, "--params", "0.01,0.5")
    low, half = text.split("At most 50.00%")
    assert "At most 1.00% of the parameters\nCannot go so low: fixed, variance," in low
    assert "Cannot" not in half


def test_several_policies_as_json_are_a_list_of_records(tmp_path, adapter):
    options = ("--policy", "fixed=2", "--policy", "fixed=4", "--json")
    records = json.loads(prints("compress", adapter, tmp_path / "out", *options))
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


def test_the_recorded_policy_has_every_digit_of_retain(tmp_path, adapter):
    record = json.loads(prints("compress", adapter, tmp_path / "out", "--retain", "0.9999999", "--json"))
    assert record["policy"] == "variance=0.9999999"


def test_by_says_which_layers_must_retain_the_variance(adapter):
    worst = planned(adapter, "--policy", "variance=0.8", "--by", "worst")
    assert worst == chosen(adapter, "variance=0.8", by="worst")
    assert worst != planned(adapter, "--policy", "variance=0.8")
