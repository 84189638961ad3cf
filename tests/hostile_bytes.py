"""Sound adapters as bytes, and headers of any content, for hostile files to start from."""

from __future__ import annotations

import json
import struct

import torch
from hostile import Case
from safetensors.torch import save

# --- bytes --------------------------------------------------------------------------------------------------------


def safetensors_bytes(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header, sound or not; `length`: what it says that the header's length is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", (len(text) if length is None else length) % 2**64) + text + data


def entry(dtype: object, shape: object, start: object, end: object) -> dict[str, object]:
    """A tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LAYER = "model.layers.0.self_attn.q_proj"
KEYS = {
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "kohya": ("{}.lora_down.weight", "{}.lora_up.weight"),
    "diffusers": ("{}.lora_A.weight", "{}.lora_B.weight"),
}
NAMES = {"peft": LAYER, "kohya": "lora_unet_down_blocks_0_x", "diffusers": "unet.down_blocks.0.attn1.to_q"}


def tensors(form: str, *, rank: int = 2, count: int = 2) -> dict[str, torch.Tensor]:
    """A small sound adapter's tensors."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for number in range(count):
        down, up = (key.format(NAMES[form].replace("0", str(number), 1)) for key in KEYS[form])
        found[down] = torch.randn(rank, 5, generator=generator)
        found[up] = torch.randn(4, rank, generator=generator)
    return found


def sound(form: str, metadata: dict[str, str] | None = None) -> bytes:
    """A sound file's bytes."""
    return save(tensors(form), metadata=metadata or {"format": "pt"})


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "m"}


def peft(config: object = CONFIG, weights: bytes | None = None) -> Case:
    """A PEFT folder."""
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    return {
        "adapter/adapter_config.json": text,
        "adapter/adapter_model.safetensors": sound("peft") if weights is None else weights,
    }
