"""Factors of every shape, dtype and difficulty, and the dense float64 answer to compare with."""

import pytest
import torch
from torch import Tensor

from lora_squeeze import LoraLayer
from lora_squeeze.spectrum import METHODS

SHAPES = {  # out, in, rank
    "tall": (40, 12, 6),
    "wide": (12, 40, 6),
    "square": (24, 24, 8),
    "rank above out and in": (5, 7, 9),
    "rank above in": (30, 6, 9),
    "rank above out": (6, 30, 9),
    "rank one": (20, 30, 1),
    "one by one": (1, 1, 1),
    "very tall": (20000, 9, 4),
    "very wide": (9, 20000, 4),
}
DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
HALVES = [torch.float16, torch.bfloat16]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]

every_route = pytest.mark.parametrize("method", METHODS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def random_layer(shape, dtype=torch.float32, *, seed=0, scale=0.5, decay=0.7) -> LoraLayer:
    m, n, r = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = decay ** torch.arange(r, dtype=torch.float64)
    down = torch.randn(r, n, generator=generator, dtype=torch.float64) * sizes[:, None]
    up = torch.randn(m, r, generator=generator, dtype=torch.float64) * sizes
    return LoraLayer("layer", down.to(dtype), up.to(dtype), scale)


def dense(layer: LoraLayer) -> Tensor:
    return layer.scale * layer.up.double() @ layer.down.double()


def dense_svd(layer: LoraLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Of the effective update, cut to its possible rank."""
    u, s, vh = torch.linalg.svd(dense(layer), full_matrices=False)
    size = min(*layer.up.shape, layer.down.shape[1])
    return u[:, :size], s[:size], vh[:size]


def dense_truncation(layer: LoraLayer, rank: int) -> Tensor:
    u, s, vh = dense_svd(layer)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def relative(difference_of: Tensor, reference: Tensor) -> float:
    return float((difference_of - reference).norm() / reference.norm())


def _duplicate_columns(m, n, r):
    layer = random_layer((m, n, r))
    layer.up[:, 1:4] = layer.up[:, :1]
    return layer


def _duplicate_rows(m, n, r):
    layer = random_layer((m, n, r))
    layer.down[1:4] = layer.down[:1]
    return layer


def _zero_columns(m, n, r):
    layer = random_layer((m, n, r))
    layer.up[:, ::2] = 0
    return layer


def _cancelling(m, n, r):
    layer = random_layer((m, n, r))
    layer.up[:, 1] = layer.up[:, 0] * (1 + 1e-4)
    layer.down[1] = -layer.down[0]
    return layer


def _orthogonal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def _conditioned(m, n, r, *, up_exponent, down_exponent):
    up = _orthogonal(m, r, 1) * torch.logspace(0, up_exponent, r, dtype=torch.float64) @ _orthogonal(r, r, 2)
    down = _orthogonal(n, r, 3) * torch.logspace(0, down_exponent, r, dtype=torch.float64) @ _orthogonal(r, r, 4)
    return LoraLayer("layer", down.T.contiguous(), up, 0.5)


def _sized(m, n, r, *, up_exponent, down_exponent):
    layer = random_layer((m, n, r), torch.float64, decay=1.0)
    up_sizes, down_sizes = (
        torch.logspace(0, exponent, r, dtype=torch.float64) for exponent in (up_exponent, down_exponent)
    )
    return LoraLayer("layer", layer.down * down_sizes[:, None], layer.up * up_sizes, 0.5)


DIFFICULT = {
    "duplicate columns": _duplicate_columns(40, 30, 6),
    "duplicate rows": _duplicate_rows(40, 30, 6),
    "zero columns": _zero_columns(40, 30, 6),
    "cancelling columns": _cancelling(40, 30, 6),
    "up of condition 1e10": _conditioned(40, 30, 6, up_exponent=-10, down_exponent=0),
    "down of condition 1e10": _conditioned(40, 30, 6, up_exponent=0, down_exponent=-10),
    "both of condition 1e10": _conditioned(40, 30, 6, up_exponent=-10, down_exponent=-10),
    "up columns 1e8 apart": _sized(40, 30, 6, up_exponent=-8, down_exponent=0),
    "sizes 1e8 apart that multiply to one": _sized(40, 30, 6, up_exponent=-8, down_exponent=8),
    "sizes 1e8 apart that add up": _sized(40, 30, 6, up_exponent=8, down_exponent=8),
}
every_difficulty = pytest.mark.parametrize("layer", DIFFICULT.values(), ids=DIFFICULT)
