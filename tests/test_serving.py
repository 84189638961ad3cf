"""Which runtimes load an adapter: what check says, against the loaders' own rules; caps and refusals."""

import pytest
from adapters import (
    BERT,
    LLAMA,
    WEIGHTS,
    edit_config,
    make_adapter,
    updates,
)
from loaders import LOADERS, NotLoadedError, as_sglang, every_loader, same_updates
from safetensors.torch import load_file

from lora_squeeze import Ranks, decompose, open_adapter, squeeze
from lora_squeeze.errors import RankError, UnsupportedAdapter
from lora_squeeze.limits import Limits
from lora_squeeze.policies import POLICIES
from lora_squeeze.serving import RUNTIMES, check, limits_for, rank_cap
from lora_squeeze.settings import CHOICES
from lora_squeeze.verbs import choose_ranks

# --- the table --------------------------------------------------------------------------------------------------


def test_every_runtime_names_its_source():
    for name, runtime in RUNTIMES.items():
        assert runtime.name == name
        assert ".py" in runtime.source
        assert all(len(why) > 10 for why in runtime.refuses.values())


def test_the_command_line_and_toml_know_the_same_runtimes():
    assert CHOICES["runtime"] == ("", *RUNTIMES)
    assert set(LOADERS) | {"peft", "diffusers", "comfyui"} == set(RUNTIMES)  # these two: test_kohya_format.py


# --- check ------------------------------------------------------------------------------------------------------

EVEN = {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 8}}  # another rank, the same scale
LOADED = {
    "plain": (LLAMA, {}, {"peft", "vllm", "sglang", "llamacpp"}),
    "regex": (LLAMA, {"target_modules": r".*\.(q|v)_proj"}, {"peft", "vllm", "llamacpp"}),
    "mixed ranks, one scale": (LLAMA, EVEN, {"peft", "vllm"}),
    "rslora": (LLAMA, {"use_rslora": True}, {"peft", "vllm"}),
    "differing scales": (LLAMA, {"alpha_pattern": {"v_proj": 3}}, {"peft"}),
    "differing ranks": (LLAMA, {"rank_pattern": {"v_proj": 4}}, {"peft", "llamacpp"}),
    "one scale, but not the one of r and lora_alpha": (
        LLAMA,
        {"alpha_pattern": {"q_proj": 3, "v_proj": 3, "down_proj": 3}},
        {"peft"},
    ),
    "one rank, but not r": (LLAMA, {"rank_pattern": {"q_proj": 4, "v_proj": 4, "down_proj": 4}}, {"peft", "llamacpp"}),
    "one rank and scale, but not r": (
        LLAMA,
        {
            "rank_pattern": {"q_proj": 4, "v_proj": 4, "down_proj": 4},
            "alpha_pattern": {"q_proj": 8, "v_proj": 8, "down_proj": 8},
        },
        {"peft", "vllm"},
    ),
    "dora": (LLAMA, {"use_dora": True}, {"peft"}),
    "modules_to_save": (BERT, {"modules_to_save": ["classifier"]}, {"peft"}),
    "lora_bias": (BERT, {"lora_bias": True, "task_type": None}, {"peft"}),
    "biases": (BERT, {"bias": "lora_only", "task_type": None}, {"peft"}),
    "trainable tokens": (LLAMA, {"trainable_token_indices": [1, 5]}, {"peft"}),
    "rank above the cap": (LLAMA, {"r": 24}, {"peft", "sglang", "llamacpp"}),
}


@pytest.mark.parametrize(("base", "lora", "loaded_by"), LOADED.values(), ids=LOADED)
def test_check_says_which_runtimes_load_an_adapter(tmp_path, base, lora, loaded_by):
    adapter = open_adapter(make_adapter(tmp_path / "adapter", base, **lora))
    found = {runtime for runtime in RUNTIMES if not check(adapter, runtime)}
    assert found - {"sglang"} == loaded_by - {"sglang"}
    if not isinstance(adapter.config["target_modules"], str):  # whether SGLang reads those depends on how it is started
        assert found == loaded_by


@every_loader
@pytest.mark.parametrize(("base", "lora"), [case[:2] for case in LOADED.values()], ids=LOADED)
def test_check_finds_a_problem_exactly_where_the_loader_would_not_apply_the_update(tmp_path, base, lora, runtime):
    folder = make_adapter(tmp_path / "adapter", base, **lora)
    try:
        applied = same_updates(LOADERS[runtime](folder), updates(base, folder))
    except NotLoadedError:
        applied = False
    assert (not check(open_adapter(folder), runtime)) == applied


def test_patterns_that_match_nothing_are_rejected_by_sglang_alone(tmp_path):
    folder = make_adapter(tmp_path / "adapter")
    edit_config(folder, rank_pattern={"k_proj": 4})
    with pytest.raises(NotLoadedError):
        as_sglang(folder)
    assert [bool(check(open_adapter(folder), runtime)) for runtime in ("vllm", "sglang", "llamacpp")] == [
        False,
        True,
        False,
    ]


FRAGMENTS = {
    ("dora", "vllm"): "use_dora",
    ("dora", "sglang"): "use_dora",
    ("dora", "llamacpp"): "use_dora",
    ("modules_to_save", "vllm"): "modules_to_save",
    ("lora_bias", "sglang"): "lora_bias",
    ("biases", "vllm"): "bias",
    ("trainable tokens", "vllm"): "trainable_token_indices",
    ("trainable tokens", "llamacpp"): "trainable_tokens_delta",
    ("rslora", "sglang"): "use_rslora",
    ("rslora", "llamacpp"): "use_rslora",
    ("mixed ranks, one scale", "sglang"): r"rank.*4 to 8",
    ("differing scales", "vllm"): "scale",
    ("rank above the cap", "vllm"): "rank 24 .* max_lora_rank 16",
}


@pytest.mark.parametrize(("case", "runtime"), FRAGMENTS, ids=str)
def test_a_problem_says_what_and_what_to_do(tmp_path, case, runtime):
    base, lora, _ = LOADED[case]
    problems = check(open_adapter(make_adapter(tmp_path / "adapter", base, **lora)), runtime)
    assert len(problems) == 1
    assert problems[0].what_to_do
    with pytest.raises(AssertionError, match=FRAGMENTS[case, runtime]):
        raise AssertionError(problems[0].what)


def test_all_problems_are_found_at_once(tmp_path):
    folder = make_adapter(tmp_path / "adapter", r=24, use_rslora=True, alpha_pattern={"v_proj": 3}, use_dora=True)
    whats = " / ".join(problem.what for problem in check(open_adapter(folder), "vllm"))
    assert all(part in whats for part in ("use_dora", "rank 24", "scale"))


@pytest.mark.parametrize("scale", [1e6 / 3, 1 / 3, 1e-9 / 3])
def test_scales_are_compared_whatever_their_size(tmp_path, scale):
    """alpha / r differs in its last digits from layer to layer, which is no other scale; half of it is."""
    ranks = {"q_proj": 7, "v_proj": 3}
    same = {"alpha_pattern": {name: scale * rank for name, rank in ranks.items()}}
    folder = make_adapter(tmp_path / "same", rank_pattern=ranks, lora_alpha=scale * 8, **same)
    assert check(open_adapter(folder), "vllm") == []
    folder = make_adapter(tmp_path / "other", lora_alpha=scale * 8, alpha_pattern={"v_proj": scale * 4})
    assert [problem.what for problem in check(open_adapter(folder), "vllm")] != []


# --- caps -------------------------------------------------------------------------------------------------------


def test_caps_are_those_of_the_runtime():
    assert rank_cap("vllm", None) == 16
    assert rank_cap("vllm", 64) == 64
    assert [rank_cap(runtime, None) for runtime in ("peft", "sglang", "llamacpp")] == [None] * 3
    assert rank_cap("sglang", 24) == 24


@pytest.mark.parametrize("cap", [0, -1, 17, 24, 1024])
def test_a_cap_that_vllm_does_not_know_names_those_it_knows(cap):
    with pytest.raises(RankError, match=rf"{cap} .*1, 8, 16, 32, 64, 128, 256, 320, 512"):
        rank_cap("vllm", cap)


@pytest.mark.parametrize("runtime", ["peft", "sglang", "llamacpp"])
def test_a_cap_is_at_least_1(runtime):
    with pytest.raises(RankError, match="max_lora_rank 0"):
        rank_cap(runtime, 0)


def test_a_rank_up_to_the_cap_is_loaded(tmp_path):
    adapter = open_adapter(make_adapter(tmp_path / "adapter", r=24))
    assert check(adapter, "vllm", max_lora_rank=32) == []
    assert check(adapter, "sglang", max_lora_rank=24) == []
    assert "max_lora_rank 16" in check(adapter, "sglang", max_lora_rank=16)[0].what
    with pytest.raises(RankError, match="max_lora_rank 24"):
        check(adapter, "vllm", max_lora_rank=24)


VALUES = {
    "fixed": 20,
    "variance": 0.999,
    "energy": 0.999,
    "cumulative": 0.99,
    "sigma-ratio": 1000,
    "stable-rank": 9,
    "effective-rank": 3,
    "optimal-threshold": 0.01,
    "knee": 4,
    "para-rank": 0.5,
    "para-energy": 0.999,
    "params": 0.5,
    "size": 30_000,
}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """An adapter of rank 24 with layers of rank 3, of other scales, as rsLoRA."""
    folder = make_adapter(
        tmp_path_factory.mktemp("deep") / "adapter",
        r=24,
        use_rslora=True,
        rank_pattern={"0.self_attn.v_proj": 3},
        alpha_pattern={"q_proj": 5},
    )
    return decompose(open_adapter(folder))


@pytest.mark.parametrize("name", VALUES)
def test_every_policy_respects_the_cap(deep, name):
    assert set(VALUES) == set(POLICIES)
    policy = f"{name}={VALUES[name]}"
    assert choose_ranks(deep, policy).largest > 8
    assert choose_ranks(deep, policy, runtime="vllm").largest <= 16
    assert choose_ranks(deep, policy, runtime="vllm", max_lora_rank=32).largest > 8
    below = f"{name}={0.5 if name == 'para-energy' else VALUES[name]}"  # what rank 8 can still reach
    assert choose_ranks(deep, below, runtime="vllm", max_lora_rank=8).largest <= 8
    assert choose_ranks(deep, policy, runtime="vllm", limits=Limits(max_rank=12)).largest <= 12


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("runtime", ["sglang", "llamacpp"])
def test_every_policy_chooses_one_rank_where_they_may_not_differ(deep, name, runtime):
    plan = choose_ranks(deep, f"{name}={VALUES[name]}", runtime=runtime)
    own = {s.name: s.rank for s in deep.spectra}
    assert plan.by_layer == {layer: min(plan.largest, rank) for layer, rank in own.items()}


@pytest.mark.parametrize("runtime", ["sglang", "llamacpp"])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_a_budget_of_parameters_holds_for_the_padded_file(tmp_path, deep, runtime, fraction):
    plan = choose_ranks(deep, f"params={fraction}", runtime=runtime)
    compression = squeeze(deep, plan, tmp_path / "out", runtime=runtime)
    written = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / WEIGHTS).values())
    assert compression.parameters_after == written <= fraction * compression.parameters_before


@pytest.mark.parametrize("runtime", ["", "sglang", "llamacpp"])
def test_a_fraction_of_less_than_one_parameter_is_no_number_of_parameters(deep, runtime):
    with pytest.raises(RankError, match="params=1e-06 is not possible"):
        choose_ranks(deep, "params=0.000001", runtime=runtime, limits=Limits(min_rank=1))


def test_limits_that_contradict_the_cap_are_refused(deep):
    for limits in (Limits(min_rank=20), Limits(rank_for=(("q_proj", 20),)), Limits(steps=(24, 32))):
        with pytest.raises(RankError, match="16"):
            choose_ranks(deep, "energy=0.9", runtime="vllm", limits=limits)


@pytest.mark.parametrize("runtime", ["sglang", "llamacpp"])
def test_a_rank_of_their_own_is_refused_where_ranks_may_not_differ(deep, runtime):
    with pytest.raises(RankError, match=rf"rank_for 'q_proj=2': {runtime} has one rank for all"):
        choose_ranks(deep, "energy=0.9", runtime=runtime, limits=Limits(rank_for=(("q_proj", 2),)))


@pytest.mark.parametrize("equal", [(), ("qkv",)], ids=str)
def test_layers_may_be_left_out_where_ranks_may_not_differ(deep, equal):
    limits = Limits(rank_for=(("down_proj", 0),), equal=equal)
    plan = choose_ranks(deep, "energy=0.9", runtime="sglang", limits=limits)
    left_out = {name for name, rank in plan.by_layer.items() if rank == 0}
    assert left_out == {name for name in plan.by_layer if name.endswith("down_proj")} != set()
    assert len(set(plan.by_layer.values())) == 2


def test_one_group_for_all_may_be_asked_for_where_a_runtime_does(deep):
    asked = choose_ranks(deep, "energy=0.9", runtime="sglang", limits=Limits(equal=(".+",)))
    assert asked == choose_ranks(deep, "energy=0.9", runtime="sglang")


def test_peft_needs_no_limits():
    limits = Limits(min_rank=2, multiple_of=4)
    assert limits_for("peft", limits) == limits


# --- refusals ---------------------------------------------------------------------------------------------------

UNLOADABLE = ["dora", "modules_to_save", "lora_bias", "biases", "trainable tokens"]


@every_loader
@pytest.mark.parametrize("case", UNLOADABLE)
def test_what_squeezing_cannot_mend_is_refused_and_nothing_is_written(tmp_path, runtime, case):
    base, lora, _ = LOADED[case]
    adapter = open_adapter(make_adapter(tmp_path / "adapter", base, **lora))
    with pytest.raises(UnsupportedAdapter, match=runtime):
        squeeze(adapter, Ranks("fixed=2", dict.fromkeys(adapter.layers, 2)), tmp_path / "out", runtime=runtime)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@every_loader
def test_a_refusal_names_all_reasons(tmp_path, runtime):
    folder = make_adapter(tmp_path / "adapter", BERT, modules_to_save=["classifier"], lora_bias=True)
    edit_config(folder, use_dora=True)
    adapter = open_adapter(folder)
    with pytest.raises(UnsupportedAdapter) as caught:
        squeeze(adapter, Ranks("fixed=2", dict.fromkeys(adapter.layers, 2)), tmp_path / "out", runtime=runtime)
    assert all(field in str(caught.value) for field in ("use_dora", "modules_to_save", "lora_bias", str(folder)))


@pytest.mark.parametrize(("runtime", "cap"), [("vllm", None), ("vllm", 8), ("sglang", 16), ("llamacpp", 4)])
def test_a_plan_above_the_cap_is_refused(tmp_path, deep, runtime, cap):
    plan = Ranks("by hand", {s.name: min(s.rank, 20) for s in deep.spectra})
    with pytest.raises(UnsupportedAdapter, match=rf"rank 20 .*max_lora_rank {cap or 16}"):
        squeeze(deep, plan, tmp_path / "out", runtime=runtime, max_lora_rank=cap)
    assert not (tmp_path / "out").exists()
