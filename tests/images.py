"""Small image models and adapters in the formats of image generation, made by the libraries themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from adapters import lora_modules, update
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "proj_in", "time_emb_proj"]


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
    )


def text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )


@torch.no_grad()
def unet_output(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
    words = torch.randn(1, 5, 12, generator=generator, dtype=torch.float64)
    return model.double().eval()(image, torch.tensor(7), words).sample


def with_lora(model: nn.Module, *, seed: int = 0, dtype: torch.dtype | None = None, **lora: Any) -> nn.Module:
    """Add a random LoRA with diffusers' (or transformers') own add_adapter."""
    model.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": TARGETS, **lora}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (parameter.data + noise if "magnitude" in name else noise * 0.3).to(dtype or torch.float32)
    return model


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model)


def load_unet(file: Path) -> nn.Module:
    """The UNet with the adapter of a file, as StableDiffusionPipeline loads it."""
    from diffusers import StableDiffusionPipeline

    model = unet()
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        str(file), unet_config=model.config, return_lora_metadata=True
    )
    assert all("lora" in key for key in state)  # what load_lora_weights asks of a file
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, model, adapter_name="default", metadata=metadata)
    return model


def load_flux(file: Path) -> nn.Module:
    """The Flux transformer with the adapter of a file, as FluxPipeline loads it."""
    from diffusers import FluxPipeline

    model = flux()
    state, alphas, metadata = FluxPipeline.lora_state_dict(str(file), return_alphas=True, return_lora_metadata=True)
    FluxPipeline.load_lora_into_transformer(state, alphas, model, adapter_name="default", metadata=metadata)
    return model


def updates_in(model: nn.Module) -> dict[str, Tensor]:
    """Module name → the dense update that is applied there, in float64."""
    return {name: update(module) for name, module in lora_modules(model)}


def kohya_pair(
    name: str, out: int, rank: int, inner: int, *, kernel: tuple[int, ...] = (), alpha: Any = None, dtype=torch.float32
) -> dict[str, Tensor]:
    """A random module under kohya's names; alpha: a number (stored as the factors are) or a tensor."""
    generator = torch.Generator().manual_seed(out + inner)
    ones = (1,) * len(kernel)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(rank, inner, *kernel, generator=generator).to(dtype),
        f"{name}.lora_up.weight": torch.randn(out, rank, *ones, generator=generator).to(dtype),
    }
    if alpha is not None:
        tensors[f"{name}.alpha"] = alpha if isinstance(alpha, Tensor) else torch.tensor(alpha, dtype=dtype)
    return tensors


def save(file: Path, *parts: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    tensors = {key: tensor.contiguous() for part in parts for key, tensor in part.items()}
    save_file(tensors, file, metadata=metadata)
    return file


def kohya_updates(file: Path) -> dict[str, Tensor]:
    """Module → alpha / rank · up · down of a kohya file, read without lora-squeeze."""
    tensors = load_file(file)
    found: dict[str, Tensor] = {}
    for key in tensors:
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            down, up = tensors[key].double(), tensors[f"{name}.lora_up.weight"].double()
            if f"{name}.lora_mid.weight" in tensors:
                middle = tensors[f"{name}.lora_mid.weight"].double()
                down = torch.einsum("ijkl,jc->ickl", middle, down.flatten(1))
            rank = up.shape[1]
            scale = float(tensors[f"{name}.alpha"]) / rank if f"{name}.alpha" in tensors else 1.0
            found[name] = scale * up.flatten(1) @ down.flatten(1)
    return found


__all__ = [name for name in dir() if not name.startswith("_")]
