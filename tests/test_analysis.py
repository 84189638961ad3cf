"""The numbers of an analysis, computed by hand."""

import math

import pytest

from lora_squeeze import Spectrum, analyze
from lora_squeeze.errors import RankError


def spectrum(name: str, *values: float) -> Spectrum:
    return Spectrum(name, 40, 30, len(values), values)


STEEP = spectrum("steep", 4.0, 3.0, 0.0, 0.0)  # energy 25, V: 0.64, 1, 1, 1
FLAT = spectrum("flat", 1.0, 1.0, 1.0, 1.0)  # energy 4, V: 0.25, 0.5, 0.75, 1
ZERO = spectrum("zero", 0.0, 0.0, 0.0, 0.0)


def test_curves_over_two_layers():
    found = analyze([STEEP, FLAT], source="here")
    assert (found.source, found.source_rank, found.target_ranks) == ("here", 4, (1, 2, 4))
    assert found.mean_variance == pytest.approx({1: 0.445, 2: 0.75, 4: 1.0})
    assert found.min_variance == {1: 0.25, 2: 0.5, 4: 1.0}
    assert found.max_variance == {1: 0.64, 2: 1.0, 4: 1.0}
    assert found.energy_variance == pytest.approx({1: 17 / 29, 2: 27 / 29, 4: 1.0})
    assert found.recommended_rank == 4
    assert found.spectra == (STEEP, FLAT)


@pytest.mark.parametrize(
    ("keep", "by", "rank"),
    [(0.44, "mean", 1), (0.75, "mean", 2), (0.76, "mean", 4), (0.5, "worst", 2), (0.6, "worst", 4)],
)
def test_the_recommended_rank_is_the_smallest_that_suffices(keep, by, rank):
    found = analyze([STEEP, FLAT], min_variance_retention=keep, by=by)
    assert found.recommended_rank == rank
    assert (found.min_variance_retention, found.by) == (keep, by)


def test_layers_of_zeros_do_not_count_and_are_mentioned():
    found, without = analyze([ZERO, STEEP, FLAT]), analyze([STEEP, FLAT])
    for curve in ("mean_variance", "min_variance", "max_variance", "energy_variance", "recommended_rank"):
        assert getattr(found, curve) == getattr(without, curve)
    assert [layer.name for layer in found.layers] == ["zero", "steep", "flat"]
    assert any("1 of 3 layers" in note and "zero" in note for note in found.notes)
    assert without.notes == ()


def test_an_adapter_of_zeros_needs_rank_one():
    found = analyze([ZERO, ZERO])
    assert found.recommended_rank == 1
    assert set(found.mean_variance.values()) == set(found.energy_variance.values()) == {1.0}


def test_layers_of_lower_rank_retain_everything_beyond_it():
    found = analyze([STEEP, spectrum("short", 2.0, 1.0)])
    assert found.source_rank == 4
    assert found.layers[1].source_rank == 2
    assert found.layers[1].variance_at_rank == {1: 0.8, 2: 1.0, 4: 1.0}


def test_candidates_are_sorted_and_cut_at_the_source_rank():
    found = analyze([FLAT], target_ranks=[100, 3, 1, 3])
    assert found.target_ranks == (1, 3, 4)
    assert list(found.mean_variance) == [1, 3, 4]
    assert found.mean_variance[3] == 0.75


def test_no_candidate_is_enough():
    found = analyze([FLAT], target_ranks=[1, 3], min_variance_retention=0.8)
    assert found.recommended_rank == 4
    assert any("no candidate retains 80%" in note for note in found.notes)


def test_a_noise_layer_moves_the_mean_but_not_the_energy():
    work, noise = spectrum("work", 10.0, *[0.0] * 7), spectrum("noise", *[1e-4] * 8)
    found = analyze([work, noise])
    assert found.recommended_rank == 8
    assert found.energy_variance[1] > 0.999999
    (note,) = found.notes
    assert "rank 1 is enough" in note
    assert "mean" in note


def test_the_layer_for_which_the_worst_asks_for_more_is_named():
    work, small = spectrum("work", 10.0, *[0.0] * 7), spectrum("small", *[0.5] * 8)
    found = analyze([work, small], by="worst")
    assert found.recommended_rank == 8
    assert found.notes == (
        "weighted by energy, rank 1 is enough for 95%: the layer that asks for more, small, has 1.96% of the energy",
    )


def test_many_small_layers_hide_a_large_one_that_needs_more():
    work = spectrum("work", 5.0, 5.0, 5.0, 5.0)
    found = analyze([work, *(spectrum(f"small{place}", 1e-3, 0.0, 0.0, 0.0) for place in range(19))])
    assert found.recommended_rank == 1
    assert found.energy_variance[1] == pytest.approx(0.25)
    (note,) = found.notes
    assert "only rank 4" in note


def test_no_note_where_mean_and_energy_agree():
    assert analyze([STEEP, FLAT], min_variance_retention=0.75).notes == ()


def test_notes_of_the_adapter_come_first():
    assert analyze([FLAT, ZERO], notes=["DoRA"]).notes[0] == "DoRA"


@pytest.mark.parametrize("declared", [3, 5, 64, -1])
def test_a_declared_rank_that_the_tensors_contradict_is_an_error(declared):
    with pytest.raises(RankError, match=rf"source rank {declared} was declared.*somewhere is 4"):
        analyze([STEEP, FLAT], source="somewhere", source_rank=declared)


def test_a_declared_rank_that_agrees_changes_nothing():
    assert analyze([STEEP, FLAT], source_rank=4) == analyze([STEEP, FLAT])


@pytest.mark.parametrize("keep", [0, -1, 1.5, math.nan])
def test_an_impossible_threshold_is_an_error(keep):
    with pytest.raises(RankError, match="not possible"):
        analyze([FLAT], min_variance_retention=keep)


@pytest.mark.parametrize("ranks", [[0], [4, -2]])
def test_an_impossible_candidate_is_an_error(ranks):
    with pytest.raises(RankError, match="not possible"):
        analyze([FLAT], target_ranks=ranks)


def test_the_unit_of_the_update_does_not_matter():
    times = lambda factor, one: spectrum(one.name, *(factor * value for value in one.singular_values))  # noqa: E731
    found, scaled = analyze([STEEP, FLAT]), analyze([times(2**-60, STEEP), times(2**-60, FLAT)])
    assert found.mean_variance == scaled.mean_variance
    assert found.energy_variance == scaled.energy_variance
