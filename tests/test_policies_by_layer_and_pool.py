"""Every policy against a direct reading of its formula, on random spectra, with NumPy."""

import math

import numpy as np
import pytest
from adapters import make_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_squeeze import Spectrum, decompose, open_adapter
from lora_squeeze.errors import RankError
from lora_squeeze.policies import (
    POLICIES,
    candidate_ranks,
    cumulative,
    effective_rank,
    energy,
    fixed,
    knee,
    optimal_threshold,
    para_energy,
    para_rank,
    params,
    sigma_ratio,
    stable_rank,
    variance,
)

# --- random spectra ---------------------------------------------------------------------------------------------


def spectrum(name, values, *, out=64, inner=48, rank=None):
    return Spectrum(name, out, inner, rank or len(values), tuple(map(float, values)))


def random_spectra(seed, layers=6):
    """Layers of different ranks, decays, shapes and, above all, scales."""
    rng = np.random.default_rng(seed)
    found = []
    for place in range(layers):
        count = int(rng.integers(1, 33))
        decay = rng.choice([0.5, 0.8, 0.95, 1.0])
        values = np.sort(rng.lognormal(size=count) * decay ** np.arange(count))[::-1] * 10 ** rng.uniform(-3, 2)
        found.append(
            spectrum(f"layers.{place}", values, out=int(rng.integers(32, 99)), inner=int(rng.integers(32, 99)))
        )
    return found


seeds = pytest.mark.parametrize("seed", range(12))


def sigma(spectrum):
    return np.array(spectrum.singular_values)


def check_layer_by_layer(plan, spectra, formula):
    """The plan gives every layer what the formula says of it alone, but at least one component."""
    expected = {s.name: min(max(1, int(formula(sigma(s)))), s.rank) for s in spectra}
    assert plan.by_layer == expected


# --- one layer at a time ----------------------------------------------------------------------------------------


@seeds
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.95, 0.999, 1.0])
def test_energy_is_the_first_rank_whose_squares_suffice(seed, keep):
    spectra = random_spectra(seed)
    plan = energy(spectra, keep)
    for s in spectra:
        squares, rank = sigma(s) ** 2, plan.by_layer[s.name]
        assert squares[:rank].sum() >= keep * squares.sum() * (1 - 1e-9)
        assert squares[: rank - 1].sum() < keep * squares.sum()


@seeds
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_cumulative_is_the_first_rank_whose_values_suffice(seed, keep):
    spectra = random_spectra(seed)
    plan = cumulative(spectra, keep)
    for s in spectra:
        values, rank = sigma(s), plan.by_layer[s.name]
        assert values[:rank].sum() >= keep * values.sum() * (1 - 1e-9)
        assert values[: rank - 1].sum() < keep * values.sum()


@seeds
@pytest.mark.parametrize("ratio", [1, 1.5, 3, 10, 1e6])
def test_sigma_ratio_keeps_what_is_not_that_much_smaller_than_the_largest(seed, ratio):
    spectra = random_spectra(seed)
    check_layer_by_layer(sigma_ratio(spectra, ratio), spectra, lambda values: np.sum(values[0] / values <= ratio))


@seeds
@pytest.mark.parametrize("times", [0.5, 1, 2, 100])
def test_stable_rank_is_the_frobenius_norm_over_the_spectral_norm(seed, times):
    spectra = random_spectra(seed)
    check_layer_by_layer(
        stable_rank(spectra, times),
        spectra,
        lambda values: np.ceil(times * (np.linalg.norm(values) / values.max()) ** 2 - 1e-9),
    )


@seeds
@pytest.mark.parametrize("times", [0.5, 1, 2, 100])
def test_effective_rank_is_the_exponential_of_the_entropy(seed, times):
    def formula(values):
        shares = values / values.sum()
        return np.ceil(times * np.exp(-np.sum(shares * np.log(shares))) - 1e-9)

    spectra = random_spectra(seed)
    check_layer_by_layer(effective_rank(spectra, times), spectra, formula)


@seeds
@pytest.mark.parametrize("times", [0.2, 0.5, 1, 2])
def test_optimal_threshold_is_a_multiple_of_the_median(seed, times):
    spectra = random_spectra(seed)
    check_layer_by_layer(
        optimal_threshold(spectra, times), spectra, lambda values: np.sum(values > times * 2.858 * np.median(values))
    )


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ((10, 3, 3, 0, 0, 0, 0, 0), 1),  # 2.858 · 3 = 8.574
        ((10, 3, 1, 0, 0, 0, 0, 0), 1),
        ((10, 2, 1, 0), 1),
        ((30, 10, 3, 3, 3, 0), 2),
        ((5, 0, 0, 0), 1),  # nothing is above 2.858 · 5, and one component is kept
        ((0, 0, 0, 0), 1),
    ],
)
def test_optimal_threshold_takes_the_median_of_what_is_not_zero(values, rank):
    assert optimal_threshold([spectrum("a", values)]).by_layer == {"a": rank}


def test_optimal_threshold_does_not_depend_on_idle_directions():
    spectra = random_spectra(3)
    wider = [spectrum(s.name, (*s.singular_values, *[0.0] * s.rank)) for s in spectra]
    assert optimal_threshold(wider, 0.5).by_layer == optimal_threshold(spectra, 0.5).by_layer


@pytest.mark.parametrize("size", [2, 7, 70, 90, 64 + 48, 8192, 14336 + 4096])
@pytest.mark.parametrize("percent", range(1, 101))
def test_params_as_a_fraction_loses_no_component_to_the_last_digits_of_a_product(percent, size):
    one = spectrum("a", range(100, 0, -1), out=size // 2, inner=size - size // 2)
    assert params([one], percent / 100).by_layer == {"a": percent}
    if percent * size > 1:
        assert params([one], percent / 100 * 100 * size).by_layer == {"a": percent}  # as where layers are padded


@seeds
@pytest.mark.parametrize("times", [0.5, 1, 1.5])
def test_knee_is_where_the_curve_is_farthest_above_its_chord(seed, times):
    def formula(values):
        curve = np.concatenate([[0], np.cumsum(values**2) / np.sum(values**2)])
        chord = np.linspace(0, 1, len(values) + 1)
        return np.ceil(times * np.argmax(np.round(curve - chord, 12)))

    spectra = random_spectra(seed)
    check_layer_by_layer(knee(spectra, times), spectra, formula)


@seeds
@pytest.mark.parametrize("by", ["mean", "worst"])
@pytest.mark.parametrize("keep", [0.3, 0.9, 0.99])
def test_variance_is_the_first_candidate_that_suffices_for_all_layers(seed, by, keep):
    spectra = random_spectra(seed)
    candidates = [1, 2, 3, 5, 8, 13, 21, 32]
    found = variance(spectra, keep, by=by, candidates=candidates)
    curves = [np.concatenate([[0], np.cumsum(sigma(s) ** 2) / np.sum(sigma(s) ** 2)]) for s in spectra]
    reached = {
        rank: {"mean": np.mean, "worst": np.min}[by]([curve[min(rank, len(curve) - 1)] for curve in curves])
        for rank in candidates
    }
    rank = next(rank for rank in candidates if reached[rank] >= keep)
    assert found.by_layer == {s.name: min(rank, s.rank) for s in spectra}


@pytest.mark.parametrize("rank", [1, 5, 99])
def test_fixed_is_one_rank_for_all_that_have_it(rank):
    spectra = random_spectra(0)
    assert fixed(spectra, rank).by_layer == {s.name: min(rank, s.rank) for s in spectra}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 30])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1.1, 1 / 3])
@pytest.mark.parametrize("policy", [stable_rank, effective_rank])
def test_a_flat_spectrum_of_k_values_has_rank_k(policy, count, value):
    assert policy([spectrum("a", [value] * count + [0.0] * 5)]).by_layer == {"a": count}


@pytest.mark.parametrize("keep", [0.1, 0.2, 0.3, 0.6, 0.7, 0.9])
def test_a_flat_spectrum_is_cut_at_the_fraction_itself(keep):
    flat = [spectrum("a", [0.1] * 10)]
    expected = {"a": round(keep * 10)}
    assert energy(flat, keep).by_layer == cumulative(flat, keep).by_layer == expected
    assert para_energy(flat, keep).by_layer == para_rank(flat, keep).by_layer == expected


PER_LAYER = {
    "fixed": 3,
    "energy": 0.9,
    "cumulative": 0.9,
    "sigma-ratio": 4,
    "stable-rank": 1,
    "effective-rank": 1,
    "optimal-threshold": 0.5,
    "knee": 1,
}


@pytest.mark.parametrize(("name", "value"), PER_LAYER.items(), ids=PER_LAYER)
def test_a_layer_s_rank_does_not_depend_on_its_scale_or_on_other_layers(name, value):
    spectra = random_spectra(3)
    scaled = [spectrum(s.name, sigma(s) * 10.0 ** (place - 3), rank=s.rank) for place, s in enumerate(spectra)]
    together = POLICIES[name](spectra, value).by_layer
    assert POLICIES[name](scaled, value).by_layer == together
    assert {s.name: POLICIES[name]([s], value).by_layer[s.name] for s in spectra} == together


# --- all layers pooled ------------------------------------------------------------------------------------------


def pooled(spectra, plan):
    """The singular values that are kept and those that are dropped, of all layers."""
    kept = np.concatenate([sigma(s)[: plan.by_layer[s.name]] for s in spectra])
    dropped = np.concatenate([sigma(s)[plan.by_layer[s.name] :] for s in spectra])
    return kept, dropped


@seeds
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0])
def test_para_rank_keeps_exactly_its_share_of_the_components_and_the_largest(seed, fraction):
    spectra = random_spectra(seed)
    kept, dropped = pooled(spectra, para_rank(spectra, fraction))
    assert len(kept) == math.ceil(fraction * (len(kept) + len(dropped)))
    assert kept.min() >= dropped.max(initial=0)


@pytest.mark.parametrize("total", [10, 30, 50, 70, 100])
@pytest.mark.parametrize("tenths", range(1, 11))
def test_para_rank_counts_as_on_paper(total, tenths):
    """0.7 · 10 is 7.000000000000001 in floating point, and 0.3 · 10 components are 3, not 4."""
    spectra = [spectrum("a", np.arange(total, 0, -1.0))]
    assert para_rank(spectra, tenths / 10).by_layer == {"a": total * tenths // 10}


@seeds
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_para_energy_is_the_shortest_prefix_of_the_pooled_squares(seed, keep):
    spectra = random_spectra(seed)
    kept, dropped = pooled(spectra, para_energy(spectra, keep))
    whole = np.sum(kept**2) + np.sum(dropped**2)
    assert np.sum(kept**2) >= keep * whole * (1 - 1e-9)
    assert np.sum(kept**2) - kept.min() ** 2 < keep * whole
    assert kept.min() >= dropped.max(initial=0)


@pytest.mark.parametrize(
    ("policy", "value", "expected"),
    [(para_rank, 0.5, {"strong": 3, "weak": 0}), (para_energy, 0.99, {"strong": 3, "weak": 0}), (params, 0.5, None)],
)
def test_a_weak_layer_falls_to_rank_0(policy, value, expected):
    spectra = [spectrum("strong", [100, 90, 80]), spectrum("weak", [0.3, 0.2, 0.1])]
    assert policy(spectra, value).by_layer == (expected or {"strong": 3, "weak": 0})


def test_what_is_pooled_is_the_effective_update_scale_included():
    spectra = [spectrum("a", [4, 3, 2, 1]), spectrum("b", [4, 3, 2, 1])]
    doubled = [spectra[0], spectrum("b", [40, 30, 20, 10])]
    assert para_rank(spectra, 0.5).by_layer == {"a": 2, "b": 2}
    assert para_rank(doubled, 0.5).by_layer == {"a": 0, "b": 4}
    assert para_energy(doubled, 0.9).by_layer == {"a": 0, "b": 3}
    assert params(doubled, 0.5).by_layer == {"a": 0, "b": 4}


def test_the_effective_update_of_an_adapter_is_what_is_pooled(tmp_path):
    """alpha_pattern makes one module a thousand times as strong: its components are kept first."""
    source = make_adapter(tmp_path / "adapter", alpha_pattern={"v_proj": 16000})
    spectra = decompose(open_adapter(source)).spectra
    plan = para_rank(spectra, 2 / 6).by_layer
    assert all(rank == (8 if "v_proj" in name else 0) for name, rank in plan.items())


def test_params_weighs_a_component_by_what_it_costs_and_para_does_not():
    spectra = [spectrum("large", [3, 2.9], out=500, inner=500), spectrum("small", [2, 1.9], out=4, inner=4)]
    assert para_rank(spectra, 0.5).by_layer == {"large": 2, "small": 0}
    assert params(spectra, 0.51).by_layer == {"large": 1, "small": 2}


def test_a_rank_above_the_module_s_size_gives_no_more_components_than_there_are():
    spectra = [spectrum("a", [3, 2], out=2, inner=9, rank=8), spectrum("b", [1] * 8)]
    for policy, value in [(para_rank, 1.0), (para_energy, 1.0), (params, 1.0), (energy, 1.0)]:
        assert policy(spectra, value).by_layer["a"] in (2, 8)
        assert policy(spectra, value).by_layer["b"] == 8
    assert para_rank(spectra, 0.5).by_layer == {"a": 2, "b": 6}  # half of 16 that are stored


@given(st.lists(st.lists(st.floats(0, 1e6), min_size=1, max_size=6), min_size=1, max_size=5), st.floats(0.01, 1))
@settings(deadline=None, max_examples=150)
def test_no_policy_asks_a_layer_for_more_than_it_has(values, fraction):
    spectra = [spectrum(f"layers.{place}", sorted(row, reverse=True)) for place, row in enumerate(values)]
    for name in ("energy", "cumulative", "variance", "para-rank", "para-energy", "params"):
        try:
            plan = POLICIES[name](spectra, fraction)
        except RankError:
            continue
        assert list(plan.by_layer) == [s.name for s in spectra]
        assert all(0 <= plan.by_layer[s.name] <= s.rank for s in spectra)


@pytest.mark.parametrize("name", ["energy", "cumulative", "para-rank", "para-energy", "params", "variance"])
def test_more_is_never_less(name):
    spectra = random_spectra(5)
    plans = [POLICIES[name](spectra, fraction).by_layer for fraction in np.linspace(0.05, 1, 20)]
    totals = [sum(plan.values()) for plan in plans]
    assert totals == sorted(totals)
    assert totals[0] < totals[-1] == sum(s.rank for s in spectra)


# --- zero layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["energy", "cumulative", "stable-rank", "effective-rank", "optimal-threshold", "knee"])
def test_a_layer_of_zeros_needs_one_component(name):
    plan = POLICIES[name]([spectrum("zero", [0, 0, 0]), spectrum("other", [1, 1, 1])], 1.0)
    assert plan.by_layer["zero"] == 1


@pytest.mark.parametrize("name", ["para-rank", "para-energy", "params"])
def test_a_layer_of_zeros_is_the_first_to_go(name):
    plan = POLICIES[name]([spectrum("zero", [0, 0, 0]), spectrum("other", [1, 1, 1])], 0.5)
    assert plan.by_layer["zero"] == 0
    assert plan.by_layer["other"] > 0


def test_a_layer_of_zeros_does_not_count_in_the_variance():
    spectra = [spectrum("zero", [0, 0, 0, 0]), spectrum("other", [2, 1, 1, 1])]
    assert variance(spectra, 0.7, by="worst").by_layer == variance(spectra[1:], 0.7).by_layer | {"zero": 2}


# --- values that make no sense ----------------------------------------------------------------------------------

FRACTIONS = ["variance", "energy", "cumulative", "para-rank", "para-energy"]
MULTIPLES = ["stable-rank", "effective-rank", "optimal-threshold", "knee", "params"]


@pytest.mark.parametrize("name", FRACTIONS)
@pytest.mark.parametrize("value", [0, -0.1, 1.0001, 90, math.nan, math.inf, -math.inf])
def test_fractions_are_above_0_and_up_to_1(name, value):
    with pytest.raises(RankError, match=f"{name}={value:g}"):
        POLICIES[name](random_spectra(0), value)


@pytest.mark.parametrize("name", MULTIPLES)
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -math.inf])
def test_multiples_are_above_0(name, value):
    with pytest.raises(RankError, match=f"{name}={value:g}"):
        POLICIES[name](random_spectra(0), value)


@pytest.mark.parametrize("value", [0, 0.99, -3, math.nan, -math.inf])
def test_a_sigma_ratio_is_at_least_1(value):
    with pytest.raises(RankError, match="sigma-ratio"):
        sigma_ratio(random_spectra(0), value)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_fixed_rank_is_at_least_1(rank):
    with pytest.raises(RankError, match=f"rank {rank}"):
        fixed(random_spectra(0), rank)


@pytest.mark.parametrize("candidates", [[0], [4, -2]])
def test_candidates_are_at_least_1(candidates):
    with pytest.raises(RankError, match="candidate rank"):
        candidate_ranks(8, candidates)
