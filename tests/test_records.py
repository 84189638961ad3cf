"""Records hold numbers, compute what follows from them, and survive the way through JSON."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_squeeze import Analysis, Compression, Ranks, Spectrum, analyze
from lora_squeeze.errors import RankError
from lora_squeeze.records import LayerVariance, SqueezedLayer

THREE_FOUR = Spectrum("a", out_features=10, in_features=6, rank=5, singular_values=(4.0, 3.0))
ZERO = Spectrum("zero", out_features=10, in_features=6, rank=2, singular_values=(0.0, 0.0))


def test_energies_of_a_spectrum():
    assert THREE_FOUR.cumulative_energy == (0.0, 16.0, 25.0)
    assert THREE_FOUR.energy == 25.0
    assert THREE_FOUR.component_size == 16


@pytest.mark.parametrize(("rank", "share"), [(-1, 0.0), (0, 0.0), (1, 0.64), (2, 1.0), (3, 1.0), (100, 1.0)])
def test_retained_variance_at_a_rank(rank, share):
    assert THREE_FOUR.retained_variance(rank) == share
    assert THREE_FOUR.retained_energy(rank) == 25 * share


def test_a_layer_of_zeros_loses_nothing():
    assert ZERO.energy == 0.0
    assert [ZERO.retained_variance(rank) for rank in (0, 1, 2)] == [1.0, 1.0, 1.0]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_retained_variance_rises_from_zero_to_exactly_one(values):
    spectrum = Spectrum("a", 30, 30, len(values), tuple(sorted(values, reverse=True)))
    curve = [spectrum.retained_variance(rank) for rank in range(len(values) + 1)]
    assert curve == sorted(curve)
    assert curve[-1] == 1.0
    assert all(0 <= share <= 1 for share in curve)


def compression(*layers: SqueezedLayer) -> Compression:
    return Compression(
        source="in",
        output="out",
        policy="fixed=1",
        layers=layers,
        bytes_before=1000,
        bytes_after=250,
        parameters_before=80,
        parameters_after=20,
        notes=("a note",),
    )


def test_the_error_of_all_layers_weighs_each_by_its_energy():
    small = Spectrum("b", 10, 6, 3, (5.0, 0.0, 0.0))
    found = compression(SqueezedLayer(THREE_FOUR, 1, 0.6), SqueezedLayer(small, 1, 0.0), SqueezedLayer(ZERO, 1, 0.0))
    assert found.relative_error == pytest.approx(math.sqrt(9 / 50))
    assert found.retained_variance == pytest.approx(41 / 50)
    assert found.worst_layer.spectrum is THREE_FOUR
    assert found.rank == 1
    assert found.spectra == (THREE_FOUR, small, ZERO)


def test_nothing_is_lost_where_everything_is_zero():
    found = compression(SqueezedLayer(ZERO, 1, 0.0))
    assert found.relative_error == 0.0
    assert found.retained_variance == 1.0


def test_a_compression_as_json_holds_fields_and_totals():
    fields = json.loads(compression(SqueezedLayer(THREE_FOUR, 1, 0.6)).to_json())
    assert fields["record"] == "Compression"
    assert fields["bytes_after"] == 250
    assert fields["layers"][0]["spectrum"]["singular_values"] == [4.0, 3.0]
    assert fields["relative_error"] == pytest.approx(0.6)
    assert fields["retained_variance"] == pytest.approx(0.64)
    assert fields["notes"] == ["a note"]


SPECTRA = [
    Spectrum("model.ä.q_proj", 10, 6, 4, (0.1 + 0.2, 1e-17, 5e-324, 0.0)),
    Spectrum("model.b", 7, 8, 2, (1 / 3, 1e-300)),
]


def test_an_analysis_comes_back_from_json():
    analysis = analyze(SPECTRA, source="somewhere/ä", by="worst", min_variance_retention=0.9, notes=["mind: ü"])
    again = Analysis.from_json(analysis.to_json())
    assert again == analysis
    assert again.layers == analysis.layers
    assert again.mean_variance[1] == analysis.mean_variance[1]


def test_the_layers_of_an_analysis():
    first, _ = analyze(SPECTRA, target_ranks=[1, 2]).layers
    assert first == LayerVariance("model.ä.q_proj", 4, SPECTRA[0].singular_values, {1: 1.0, 2: 1.0})


def test_ranks_come_back_from_json():
    ranks = Ranks("fixed=2", {"model.ä": 2, "b": 1})
    assert Ranks.from_json(ranks.to_json()) == ranks
    assert ranks.largest == 2


def test_ranks_edited_by_hand_may_lack_a_policy():
    assert Ranks.from_json('{"record": "Ranks", "by_layer": {"a": 3}}') == Ranks("edited by hand", {"a": 3})


def test_ranks_that_were_edited_say_so():
    written = Ranks("para-energy=0.7", {"a": 3, "b": 2, "model.ä": 4}).to_json()
    fields = json.loads(written)
    edited = {**fields, "by_layer": {**fields["by_layer"], "a": 1}}
    found = Ranks.from_json(json.dumps(edited))
    assert found == Ranks("para-energy=0.7, edited by hand", {"a": 1, "b": 2, "model.ä": 4})
    assert Ranks.from_json(found.to_json()) == found
    once_more = {**json.loads(found.to_json()), "by_layer": {"a": 2}}
    assert Ranks.from_json(json.dumps(once_more)).policy == "para-energy=0.7, edited by hand"
    assert Ranks.from_json(json.dumps({**fields, "by_layer_sha256": 3})).policy == "para-energy=0.7, edited by hand"
    assert Ranks.from_json(json.dumps({**edited, "policy": "edited by hand"})).policy == "edited by hand"


def test_another_layout_or_no_digest_is_no_edit():
    fields = json.loads(Ranks("para-energy=0.7", {"a": 3, "model.ä": 4}).to_json())
    laid_out = {**fields, "by_layer": dict(reversed(fields["by_layer"].items()))}
    assert Ranks.from_json(json.dumps(laid_out, indent=7)).policy == "para-energy=0.7"
    older = {name: value for name, value in fields.items() if name != "by_layer_sha256"}
    assert Ranks.from_json(json.dumps({**older, "by_layer": {"a": 1}})) == Ranks("para-energy=0.7", {"a": 1})


NOT_A_RECORD = ["", "{", "[]", "null", "3", '"Ranks"', "{}", '{"record": "Other"}', '{"record": ["Ranks"]}']


@pytest.mark.parametrize("record", [Analysis, Ranks])
@pytest.mark.parametrize("text", NOT_A_RECORD)
def test_other_json_is_an_error(record, text):
    with pytest.raises(RankError):
        record.from_json(text)


def test_one_record_is_not_taken_for_another():
    with pytest.raises(RankError, match="Analysis"):
        Analysis.from_json(Ranks("fixed=2", {"a": 2}).to_json())


@pytest.mark.parametrize(
    "by_layer", [None, [], 3, {"a": "2"}, {"a": 2.0}, {"a": True}, {"a": None}, {"a": [2]}], ids=str
)
def test_ranks_that_are_no_whole_numbers_are_an_error(by_layer):
    with pytest.raises(RankError, match="by_layer"):
        Ranks.from_json(json.dumps({"record": "Ranks", "policy": "by hand", "by_layer": by_layer}))


@pytest.mark.parametrize(
    "change",
    [
        {"spectra": ...},
        {"recommended_rank": ...},
        {"mean_variance": ...},
        {"surprise": 1},
        {"mean_variance": 5},
        {"mean_variance": {"one": 0.5}},
        {"mean_variance": {"1": None}},
        {"spectra": 7},
        {"spectra": [1]},
        {"spectra": [{"name": "a"}]},
        {"target_ranks": 4},
        {"target_ranks": ["a"]},
        {"recommended_rank": "four"},
        {"recommended_rank": None},
        {"spectra": [{"name": "a", "out_features": 2, "in_features": 2, "rank": 1, "singular_values": "1"}]},
        {"spectra": [{"name": "a", "out_features": 2, "in_features": 2, "rank": 1, "singular_values": [None]}]},
    ],
    ids=str,
)
def test_a_damaged_analysis_is_an_error(change):
    fields = {**json.loads(analyze(SPECTRA).to_json()), **change}
    with pytest.raises(RankError):
        Analysis.from_json(json.dumps({key: value for key, value in fields.items() if value is not ...}))


@pytest.mark.parametrize("record", [analyze(SPECTRA), Ranks("fixed=2", {"a": 2})], ids=["Analysis", "Ranks"])
def test_a_record_cut_short_is_an_error(record):
    text = record.to_json()
    for length in range(0, len(text) - 1, max(1, len(text) // 40)):
        with pytest.raises(RankError):
            type(record).from_json(text[:length])
