"""The two functions of the `squeeze` document, with its names and arguments, and what they say when misused."""

import inspect

import pytest
import torch
from adapters import LLAMA, WEIGHTS, edit_config, effect, make_adapter, pair, relative, updates, write_raw
from safetensors.torch import load_file

from lora_squeeze import analyze_adapter, compress_adapter, fixed, open_adapter, squeeze
from lora_squeeze.errors import AdapterError, LoraSqueezeError, RankError


def test_the_signatures_are_those_of_the_document():
    signature = inspect.signature(analyze_adapter).parameters
    documented = {name: signature[name].default for name in list(signature)[:5]}
    assert documented == {
        "adapter_path": inspect.Parameter.empty,
        "source_rank": 0,
        "target_ranks": None,
        "min_variance_retention": 0.95,
        "device": "cpu",
    }
    signature = inspect.signature(compress_adapter).parameters
    documented = {name: signature[name].default for name in list(signature)[:4]}
    empty = inspect.Parameter.empty
    assert documented == {"adapter_path": empty, "output_path": empty, "target_rank": empty, "device": "cpu"}


def test_analyze_takes_its_arguments_by_position(tmp_path):
    source = make_adapter(tmp_path / "adapter")

    analysis = analyze_adapter(str(source), 8, [4, 2, 8], 0.9, "cpu")

    assert analysis.source == str(source)
    assert analysis.source_rank == 8
    assert analysis.target_ranks == (2, 4, 8)
    assert analysis.min_variance_retention == 0.9
    assert analysis.mean_variance[analysis.recommended_rank] >= 0.9
    assert all(analysis.mean_variance[k] < 0.9 for k in analysis.target_ranks if k < analysis.recommended_rank)


def test_the_attributes_of_the_document(tmp_path):
    source = make_adapter(tmp_path / "adapter", alpha_pattern={"v_proj": 3})
    expected = updates(LLAMA, source)

    analysis = analyze_adapter(source)

    assert analysis.target_ranks == (1, 2, 4, 8)
    assert {layer.name for layer in analysis.layers} == set(expected)
    shares = {k: [] for k in analysis.target_ranks}
    for layer in analysis.layers:
        sigma = torch.linalg.svdvals(expected[layer.name])[:8]
        energies = (sigma**2).cumsum(0) / (sigma**2).sum()
        assert layer.source_rank == 8
        assert list(layer.singular_values) == pytest.approx(sigma.tolist(), rel=1e-6)
        for k, share in layer.variance_at_rank.items():
            assert share == pytest.approx(float(energies[k - 1]))
            shares[k].append(share)
    for k, found in shares.items():
        assert analysis.mean_variance[k] == pytest.approx(sum(found) / len(found))
        assert analysis.min_variance[k] == min(found)
        assert analysis.max_variance[k] == max(found)


def test_the_recommended_rank_can_be_handed_on(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    rank = analyze_adapter(source, min_variance_retention=0.8).recommended_rank
    assert 1 < rank < 8
    compression = compress_adapter(source, tmp_path / "out", rank)
    assert compression.rank == rank
    lost = sum(layer.relative_error**2 for layer in compression.layers) / len(compression.layers)
    assert 1 - lost >= 0.8


def test_compress_takes_its_arguments_by_position(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    compress_adapter(str(source), str(tmp_path / "out"), 2, "cpu")
    assert relative(effect(LLAMA, tmp_path / "out"), effect(LLAMA, source, truncated_to=2)) <= 1e-5


@pytest.mark.parametrize("ranks", [None, [], ()], ids=str)
def test_no_candidates_mean_powers_of_two(tmp_path, ranks):
    source = make_adapter(tmp_path / "adapter", r=6)
    assert analyze_adapter(source, target_ranks=ranks).target_ranks == (1, 2, 4, 6)


def test_candidates_may_be_any_iterable(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    assert analyze_adapter(source, target_ranks=iter([3, 1])).target_ranks == (1, 3)
    assert analyze_adapter(source, target_ranks=range(1, 4)).target_ranks == (1, 2, 3)


def test_by_worst_looks_at_the_worst_layer(tmp_path):
    work, noise = torch.zeros(6, 4), torch.eye(6, 4)
    work[0, 0] = 1.0
    tensors = pair("work", 6, 4, 5) | pair("noise", 6, 4, 5)
    tensors |= {"work.lora_B.weight": work, "noise.lora_B.weight": noise, "noise.lora_A.weight": torch.eye(4, 5)}
    source = write_raw(tmp_path / "adapter", tensors)
    assert analyze_adapter(source, min_variance_retention=0.6).recommended_rank == 1
    assert analyze_adapter(source, min_variance_retention=0.6, by="worst").recommended_rank == 4


def test_every_layer_is_told(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    told: list[str] = []
    analyze_adapter(source, on_layer=told.append)
    assert told == list(open_adapter(source).layers)


def test_notes_of_the_adapter_reach_both_records(tmp_path):
    source = make_adapter(tmp_path / "adapter", use_dora=True)
    (source / "optimizer.pt").write_bytes(b"")
    for record in (analyze_adapter(source), compress_adapter(source, tmp_path / "out", 2)):
        assert any("DoRA" in note for note in record.notes)
        assert any("optimizer.pt" in note for note in record.notes)


def test_analyzing_leaves_the_folder_alone(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    analyze_adapter(source)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("declared", [4, 16, -8])
def test_a_declared_rank_that_is_wrong_is_an_error(tmp_path, declared):
    source = make_adapter(tmp_path / "adapter")
    with pytest.raises(RankError, match=rf"{declared} was declared.*{source} is 8"):
        analyze_adapter(source, declared)


def test_a_config_that_declares_too_much_is_an_error(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    edit_config(source, r=64)
    with pytest.raises(AdapterError, match="declares rank 64"):
        analyze_adapter(source)


@pytest.mark.parametrize("rank", [0, -2])
def test_a_rank_below_one_is_an_error(tmp_path, rank):
    source = make_adapter(tmp_path / "adapter")
    with pytest.raises(RankError, match=f"rank {rank}"):
        compress_adapter(source, tmp_path / "out", rank)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "allowed"), [({"method": "gramm"}, "gram"), ({"by": "median"}, "mean")], ids=["method", "by"]
)
def test_a_mistyped_option_of_analyze_says_what_is_allowed(tmp_path, option, allowed):
    source = make_adapter(tmp_path / "adapter")
    with pytest.raises((LoraSqueezeError, ValueError), match=rf"\b{allowed}\b"):
        analyze_adapter(source, **option)


@pytest.mark.parametrize(
    ("option", "allowed"), [({"method": "gramm"}, "gram"), ({"dtype": "int8"}, "BF16")], ids=["method", "dtype"]
)
def test_a_mistyped_option_of_compress_says_what_is_allowed_and_leaves_nothing(tmp_path, option, allowed):
    source = make_adapter(tmp_path / "adapter")
    with pytest.raises((LoraSqueezeError, ValueError), match=rf"\b{allowed}\b"):
        compress_adapter(source, tmp_path / "out", 2, **option)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_squeeze_is_compress_adapter_in_stations(tmp_path):
    source = make_adapter(tmp_path / "adapter", dtype=torch.bfloat16)
    adapter = open_adapter(source)
    by_stations = squeeze(adapter, fixed(adapter.layers.values(), 2), tmp_path / "stations", dtype="F32")
    in_one_call = compress_adapter(source, tmp_path / "call", 2, dtype="F32")
    first, second = (load_file(tmp_path / folder / WEIGHTS) for folder in ("stations", "call"))
    assert all(torch.equal(first[key], second[key]) for key in second)
    assert by_stations.layers == in_one_call.layers
