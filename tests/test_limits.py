"""Limits hold for every policy: bounds, steps, overrides by PEFT's matching rule, equal ranks in a group."""

import numpy as np
import pytest
from peft.utils.other import get_pattern_key

from lora_squeeze import Spectrum
from lora_squeeze.errors import RankError
from lora_squeeze.limits import EQUAL, NO_LIMITS, Limits, groups
from lora_squeeze.policies import POLICIES, Cost, para_energy, para_rank, params

# --- a model with attention, experts and layers 1 and 11 --------------------------------------------------------

NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 11)
    for module in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.experts.0.up_proj",
        "mlp.experts.1.up_proj",
        "mlp.experts.10.up_proj",
    )
]


def random_spectra(*, seed=0, rank=32, short=()):
    """Every layer with its own decay and scale; the layers in `short` have rank 3 only."""
    rng = np.random.default_rng(seed)
    found = []
    for name in NAMES:
        own = 3 if name in short else rank
        values = np.sort(rng.lognormal(size=own) * rng.uniform(0.7, 0.99) ** np.arange(own))[::-1]
        shape = (int(rng.integers(40, 99)), int(rng.integers(40, 99)))
        found.append(Spectrum(name, *shape, own, tuple(map(float, values))))
    return found


def cost_of(spectra):
    sizes = {s.name: 4 * s.component_size for s in spectra}
    return Cost(sizes, lambda ranks: 1000 + sum(sizes[name] * rank for name, rank in ranks.by_layer.items()))


PER_LAYER = {
    "fixed": 5,
    "variance": 0.95,
    "energy": 0.8,
    "cumulative": 0.7,
    "sigma-ratio": 5,
    "stable-rank": 2,
    "effective-rank": 0.7,
    "optimal-threshold": 0.5,
    "knee": 0.7,
}
POOLED = {"para-rank": 0.4, "para-energy": 0.8, "params": 0.4, "size": 100_000}
VALUES = PER_LAYER | POOLED
every_policy = pytest.mark.parametrize("name", VALUES)


def plan(name, spectra, limits=NO_LIMITS, value=None):
    options = {"cost": cost_of(spectra)} if name == "size" else {}
    return POLICIES[name](spectra, value or VALUES[name], limits=limits, **options).by_layer


def test_every_policy_is_tried():
    assert set(VALUES) == set(POLICIES)


@every_policy
def test_the_ranks_without_limits_leave_something_to_limit(name):
    ranks = set(plan(name, random_spectra()).values())
    assert 4 < max(ranks) < 33
    assert min(ranks) < 16 or name == "variance"  # one rank for all


# --- bounds -----------------------------------------------------------------------------------------------------


@every_policy
@pytest.mark.parametrize("least", [0, 1, 2, 4])
def test_no_layer_is_below_the_minimum(name, least):
    spectra = random_spectra(short=NAMES[2:4])
    ranks = plan(name, spectra, Limits(min_rank=least))
    assert all(ranks[s.name] >= min(least, s.rank) for s in spectra)
    if name in PER_LAYER:
        free = plan(name, spectra)
        assert ranks == {s.name: max(free[s.name], min(least, s.rank)) for s in spectra}


@every_policy
@pytest.mark.parametrize("most", [1, 4, 7, 1000])
def test_no_layer_is_above_the_maximum(name, most):
    spectra = random_spectra(short=NAMES[2:4])
    value = 0.1 if name == "para-energy" else None  # what few components can still reach
    ranks = plan(name, spectra, Limits(max_rank=most), value)
    assert all(ranks[s.name] <= min(most, s.rank) for s in spectra)
    if name in PER_LAYER:
        assert ranks == {layer: min(rank, most) for layer, rank in plan(name, spectra).items()}


@pytest.mark.parametrize("name", PER_LAYER)
def test_a_rule_for_one_layer_keeps_one_component_unless_told_otherwise(name):
    spectra = random_spectra()
    assert min(plan(name, spectra).values()) >= 1
    assert min(plan(name, spectra, Limits(min_rank=0)).values()) >= 1


@pytest.mark.parametrize("name", POOLED)
def test_a_global_rule_leaves_layers_out_unless_told_otherwise(name):
    spectra = random_spectra()
    weak = [Spectrum(NAMES[0], 50, 50, 32, tuple(1e-6 / k for k in range(1, 33))), *spectra[1:]]
    assert plan(name, weak)[NAMES[0]] == 0
    assert plan(name, weak, Limits(min_rank=0))[NAMES[0]] == 0
    assert plan(name, weak, Limits(min_rank=2))[NAMES[0]] == 2


@pytest.mark.parametrize(("name", "value"), [("params", 0.4), ("para-rank", 0.4), ("size", 100_000)])
@pytest.mark.parametrize(
    "limits",
    [Limits(min_rank=2), Limits(max_rank=20), Limits(multiple_of=4), Limits(steps=(2, 8)), Limits(equal=("qkv",))],
    ids=str,
)
def test_a_budget_is_kept_under_any_limits(name, value, limits):
    spectra = random_spectra()
    ranks = plan(name, spectra, limits, value)
    spent = {
        "params": sum(ranks[s.name] * s.component_size for s in spectra)
        / sum(s.rank * s.component_size for s in spectra),
        "para-rank": sum(ranks.values()) / sum(s.rank for s in spectra),
        "size": 1000 + sum(4 * ranks[s.name] * s.component_size for s in spectra),
    }[name]
    assert 0.8 * value < spent <= value + (1 / 1000 if name == "para-rank" else 0)  # ⌈γ·total⌉


# --- rounding up ------------------------------------------------------------------------------------------------


def rounded_up(rank, own, steps):
    """To the smallest step that is not below; a layer's own rank is as far as it goes."""
    return min([step for step in steps if step >= rank] + [own])


@every_policy
@pytest.mark.parametrize("multiple", [1, 3, 8, 64])
def test_ranks_are_multiples_or_the_layer_s_own(name, multiple):
    spectra = random_spectra(short=NAMES[2:4])
    ranks = plan(name, spectra, Limits(multiple_of=multiple))
    assert all(ranks[s.name] % multiple == 0 or ranks[s.name] == s.rank for s in spectra)
    if name in PER_LAYER:
        free = plan(name, spectra)
        steps = range(multiple, 33, multiple)
        assert ranks == {s.name: rounded_up(free[s.name], s.rank, steps) for s in spectra}


@every_policy
@pytest.mark.parametrize("steps", [(8, 16), (16, 2, 8, 2), (5,), (64, 128)], ids=str)
def test_ranks_are_steps_or_the_layer_s_own(name, steps):
    spectra = random_spectra(short=NAMES[2:4])
    ranks = plan(name, spectra, Limits(steps=steps))
    assert all(ranks[s.name] in (0, *steps, s.rank) for s in spectra)
    if name in PER_LAYER:
        free = plan(name, spectra)
        assert ranks == {s.name: rounded_up(free[s.name], s.rank, steps) for s in spectra}


@every_policy
def test_rounding_up_stops_at_the_last_step_below_the_maximum(name):
    value = 0.1 if name == "para-energy" else None
    spectra = random_spectra()
    for limits, allowed in [
        (Limits(steps=(4, 8, 16), max_rank=12), {0, 4, 8}),
        (Limits(multiple_of=5, max_rank=12), {0, 5, 10}),
        (Limits(steps=(4, 6, 8), multiple_of=4, max_rank=12), {0, 4, 8}),
        (Limits(steps=(4, 8, 16), max_rank=12, min_rank=5), {8}),
    ]:
        if name in ("size", "para-rank", "params") and limits.min_rank:
            continue  # their budgets are not for that much
        assert set(plan(name, spectra, limits, value).values()) <= allowed


# --- overrides --------------------------------------------------------------------------------------------------

OVERRIDES = {
    "a module's name": (("q_proj", 7),),
    "a regular expression": ((r"layers\.0\..*", 7),),
    "a dot is any character": (("self.attn.q.proj", 7),),
    "the whole name": ((NAMES[0], 7),),
    "layer 1 is not layer 11": ((r"layers\.1\..*", 7),),
    "alternatives": (("q_proj|k_proj", 7),),
    "anchored": ((r"^model\.layers\.1\..*", 7),),
    "the first match decides": (("q_proj", 7), (r"layers\.0\..*", 9), (".*", 2)),
    "the first match decides, turned round": ((r"layers\.0\..*", 9), ("q_proj", 7), (".*", 2)),
    "more than there is": (("q_proj", 500),),
    "left out": (("o_proj", 0), ("q_proj", 1)),
}


@every_policy
@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES)
def test_overridden_ranks_follow_the_matching_rule_of_peft(name, overrides):
    spectra = random_spectra(short=NAMES[2:4])
    value = 0.05 if name == "para-energy" else 200_000 if name == "size" else None
    ranks = plan(name, spectra, Limits(rank_for=overrides), value)
    patterns = dict(overrides)
    matched = {s.name: get_pattern_key(list(patterns), s.name) for s in spectra}
    assert any(key in patterns for key in matched.values())
    for s in spectra:
        if matched[s.name] in patterns:
            assert ranks[s.name] == min(patterns[matched[s.name]], s.rank)
    if name in PER_LAYER:
        free = plan(name, spectra)
        assert all(ranks[layer] == free[layer] for layer, key in matched.items() if key not in patterns)


@every_policy
def test_an_override_is_not_rounded_and_not_bounded_below(name):
    limits = Limits(rank_for=((r"layers\.0\..*q_proj", 3), (r"layers\.1\..*q_proj", 0)), multiple_of=8, min_rank=1)
    value = {"params": 0.5, "size": 200_000, "para-energy": 0.3}.get(name)
    ranks = plan(name, random_spectra(), limits, value)
    assert ranks["model.layers.0.self_attn.q_proj"] == 3
    assert ranks["model.layers.1.self_attn.q_proj"] == 0
    assert ranks["model.layers.11.self_attn.q_proj"] % 8 == 0


def test_part_of_a_name_matches_nothing():
    for pattern in ("proj", "q_pro", "elf_attn.q_proj", "layers.0", "base_model.model.model.layers.0.self_attn.q_proj"):
        with pytest.raises(RankError, match="matches no layer"):
            groups(random_spectra(), Limits(rank_for=((pattern, 4),)))


# --- equal ranks ------------------------------------------------------------------------------------------------


def layer_of(name):
    return name.split(".")[2]


GROUPS = {
    "qkv": lambda name: (layer_of(name), "qkv") if name[-6:-5] in "qkv" and "self_attn" in name else name,
    "experts": lambda name: (layer_of(name), "experts") if "experts" in name else name,
    r"layers\.\d+": lambda name: name.partition(layer_of(name))[2],
    "(up|o)_proj": lambda name: name.rpartition(".")[0] + "." + name.rpartition(".")[2].replace("o_proj", "up_proj"),
    ".+": lambda name: "all",
}


@every_policy
@pytest.mark.parametrize("equal", [*((one,) for one in GROUPS), ("qkv", "experts")], ids=str)
def test_layers_of_a_group_get_the_same_rank_and_others_their_own(name, equal):
    spectra = random_spectra()
    ranks = plan(name, spectra, Limits(equal=equal))
    together: dict[object, set[str]] = {}
    for layer in NAMES:
        key = layer
        for one in equal:
            key = GROUPS[one](layer) if key == layer else key
        together.setdefault(key, set()).add(layer)
    assert len(together) <= len(NAMES)
    for members in together.values():
        assert len({ranks[layer] for layer in members}) == 1
    if name in PER_LAYER:
        free = plan(name, spectra)
        for members in together.values():
            assert {ranks[layer] for layer in members} == {max(free[layer] for layer in members)}
    elif len(together) > 3:
        assert len(set(ranks.values())) > 1


@pytest.mark.parametrize(
    ("equal", "together"),
    [
        ("qkv", ["h.0.attn.q", "h.0.attn.k", "h.0.attn.v"]),
        ("qkv", ["bert.0.self.query", "bert.0.self.key", "bert.0.self.value"]),
        ("qkv", ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_v"]),
        ("qkv", ["a.0.q_lin", "a.0.k_lin", "a.0.v_lin"]),
        ("qkv", ["blocks.0.attn.add_q_proj", "blocks.0.attn.add_k_proj", "blocks.0.attn.add_v_proj"]),
        ("qkv", [f"lora_unet_mid_block_attentions_0_attn1_to_{one}" for one in "qkv"]),
        ("qkv", [f"lora_te_text_model_encoder_layers_0_self_attn_{one}_proj" for one in "qkv"]),
        ("qkv", [f"lora_te3_encoder_block_0_layer_0_SelfAttention_{one}" for one in "qkv"]),
        ("experts", [f"lora_unet_mlp_experts_{one}_gate_proj" for one in (0, 1, 10)]),
        ("experts", ["mlp.experts.0.gate_proj", "mlp.experts.1.gate_proj", "mlp.experts.10.gate_proj"]),
    ],
    ids=str,
)
def test_named_groups_know_the_usual_names(equal, together):
    others = ["bert.0.output.dense", "blocks.0.attn1.to_out", "mlp.shared_expert.gate_proj", "kv_cache", "embed_tokens"]
    spectra = [Spectrum(name, 8, 8, 4, (4.0, 3.0, 2.0, 1.0)) for name in (*together, *others)]
    members = [group.members for group in groups(spectra, Limits(equal=(equal,)))]
    assert members == [(0, 1, 2), (3,), (4,), (5,), (6,), (7,)]


def test_a_group_s_layers_of_lower_rank_keep_all_they_have():
    spectra = random_spectra(short=["model.layers.0.self_attn.v_proj"])
    ranks = plan("fixed", spectra, Limits(equal=("qkv",)), 9)
    assert ranks["model.layers.0.self_attn.q_proj"] == ranks["model.layers.0.self_attn.k_proj"] == 9
    assert ranks["model.layers.0.self_attn.v_proj"] == 3


@every_policy
def test_an_override_of_one_layer_holds_for_its_group(name):
    limits = Limits(equal=("qkv",), rank_for=((r"layers\.1\..*k_proj", 6),))
    ranks = plan(name, random_spectra(), limits)
    assert {ranks[f"model.layers.1.self_attn.{one}_proj"] for one in "qkv"} == {6}


@every_policy
def test_groups_and_steps_go_together(name):
    ranks = plan(
        name, random_spectra(), Limits(equal=("qkv", "experts"), steps=(4, 8, 16)), 0.6 if name == "params" else None
    )
    assert set(ranks.values()) <= {0, 4, 8, 16, 32}
    assert len({ranks[f"model.layers.1.self_attn.{one}_proj"] for one in "qkv"}) == 1


def test_the_names_of_groups_are_regular_expressions_too():
    spectra = random_spectra()
    for name, pattern in EQUAL.items():
        assert groups(spectra, Limits(equal=(name,))) == groups(spectra, Limits(equal=(pattern,)))


# --- what contradicts itself ------------------------------------------------------------------------------------

CONTRADICTIONS = {
    "min above max": (Limits(min_rank=9, max_rank=8), "min_rank 9 is above max_rank 8"),
    "negative min": (Limits(min_rank=-1), "min_rank -1"),
    "negative max": (Limits(max_rank=-4), "max_rank -4"),
    "max of 0": (Limits(max_rank=0), "max_rank 0"),
    "multiple of 0": (Limits(multiple_of=0), "multiple_of 0"),
    "negative multiple": (Limits(multiple_of=-8), "multiple_of -8"),
    "multiple above max": (Limits(multiple_of=8, max_rank=7), "multiple_of 8 is above max_rank 7"),
    "no multiple between": (Limits(multiple_of=8, min_rank=10, max_rank=12), "multiple_of 8"),
    "a step of 0": (Limits(steps=(0, 8)), "step 0"),
    "a negative step": (Limits(steps=(8, -8)), "step -8"),
    "steps above max": (Limits(steps=(16, 32), max_rank=8), "steps"),
    "no step between": (Limits(steps=(4, 16), min_rank=5, max_rank=15), r"\[4, 16\]"),
    "no step is a multiple": (Limits(steps=(6, 10), multiple_of=4), "multiple_of 4"),
    "override above max": (Limits(rank_for=(("q_proj", 9),), max_rank=8), "q_proj=9"),
    "negative override": (Limits(rank_for=(("q_proj", -1),)), "q_proj=-1"),
    "override of nothing": (Limits(rank_for=(("q_proj", 4), ("gate_proj", 4))), "'gate_proj' matches no layer"),
    "override that is no pattern": (Limits(rank_for=(("q_proj[", 4),)), r"'q_proj\['"),
    "override with a flag inside": (Limits(rank_for=(("(?i)Q_PROJ", 4),)), r"\(\?i\)Q_PROJ"),
    "group of nothing": (Limits(equal=("to_q",)), "'to_q' matches no layer"),
    "group that is no pattern": (Limits(equal=("(q|k",)), r"'\(q\|k'"),
    "overrides that differ in a group": (
        Limits(equal=("qkv",), rank_for=(("q_proj", 8), ("k_proj", 4))),
        "same rank",
    ),
}


@pytest.mark.parametrize("name", ["fixed", "energy", "params"])
@pytest.mark.parametrize(("limits", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_named(name, limits, message):
    with pytest.raises(RankError, match=message):
        plan(name, random_spectra(), limits)


@pytest.mark.parametrize("limits", [Limits(rank_for=(("nothing", 4),)), Limits(equal=("nothing",))], ids=str)
def test_a_pattern_that_matches_nothing_is_shown_a_name_that_exists(limits):
    with pytest.raises(RankError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        plan("energy", random_spectra(), limits)


@pytest.mark.parametrize("first", [".*_proj", "q_proj"])
def test_a_pattern_that_never_decides_is_an_error_that_does_not_say_it_matches_nothing(first):
    limits = Limits(rank_for=((first, 4), ("q_proj", 8)))
    with pytest.raises(RankError, match="q_proj") as caught:
        plan("energy", random_spectra(), limits)
    assert "matches no layer" not in str(caught.value)


@every_policy
def test_overrides_that_leave_nothing_are_refused(name):
    with pytest.raises(RankError):
        plan(name, random_spectra(), Limits(rank_for=((".*", 0),)))


@pytest.mark.parametrize(("policy", "value"), [(params, 0.1), (para_rank, 0.1)])
def test_a_minimum_that_the_budget_cannot_pay_is_named(policy, value):
    spectra = [Spectrum(name, 8, 8, 8, tuple(range(8, 0, -1))) for name in "ab"]
    smallest = {params: 2 * 4 * 16, para_rank: 2 * 4}[policy]
    with pytest.raises(RankError, match=rf"\b{smallest}\b"):
        policy(spectra, value, limits=Limits(min_rank=4))


def test_energy_that_the_maximum_does_not_allow_is_answered_with_what_it_does_allow():
    spectra = [Spectrum(name, 8, 8, 5, (1.0,) * 5) for name in "ab"]
    limits = Limits(max_rank=4)
    assert para_energy(spectra, 0.8, limits=limits).by_layer == {"a": 4, "b": 4}
    with pytest.raises(RankError, match=r"0\.8|80"):
        para_energy(spectra, 0.9, limits=limits)
