"""Layers that are decomposed together: to the bit what each of them is alone, whatever stands beside it."""

import pytest
import torch

from lora_squeeze import LoraLayer
from lora_squeeze.errors import AdapterError
from lora_squeeze.spectrum import METHODS, bases, basis


def layer(name, *, m=40, n=30, r=8, seed=0) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator)
    return LoraLayer(name, down, up, 1.0)


def company() -> list[LoraLayer]:
    """Layers that the second moments suffice for, and such that they do not, of several ranks."""
    dependent, zero, steep = layer("dependent", seed=2), layer("zero", seed=3), layer("steep", seed=4)
    dependent.down[3] = dependent.down[2]
    zero.up.zero_()
    steep.up[:, 1:] *= 1e-7
    return [layer("sound"), dependent, layer("other rank", r=5, seed=5), zero, steep, layer("sound, too", seed=6)]


@pytest.mark.parametrize("method", METHODS)
def test_layers_together_are_what_they_are_alone(method):
    layers = company()
    for one, found in zip(layers, bases(layers, method=method), strict=True):
        alone = basis(one, method=method)
        assert found.numerical_rank == alone.numerical_rank
        for field in ("singular_values", "p", "q", "growth"):
            assert torch.equal(getattr(found, field), getattr(alone, field)), (one.name, field)


def test_every_layer_has_its_own_numerical_rank():
    assert [found.numerical_rank for found in bases(company())] == [8, 7, 5, 0, 8, 8]


@pytest.mark.parametrize("method", METHODS)
def test_the_damaged_one_among_sound_ones_is_named(method):
    layers = company()
    layers[2].up[1, 1] = float("inf")
    with pytest.raises(AdapterError, match="layer 'other rank': lora_B holds NaN or infinite"):
        bases(layers, method=method)
