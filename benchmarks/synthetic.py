"""Adapters of real models' shapes with a decaying spectrum, generated on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lora_squeeze.formats.tensors import TensorSpec
from lora_squeeze.formats.writing import Block, write_safetensors


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama-like model whose seven linear modules a layer are adapted."""

    name: str
    layers: int
    hidden: int
    ffn: int
    kv: int

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Module name → (out_features, in_features)."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv, self.hidden),
            "self_attn.v_proj": (self.kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }


LLAMA_3_8B = Shape("Llama-3-8B", layers=32, hidden=4096, ffn=14336, kv=1024)
LLAMA_3_2_1B = Shape("Llama-3.2-1B", layers=16, hidden=2048, ffn=8192, kv=512)


def mixed_pair(out: int, inner: int, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(up, down) of an update whose singular values fall from 1 to about 1 %."""
    down = torch.randn(rank, inner, generator=generator) / inner**0.5
    # A random mixture, so that the decay shows in ΔW and not in the columns of one factor.
    decay = torch.logspace(0, -2, rank)[:, None] * torch.randn(rank, rank, generator=generator) / rank**0.5
    up = torch.randn(out, rank, generator=generator) / out**0.5 @ decay
    return up, down


def ill_conditioned_pair(
    out: int, inner: int, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(up, down) in float64, both with condition number 1e10 that no scaling of columns lowers."""

    def orthogonal(rows: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64)).Q

    decay = torch.logspace(0, -10, rank, dtype=torch.float64)
    up, down = ((orthogonal(rows) * decay) @ orthogonal(rank).T for rows in (out, inner))
    return up, down.T.contiguous()


Pair = Callable[[int, int, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def write_adapter(
    folder: Path, shape: Shape, *, rank: int = 64, dtype: torch.dtype = torch.bfloat16, pair: Pair = mixed_pair
) -> Path:
    """Write a PEFT adapter, layer by layer; `pair` makes the factors of each module."""
    folder.mkdir(parents=True)
    spelled = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}[dtype]
    blocks = []
    for layer in range(shape.layers):
        for module, (out, inner) in shape.modules.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            shapes = (rank, inner), (out, rank)
            specs = tuple(
                TensorSpec(f"{key}.lora_{factor}.weight", spelled, size, size[0] * size[1] * dtype.itemsize)
                for factor, size in zip("AB", shapes, strict=True)
            )
            make = partial(_stored, partial(pair, out, inner, rank), seed=len(blocks), dtype=dtype)
            blocks.append(Block(specs, make))
    write_safetensors(folder / "adapter_model.safetensors", blocks, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": shape.name,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(module.split(".")[-1] for module in shape.modules),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _stored(
    pair: Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]], *, seed: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    up, down = pair(torch.Generator().manual_seed(seed))
    return [down.to(dtype), up.to(dtype)]
