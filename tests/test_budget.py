"""Budgets: never above, within one component of the best there is, and exact to the byte of the file."""

import itertools
import math
import random
import re

import pytest
import torch
from adapters import BERT, LLAMA, WEIGHTS, make_adapter, pair, write_raw
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_squeeze import Ranks, Spectrum, decompose, open_adapter, squeeze
from lora_squeeze.compression import file_cost
from lora_squeeze.errors import RankError
from lora_squeeze.limits import NO_LIMITS, Limits
from lora_squeeze.policies import para_energy, para_rank, params, parse_policy, size
from lora_squeeze.verbs import choose_ranks

# --- all rank tuples of small cases -----------------------------------------------------------------------------


def spectrum(name, values, *, out=8, inner=8, rank=None):
    return Spectrum(name, out, inner, rank or len(values), tuple(map(float, values)))


@st.composite
def small_spectra(draw, layers=3, largest=4, equal_ranks=False):
    """A few small layers: ties, zeros, very different scales, and ranks above what the shape allows."""
    value = st.one_of(st.integers(0, 4), st.floats(1e-3, 1e3))
    common = draw(st.integers(1, largest))
    found = []
    for place in range(draw(st.integers(1, layers))):
        out, inner = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        rank = common if equal_ranks else draw(st.integers(1, largest))
        count = min(rank, out, inner)
        values = sorted(draw(st.lists(value, min_size=count, max_size=count)), reverse=True)
        found.append(spectrum(f"layers.{place}.proj", values, out=out, inner=inner, rank=rank))
    assume(any(s.energy > 0 for s in found))
    return found


def allowed_ranks(rank, *, least=0, most=None, multiple=1, steps=()):
    """The ranks that a layer of this rank may get, one condition after the other."""
    top = min(rank, most or rank)
    least = min(least, top)
    good = {k for k in range(1, top + 1) if k % multiple == 0 and (not steps or k in steps)}
    good |= {rank} if rank <= top else set()  # rounding up stops at the layer's own rank
    return sorted({k for k in good if k >= least} | ({0} if least == 0 else set()))


def energy_of(spectra, ranks):
    return sum(sum(value**2 for value in s.singular_values[:rank]) for s, rank in zip(spectra, ranks, strict=True))


def cost_of(spectra, ranks):
    return sum(rank * (s.out_features + s.in_features) for s, rank in zip(spectra, ranks, strict=True))


def best_energy(spectra, possible, budget):
    """The optimum by trying everything; None if nothing but an empty adapter fits."""
    fitting = [ranks for ranks in possible if any(ranks) and cost_of(spectra, ranks) <= budget]
    return max((energy_of(spectra, ranks) for ranks in fitting), default=None)


def hull(points):
    """Those (cost, energy) points that no chord between two others passes above."""
    return [
        (cost, energy)
        for cost, energy in points
        if not any(
            a < cost < b and low + (high - low) * (cost - a) / (b - a) > energy + 1e-9 * high
            for (a, low), (b, high) in itertools.combinations(points, 2)
        )
    ]


def largest_step(possible_of_group):
    """The most that one step of a group gains: one component, if all ranks are allowed and its layers' ranks equal.

    Where ranks are not allowed, or a layer of lower rank makes further components cheaper, several go together.
    """
    steps = [0.0]
    for members, allowed in possible_of_group:
        tuples = [[min(rank, s.rank) for s in members] for rank in allowed]
        corners = hull([(cost_of(members, ranks), energy_of(members, ranks)) for ranks in tuples])
        steps += [high - low for (_, low), (_, high) in itertools.pairwise(corners)]
    return max(steps)


def check_against_everything(spectra, possible, possible_of_group, budget, limits):
    """`params` stays within the budget and within one step of the best of all `possible` rank tuples."""
    possible = list(possible)
    best = best_energy(spectra, possible, budget)
    if best is None:
        with pytest.raises(RankError):
            params(spectra, budget, limits=limits)
        return None
    plan = params(spectra, budget, limits=limits)
    ranks = [plan.by_layer[s.name] for s in spectra]
    assert cost_of(spectra, ranks) <= budget
    assert energy_of(spectra, ranks) >= best * (1 - 1e-12) - largest_step(possible_of_group)
    return ranks


@given(small_spectra(), st.floats(0.01, 1))
@settings(deadline=None, max_examples=150)
def test_params_is_within_one_component_of_the_optimum(spectra, fraction):
    budget = max(2, math.floor(fraction * cost_of(spectra, [s.rank for s in spectra])))
    every = [list(range(s.rank + 1)) for s in spectra]
    ranks = check_against_everything(
        spectra,
        itertools.product(*every),
        [([s], allowed) for s, allowed in zip(spectra, every, strict=True)],
        budget,
        Limits(),
    )
    if ranks is not None:
        components = [value**2 for s in spectra for value in s.singular_values]
        best = best_energy(spectra, itertools.product(*every), budget)
        assert energy_of(spectra, ranks) >= best * (1 - 1e-12) - max(components)


@given(
    small_spectra(largest=8),
    st.floats(0.05, 1),
    st.integers(0, 3),
    st.sampled_from([None, 3, 4, 6]),
    st.sampled_from([(1, ()), (2, ()), (3, ()), (1, (1, 4, 6)), (1, (3,)), (2, (2, 4, 8))]),
)
@settings(deadline=None, max_examples=150)
def test_params_with_limits_is_within_one_step_of_the_best_allowed(spectra, fraction, least, most, rounding):
    multiple, steps = rounding
    budget = max(2, math.floor(fraction * cost_of(spectra, [s.rank for s in spectra])))
    every = [allowed_ranks(s.rank, least=least, most=most, multiple=multiple, steps=steps) for s in spectra]
    assume(all(every))
    limits = Limits(min_rank=least, max_rank=most, multiple_of=multiple, steps=steps)
    ranks = check_against_everything(
        spectra,
        itertools.product(*every),
        [([s], allowed) for s, allowed in zip(spectra, every, strict=True)],
        budget,
        limits,
    )
    if ranks is not None:
        assert all(rank in allowed for rank, allowed in zip(ranks, every, strict=True))


def grouped(spectra):
    """Layers 0 and 1 get the same rank, layer 2 its own."""
    limits = Limits(equal=(r"layers\.[01]\.",))
    groups = [group for group in (spectra[:2], spectra[2:]) if group]
    allowed = [list(range(max(s.rank for s in group) + 1)) for group in groups]
    possible = (
        [min(rank, s.rank) for rank, group in zip(ranks, groups, strict=True) for s in group]
        for ranks in itertools.product(*allowed)
    )
    return possible, list(zip(groups, allowed, strict=True)), limits


@given(small_spectra(equal_ranks=True), st.floats(0.05, 1))
@settings(deadline=None, max_examples=100)
def test_params_with_equal_ranks_in_a_group_is_within_one_step_of_the_best(spectra, fraction):
    budget = max(2, math.floor(fraction * cost_of(spectra, [s.rank for s in spectra])))
    ranks = check_against_everything(spectra, *grouped(spectra)[:2], budget, grouped(spectra)[2])
    if ranks is not None:
        assert len(set(ranks[:2])) == 1


@given(small_spectra(), st.floats(0.05, 1))
@settings(deadline=None, max_examples=100)
def test_a_group_costs_what_its_layers_really_cost(spectra, fraction):
    """Also where a layer's own rank is lower than the rank that its group gets."""
    budget = max(2, math.floor(fraction * cost_of(spectra, [s.rank for s in spectra])))
    ranks = check_against_everything(spectra, *grouped(spectra)[:2], budget, grouped(spectra)[2])
    if ranks is not None:
        assert len({min(rank, min(s.rank for s in spectra[:2])) for rank in ranks[:2]}) == 1


@pytest.mark.parametrize(
    "limits", [Limits(), Limits(equal=(".+",)), Limits(multiple_of=3), Limits(min_rank=2)], ids=str
)
def test_the_whole_budget_keeps_everything(limits):
    spectra = [spectrum("a", [3, 2]), spectrum("b", [5, 4, 3, 2, 1, 0.5, 0.2, 0.1])]
    assert params(spectra, 1.0, limits=limits).by_layer == {"a": 2, "b": 8}


def test_equal_singular_values_are_taken_one_step_at_a_time():
    flat = [spectrum("a", [1] * 8)]
    assert params(flat, 0.5).by_layer == {"a": 4}
    assert params(flat, 0.5, limits=Limits(multiple_of=2)).by_layer == {"a": 4}
    two = [spectrum("a", [1] * 8), spectrum("b", [1] * 8)]
    assert params(two, 0.5, limits=Limits(equal=(".+",))).by_layer == {"a": 4, "b": 4}


@pytest.mark.parametrize("limits", [Limits(min_rank=1, multiple_of=2), Limits(min_rank=2), Limits(min_rank=1)], ids=str)
def test_components_without_energy_are_no_reason_to_exceed_the_budget(limits):
    spectra = [spectrum("a", [1, 0], out=2, inner=2, rank=4), spectrum("b", [2, 0, 0, 0], out=2, inner=2)]
    assert cost_of(spectra, params(spectra, 0.5, limits=limits).by_layer.values()) <= 16


def test_a_layer_that_does_nothing_costs_nothing_while_others_need_the_budget():
    spectra = [spectrum("a", [0, 0, 0]), spectrum("b", [3, 2, 1])]
    assert params(spectra, 0.5).by_layer == {"a": 0, "b": 3}


@pytest.mark.parametrize("policy", [params, para_rank])
def test_an_adapter_of_zeros_stays_within_its_budget(policy):
    zeros = [spectrum("a", [0] * 4), spectrum("b", [0] * 4)]
    assert sum(policy(zeros, 0.25).by_layer.values()) <= 2


@pytest.mark.parametrize("policy", [params, para_rank, para_energy])
def test_a_least_rank_above_the_singular_values_of_a_layer_is_its_rank(policy):
    spectra = [spectrum("a", [3, 2, 1], out=3, rank=8), spectrum("b", [4, 3, 2, 1, 1, 1, 1, 1])]
    plan = policy(spectra, 0.9, limits=Limits(min_rank=5))
    assert plan.by_layer["a"] == 5
    assert 5 <= plan.by_layer["b"] <= 8


# --- what a budget means ----------------------------------------------------------------------------------------

WIDE = spectrum("wide", [4, 3, 2, 1], out=10, inner=10)  # 4 components of 20 parameters
NARROW = spectrum("narrow", [2, 1.5], out=2, inner=2, rank=4)  # 4 components of 4 parameters


def test_a_component_is_worth_its_energy_per_parameter():
    narrow = spectrum("narrow", [2, 1], out=2, inner=2)
    assert params([WIDE, narrow], 24).by_layer == {"wide": 1, "narrow": 1}  # 16/20 and 4/4, not 16/20 and 9/20
    assert params([WIDE, narrow], 8).by_layer == {"wide": 0, "narrow": 2}


def test_a_budget_up_to_one_is_a_fraction_and_above_a_number():
    spectra = [spectrum("a", [4, 3, 2, 1]), spectrum("b", [3.5, 2.5, 1.5, 0.5])]
    whole = 2 * 4 * 16
    assert params(spectra, 0.5).by_layer == params(spectra, whole // 2).by_layer == {"a": 2, "b": 2}
    assert params(spectra, 1.0).by_layer == params(spectra, whole).by_layer == {"a": 4, "b": 4}
    assert params(spectra, 10**9).by_layer == {"a": 4, "b": 4}
    assert params(spectra, 16).by_layer == {"a": 1, "b": 0}


def test_the_source_counts_the_components_it_stores():
    """A rank above the module's size is paid for, though it holds no more singular values."""
    small = spectrum("a", [2, 1], out=2, inner=6, rank=8)  # 64 parameters, of which 16 say it all
    assert params([small], 0.25).by_layer == {"a": 2}
    assert params([small], 0.24).by_layer == {"a": 1}
    assert params([small], 1.0).by_layer["a"] >= 2


@pytest.mark.parametrize("budget", [0, -1, -0.5, math.nan, math.inf, -math.inf])
def test_budgets_that_are_none_are_refused(budget):
    with pytest.raises(RankError, match="params="):
        params([WIDE], budget)


@pytest.mark.parametrize(
    ("budget", "limits", "smallest"),
    [
        (3, Limits(), 4),
        (0.01, Limits(), 4),
        (20, Limits(min_rank=1), 24),
        (47, Limits(min_rank=2), 48),
        (7, Limits(multiple_of=2), 8),
        (11, Limits(steps=(3,)), 12),
        (23, Limits(equal=(".+",)), 24),
        (19, Limits(rank_for=(("narrow", 0),)), 20),
    ],
    ids=str,
)
def test_a_budget_that_is_too_small_names_the_smallest_that_is_possible(budget, limits, smallest):
    spectra = [WIDE, NARROW]
    with pytest.raises(RankError, match=rf"\b{smallest}\b"):
        params(spectra, budget, limits=limits)
    assert any(params(spectra, smallest, limits=limits).by_layer.values())


# --- ties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "value"), [(params, 0.4), (params, 0.7), (para_rank, 0.4), (para_rank, 0.7), (para_energy, 0.6)]
)
@pytest.mark.parametrize("limits", [Limits(), Limits(multiple_of=2), Limits(equal=(r"_\d",))], ids=str)
def test_equal_worth_is_decided_by_name_and_not_by_the_order_of_the_file(policy, value, limits):
    names = ["b_1", "a_1", "c_1", "c_2", "b_2", "d_1", "a_2"]
    spectra = [spectrum(name, [2, 2, 1, 1]) for name in names]
    plans = []
    for seed in range(12):
        random.Random(seed).shuffle(spectra)
        plans.append(policy(spectra, value, limits=limits).by_layer)
    assert all(plan == plans[0] for plan in plans)


def test_among_equals_the_first_name_is_kept():
    spectra = [spectrum(name, [1]) for name in ("layers.2", "layers.0", "layers.1")]
    assert params(spectra, 32).by_layer == {"layers.0": 1, "layers.1": 1, "layers.2": 0}
    assert para_rank(spectra, 0.3).by_layer == {"layers.0": 1, "layers.1": 0, "layers.2": 0}


# --- size: bytes of the file that is written --------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Layers of different sizes, ranks and dtypes, and a tensor that is only carried over."""
    tensors = {"classifier.bias": torch.zeros(5)}
    ranks = {"small.proj": 2}
    for place, (out, inner) in enumerate([(6, 10), (40, 24), (16, 16), (7, 90)]):
        dtype = torch.bfloat16 if place == 2 else torch.float32
        tensors |= pair(f"layers.{place}.proj", out, 6, inner, seed=place, dtype=dtype)
    tensors |= pair("small.proj", 30, 2, 20, seed=9)
    folder = write_raw(tmp_path_factory.mktemp("uneven") / "adapter", tensors, r=6, lora_alpha=6, rank_pattern=ranks)
    return decompose(open_adapter(folder))


def written(decomposition, ranks, folder, **options):
    squeeze(decomposition, ranks, folder, **options)
    return (folder / WEIGHTS).stat().st_size


def whole_file(decomposition, **options):
    full = {s.name: s.rank for s in decomposition.spectra}
    return file_cost(decomposition.adapter, **options).file_size(by_hand(full))


def by_hand(by_layer):
    return Ranks("by hand", by_layer)


@pytest.mark.parametrize("dtype", [None, "BF16", "F64"])
@pytest.mark.parametrize("fraction", [0.3, 0.4, 0.55, 0.71, 0.9, 1.0])
def test_size_is_the_largest_file_within_the_budget(tmp_path, uneven, dtype, fraction):
    cost = file_cost(uneven.adapter, dtype=dtype)
    budget = math.floor(fraction * whole_file(uneven, dtype=dtype))

    plan = size(uneven.spectra, budget, cost=cost)

    found = written(uneven, plan, tmp_path / "out", dtype=dtype)
    assert found == cost.file_size(plan)
    assert found <= budget
    unfinished = [s.name for s in uneven.spectra if plan.by_layer[s.name] < len(s.singular_values)]
    if unfinished:
        cheapest = min(cost.component_bytes[name] for name in unfinished)
        all_layers = by_hand({s.name: s.rank - (s.rank > 1) for s in uneven.spectra})
        header_growth = header(cost, all_layers, uneven) - header(cost, plan, uneven)
        assert budget - found < cheapest + header_growth + 16


@pytest.mark.parametrize("fraction", [0.2, 0.3, 0.4, 0.55, 0.71, 0.9])
def test_the_remainder_is_filled_until_no_component_fits(uneven, fraction):
    cost = file_cost(uneven.adapter)
    budget = math.floor(fraction * whole_file(uneven))
    plan = size(uneven.spectra, budget, cost=cost)
    for s in uneven.spectra:
        rank = plan.by_layer[s.name]
        if rank < len(s.singular_values):
            more = Ranks(plan.policy, {**plan.by_layer, s.name: rank + 1})
            assert cost.file_size(more) > budget, (s.name, cost.file_size(more), budget)


def header(cost, plan, decomposition):
    """What of a file is not factors."""
    factors = sum(cost.component_bytes[s.name] * plan.by_layer[s.name] for s in decomposition.spectra)
    return cost.file_size(plan) - factors


@pytest.mark.parametrize("numbers", [3, 40, 300])
@pytest.mark.parametrize("budget", [3000, 3300, 3600, 3900])
def test_a_wider_tensor_beside_the_factors_is_counted_where_it_lies_in_the_file(tmp_path, numbers, budget):
    factors = {**pair("a", 50, 8, 40, dtype=torch.bfloat16), **pair("b", 60, 8, 30, dtype=torch.bfloat16)}
    source = write_raw(tmp_path / "adapter", {**factors, "head.bias": torch.zeros(numbers)}, r=8)
    decomposition = decompose(open_adapter(source))
    cost = file_cost(decomposition.adapter)
    plan = size(decomposition.spectra, budget, cost=cost)
    found = written(decomposition, plan, tmp_path / "out")
    assert found == cost.file_size(plan)
    assert found <= budget


def least_size(decomposition, cost, limits=NO_LIMITS):
    """The smallest file that is possible, as the error for an impossible one names it."""
    with pytest.raises(RankError, match=r"of (\d+) bytes") as caught:
        size(decomposition.spectra, 100, cost=cost, limits=limits)
    return int(re.search(r"of (\d+) bytes", str(caught.value))[1])


@pytest.mark.parametrize("above", range(0, 8000, 261))
@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_no_budget_is_ever_exceeded(tmp_path, uneven, dtype, above):
    cost = file_cost(uneven.adapter, dtype=dtype)
    budget = least_size(uneven, cost) + above
    plan = size(uneven.spectra, budget, cost=cost)
    assert written(uneven, plan, tmp_path / "out", dtype=dtype) <= budget


@pytest.mark.parametrize(("base", "lora"), [(LLAMA, {}), (BERT, {"modules_to_save": ["classifier"]})])
def test_size_of_real_adapters_counts_everything_in_the_file(tmp_path, base, lora):
    decomposition = decompose(open_adapter(make_adapter(tmp_path / "adapter", base, **lora)))
    budget = math.floor(0.6 * (tmp_path / "adapter" / WEIGHTS).stat().st_size)
    plan = choose_ranks(decomposition, f"size={budget}")
    found = written(decomposition, plan, tmp_path / "out")
    assert 0.9 * budget < found <= budget


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "llamacpp"])
def test_size_is_that_of_the_file_for_the_runtime(tmp_path, runtime):
    source = make_adapter(tmp_path / "adapter", rank_pattern={"v_proj": 3}, use_rslora=True)
    decomposition = decompose(open_adapter(source))
    budget = (source / WEIGHTS).stat().st_size // 2
    plan = choose_ranks(decomposition, f"size={budget}", runtime=runtime, dtype="F16")
    assert written(decomposition, plan, tmp_path / "out", runtime=runtime, dtype="F16") <= budget
    if runtime != "vllm":
        next_rank = by_hand({name: min(plan.largest + 1, s.rank) for name, s in by_name(decomposition).items()})
        assert file_cost(decomposition.adapter, dtype="F16", runtime=runtime).file_size(next_rank) > budget


def by_name(decomposition):
    return {s.name: s for s in decomposition.spectra}


def test_size_respects_limits(uneven):
    cost = file_cost(uneven.adapter)
    limits = Limits(min_rank=1, multiple_of=2, equal=(r"layers\.[01]\.",))
    plan = size(uneven.spectra, 10_000, cost=cost, limits=limits)
    assert cost.file_size(plan) <= 10_000
    assert set(plan.by_layer.values()) <= {2, 4, 6}
    assert plan.by_layer["layers.0.proj"] == plan.by_layer["layers.1.proj"]


@pytest.mark.parametrize("limits", [Limits(), Limits(min_rank=1), Limits(min_rank=2, multiple_of=2)], ids=str)
def test_a_file_that_is_too_small_names_the_smallest_that_is_possible(tmp_path, uneven, limits):
    cost = file_cost(uneven.adapter)
    least = least_size(uneven, cost, limits)

    plan = size(uneven.spectra, least, cost=cost, limits=limits)

    assert written(uneven, plan, tmp_path / "out") == least
    with pytest.raises(RankError, match=f"{least} bytes"):
        size(uneven.spectra, least - 1, cost=cost, limits=limits)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("20000", 20_000),
        ("20000B", 20_000),
        ("20KB", 20_000),
        ("20kb", 20_000),
        ("20 KB", 20_000),
        ("20KiB", 20_480),
        ("20kib", 20_480),
        ("0.02MB", 20_000),
        ("1.5MB", 1_500_000),
        ("1.5MiB", 1_572_864),
        ("2GB", 2_000_000_000),
        ("2GiB", 2_147_483_648),
    ],
)
def test_sizes_are_spelled_as_people_write_them(uneven, text, number):
    plan = parse_policy(f"size={text}").choose(uneven.spectra, cost=file_cost(uneven.adapter))
    assert plan.policy == f"size={number}"


@pytest.mark.parametrize(
    "text", ["", "MB", "-5MB", "5TB", "5M B", "5iB", "five", "1.2.3MB", ".", "1e6", "nan", "inf", "5MB!", "9" * 400]
)
def test_other_sizes_are_refused(text):
    with pytest.raises(RankError, match="size"):
        parse_policy(f"size={text}")
