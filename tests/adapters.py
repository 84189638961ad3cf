"""Real PEFT adapters on tiny, randomly initialised models, and the dense float64 answer to compare with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer as PeftLoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Base:
    """A base model that comes out the same every time, inputs for it, and what LoRA targets in it."""

    build: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    lora: Mapping[str, Any]


def _llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def _bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=61, num_labels=3, **sizes))


def _gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4))


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 32)
        self.first = nn.Conv2d(4, 12, (3, 1), padding="same")
        self.second = nn.Conv2d(12, 10, 1)
        self.sequence = nn.Conv1d(10, 9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        image = self.embedding(tokens).unflatten(-1, (4, 8)).transpose(1, 2)  # (batch, 4, length, 8)
        return self.sequence(self.second(self.first(image).relu()).relu().flatten(2))


def _convolutions() -> nn.Module:
    torch.manual_seed(0)
    return _Convolutions()


_TOKENS = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(0))

LLAMA = Base(_llama, (_TOKENS,), {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]})
LLAMA_EMBEDDING = Base(_llama, (_TOKENS,), {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens", "q_proj"]})
BERT = Base(_bert, (_TOKENS,), {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"]})
GPT2 = Base(_gpt2, (_TOKENS,), {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True})
CONVOLUTIONS = Base(_convolutions, (_TOKENS,), {"target_modules": ["embedding", "first", "second", "sequence"]})
BASES = {"llama": LLAMA, "llama embedding": LLAMA_EMBEDDING, "bert": BERT, "gpt2": GPT2, "convolutions": CONVOLUTIONS}


def make_adapter(
    folder: Path,
    base: Base = LLAMA,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **lora: Any,
) -> Path:
    """Save an adapter with PEFT itself. All its tensors are random, with spectra that decay."""
    model = get_peft_model(base.build(), LoraConfig(**{"r": 8, "lora_alpha": 16, **base.lora, **lora}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = _random_like(name, parameter.data, generator).to(dtype or parameter.dtype)
    model.save_pretrained(str(folder))
    return folder


def _random_like(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    if "lora_" not in name or "bias" in name:
        return noise * 0.1
    if "magnitude" in name:
        return tensor * (1 + 0.1 * noise)
    rank_first = "_A" in name
    rank = tensor.shape[0 if rank_first else 1]
    sizes = 0.3 * 0.85 ** torch.arange(rank)
    return noise * (
        sizes.reshape(-1, *[1] * (tensor.ndim - 1)) if rank_first else sizes.reshape(1, -1, *tensor.shape[2:])
    )


def write_raw(
    folder: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None, **config: Any
) -> Path:
    """Write an adapter folder by hand: these tensors (prefix added), this configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{PREFIX}{key}": tensor.contiguous() for key, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata=metadata or {"format": "pt"},
    )
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    return folder


def pair(
    name: str, out: int, rank: int, inner: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A random lora_A / lora_B pair under the keys that `write_raw` takes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 0.7 ** torch.arange(rank)
    return {
        f"{name}.lora_A.weight": (torch.randn(rank, inner, generator=generator) * sizes[:, None]).to(dtype),
        f"{name}.lora_B.weight": (torch.randn(out, rank, generator=generator) * sizes).to(dtype),
    }


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of a saved configuration; `...` removes one."""
    config = {**read_config(folder), **fields}
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(kept))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change a saved adapter's tensors in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"}
    )


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def load(base: Base, folder: Path) -> PeftModel:
    """The model with the adapter, as PEFT loads it, in float64."""
    return PeftModel.from_pretrained(base.build(), str(folder)).double().eval()


def lora_modules(model: nn.Module) -> Iterator[tuple[str, PeftLoraLayer]]:
    """Module name (as lora-squeeze gives it) and module of everything that LoRA adapts."""
    for name, module in model.named_modules():
        if isinstance(module, PeftLoraLayer):
            yield name.removeprefix(PREFIX), module


def scales(base: Base, folder: Path) -> dict[str, float]:
    """Module name → the scale that PEFT gives it."""
    return {name: module.scaling["default"] for name, module in lora_modules(load(base, folder))}


def ranks(base: Base, folder: Path) -> dict[str, int]:
    """Module name → the rank that PEFT gives it."""
    return {name: module.r["default"] for name, module in lora_modules(load(base, folder))}


def updates(base: Base, folder: Path) -> dict[str, Tensor]:
    """Module name → scale · B · A as PEFT applies it, dense and in float64."""
    return {name: update(module) for name, module in lora_modules(load(base, folder))}


def factors(module: PeftLoraLayer) -> tuple[Tensor, Tensor]:
    """The parameters lora_A and lora_B of a module, as they are."""
    if module.lora_embedding_A:
        return module.lora_embedding_A["default"].data, module.lora_embedding_B["default"].data
    return module.lora_A["default"].weight.data, module.lora_B["default"].weight.data


def update(module: PeftLoraLayer) -> Tensor:
    """scale · B · A as PEFT applies it, dense and in float64; convolution kernels flattened."""
    down, up = (factor.double().flatten(1) for factor in factors(module))
    return module.scaling["default"] * up @ down


def truncation(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank, from the dense float64 SVD."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def truncate_in_place(model: PeftModel, rank: int) -> PeftModel:
    """Replace every update by its dense truncation; ranks, scales and all else stay as PEFT loaded them."""
    for _, module in lora_modules(model):
        down, up = factors(module)
        u, s, vh = torch.linalg.svd(up.double().flatten(1) @ down.double().flatten(1), full_matrices=False)
        kept = min(rank, len(s), len(down))
        new_up, new_down = torch.zeros_like(up.flatten(1)), torch.zeros_like(down.flatten(1))
        new_up[:, :kept], new_down[:kept] = u[:, :kept] * s[:kept], vh[:kept]
        up.copy_(new_up.reshape(up.shape))
        down.copy_(new_down.reshape(down.shape))
    return model


@torch.no_grad()
def output(model: nn.Module, base: Base) -> Tensor:
    result = model(*base.inputs)
    return getattr(result, "logits", result)


def effect(base: Base, folder: Path, *, truncated_to: int | None = None) -> Tensor:
    """What an adapter adds to the model's outputs; optionally after the dense truncation of its updates."""
    model = load(base, folder)
    if truncated_to is not None:
        truncate_in_place(model, truncated_to)
    return output(model, base) - output(base.build().double().eval(), base)


def relative(difference_of: Tensor, reference: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((difference_of - reference).norm() / reference.norm())


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


__all__ = [name for name in dir() if not name.startswith("_")]
