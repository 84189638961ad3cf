"""Tensors of every dtype as blocks of a file, and as bytes."""

import torch

from lora_squeeze.formats.tensors import (
    TensorSpec,
)
from lora_squeeze.formats.writing import Block

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in {**FLOATS, **OTHERS}.items()}


def spec(key: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(key, NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())


def blocks(tensors: dict[str, torch.Tensor]) -> list[Block]:
    """One block a tensor."""
    return [Block((spec(key, tensor),), lambda tensor=tensor: [tensor]) for key, tensor in tensors.items()]


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
