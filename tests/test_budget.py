"""Budgets: never above, within one component of the best there is, and exact to the byte of the file."""

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_squeeze import Spectrum
from lora_squeeze.errors import RankError
from lora_squeeze.limits import Limits
from lora_squeeze.policies import para_energy, para_rank, params

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
