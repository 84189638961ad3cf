"""Spectra of a whole adapter, with the dense float64 SVD of what PEFT applies beside them."""

import math

import pytest
import torch
from adapters import BASES, LLAMA, PREFIX, edit_tensors, make_adapter, updates

from lora_squeeze import compress_adapter, decompose, open_adapter
from lora_squeeze.errors import AdapterError
from lora_squeeze.spectrum import METHODS


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("method", METHODS)
def test_spectra_are_those_of_the_updates_that_peft_applies(tmp_path, base, method):
    source = make_adapter(
        tmp_path / "adapter", base, use_rslora=True, alpha_pattern={"v_proj": 3, "value": 3, "first": 3}
    )

    spectra = decompose(open_adapter(source), method=method).spectra

    expected = updates(base, source)
    assert [spectrum.name for spectrum in spectra] == list(open_adapter(source).layers)
    for spectrum in spectra:
        dense = torch.linalg.svdvals(expected[spectrum.name])[: len(spectrum.singular_values)]
        assert torch.tensor(spectrum.singular_values).tolist() == pytest.approx(dense.tolist(), rel=1e-6)
        assert (spectrum.out_features, spectrum.in_features) == expected[spectrum.name].shape
        assert len(spectrum.singular_values) == min(spectrum.rank, *expected[spectrum.name].shape)


def test_layers_are_told_in_file_order(tmp_path, four_workers):
    adapter = open_adapter(make_adapter(tmp_path / "adapter"))
    told: list[str] = []
    decompose(adapter, on_layer=told.append)
    assert told == list(adapter.layers)


def test_the_number_of_workers_does_not_change_a_digit(tmp_path, four_workers):
    adapter = open_adapter(make_adapter(tmp_path / "adapter"))
    together = decompose(adapter)
    torch.set_num_threads(1)
    alone = decompose(adapter)
    assert together.spectra == alone.spectra
    for name in adapter.layers:
        assert torch.equal(together.basis(name).p, alone.basis(name).p)
        assert torch.equal(together.basis(name).q, alone.basis(name).q)


def test_bases_are_read_again_in_any_order(tmp_path):
    source = make_adapter(tmp_path / "adapter", LLAMA, r=40, rank_pattern={"v_proj": 3})  # r above some sizes
    decomposition = decompose(open_adapter(source))
    for spectrum in reversed(decomposition.spectra):
        found = decomposition.basis(spectrum.name)
        size = len(spectrum.singular_values)
        assert (found.p.shape, found.q.shape) == ((spectrum.rank, size), (size, spectrum.rank))
        scale = decomposition.adapter.layers[spectrum.name].scale
        assert (found.singular_values * scale).tolist() == pytest.approx(list(spectrum.singular_values), rel=1e-15)


def test_a_damaged_layer_is_named(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    name = "model.layers.1.mlp.down_proj"
    edit_tensors(source, lambda tensors: tensors[f"{PREFIX}{name}.lora_A.weight"][0, 0].fill_(math.inf))
    with pytest.raises(AdapterError, match=rf"'{name}'.*lora_A"):
        decompose(open_adapter(source))


def test_a_damaged_layer_is_named_with_its_adapter(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    edit_tensors(source, lambda tensors: next(iter(tensors.values())).fill_(math.nan))
    said = rf"{source}: layer '.+': lora_A holds NaN"
    with pytest.raises(AdapterError, match=said):
        decompose(open_adapter(source))
    with pytest.raises(AdapterError, match=said):
        compress_adapter(source, tmp_path / "out", 1)
