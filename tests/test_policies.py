"""One rank for all layers, from hand-computed spectra."""

import math

import pytest

from lora_squeeze import LayerSpec, Ranks, Spectrum, fixed, variance
from lora_squeeze.errors import RankError
from lora_squeeze.policies import candidate_ranks, retention_curve


def spectrum(name: str, *values: float, rank: int | None = None) -> Spectrum:
    return Spectrum(name, 40, 30, len(values) if rank is None else rank, values)


STEEP = spectrum("steep", 4.0, 3.0, 0.0, 0.0)  # V: 0.64, 1, 1, 1
FLAT = spectrum("flat", 1.0, 1.0, 1.0, 1.0)  # V: 0.25, 0.5, 0.75, 1
ZERO = spectrum("zero", 0.0, 0.0, 0.0, 0.0)
SHORT = spectrum("short", 2.0, 1.0)  # V: 0.8, 1


# --- fixed ------------------------------------------------------------------------------------------------------


def test_fixed_gives_every_layer_the_rank_and_none_more_than_its_own():
    assert fixed([STEEP, SHORT], 3) == Ranks("fixed=3", {"steep": 3, "short": 2})
    assert fixed([STEEP, SHORT], 100).by_layer == {"steep": 4, "short": 2}


def test_fixed_needs_no_spectra():
    spec = LayerSpec("layer", 40, 30, 8, scale=1.0, down_dtype="F32", up_dtype="F32")
    assert fixed(iter([spec]), 3).by_layer == {"layer": 3}


@pytest.mark.parametrize("rank", [0, -1])
def test_fixed_refuses_ranks_below_one(rank):
    with pytest.raises(RankError, match=f"rank {rank} is not possible"):
        fixed([STEEP], rank)


# --- variance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "by", "rank"),
    [
        (0.44, "mean", 1),  # (0.64 + 0.25) / 2 = 0.445
        (0.45, "mean", 2),
        (0.75, "mean", 2),  # (1 + 0.5) / 2, exactly
        (0.7500001, "mean", 4),
        (1.0, "mean", 4),
        (0.25, "worst", 1),
        (0.26, "worst", 2),
        (0.5, "worst", 2),
        (0.51, "worst", 4),
    ],
)
def test_variance_takes_the_smallest_rank_that_retains_enough(keep, by, rank):
    assert variance([STEEP, FLAT], keep, by=by).by_layer == {"steep": rank, "flat": rank}


def test_variance_names_its_policy():
    assert variance([STEEP], 0.9).policy == "variance=0.9"


def test_variance_looks_at_the_candidates_only():
    assert variance([STEEP, FLAT], 0.8, candidates=[3, 1]).largest == 3  # (1 + 0.75) / 2
    assert variance([STEEP, FLAT], 0.9, candidates=[3, 1]).largest == 4  # none of them is enough


def test_variance_does_not_count_layers_of_zeros():
    assert variance([FLAT, *[ZERO] * 100], 0.6).largest == 4
    assert variance([ZERO], 0.95).largest == 1


def test_variance_gives_layers_of_lower_rank_their_own():
    assert variance([FLAT, SHORT], 0.9).by_layer == {"flat": 4, "short": 2}


@pytest.mark.parametrize("keep", [0, -0.1, 1.0001, math.nan, math.inf])
def test_variance_refuses_what_is_no_fraction(keep):
    with pytest.raises(RankError, match="not possible"):
        variance([STEEP], keep)


def test_variance_refuses_what_is_neither_mean_nor_worst():
    with pytest.raises((RankError, ValueError), match="mean"):
        variance([STEEP], 0.9, by="median")


# --- candidates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "given_ranks", "expected"),
    [
        (1, [], (1,)),
        (8, [], (1, 2, 4, 8)),
        (10, [], (1, 2, 4, 8, 10)),
        (64, [], (1, 2, 4, 8, 16, 32, 64)),
        (8, [4, 2, 4, 1], (1, 2, 4)),
        (8, [100, 3, 9], (3, 8)),
        (8, iter([3]), (3,)),
    ],
    ids=str,
)
def test_candidates_are_sorted_unique_and_within_the_source_rank(source, given_ranks, expected):
    assert candidate_ranks(source, given_ranks) == expected


@pytest.mark.parametrize("rank", [0, -4])
def test_candidates_below_one_are_refused(rank):
    with pytest.raises(RankError, match=f"candidate rank {rank}"):
        candidate_ranks(8, [4, rank])


def test_the_curve_leaves_out_layers_of_zeros():
    assert retention_curve([STEEP, ZERO, FLAT], 1) == [0.64, 0.25]
    assert retention_curve([ZERO], 1) == [1.0]
