"""Adapters with random factors on saved tiny models, for the tests that run them on data."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from lora_squeeze.models import load_model

__all__ = ["save_adapter"]


def save_adapter(
    base: Path, folder: Path, *, task: str = "CAUSAL_LM", seed: int = 0, size: float = 0.2, **lora
) -> Path:
    """A LoRA whose factors, and whose head if it has one, are random."""
    kind = "causal-lm" if task == "CAUSAL_LM" else "sequence-classification"
    labels = () if task == "CAUSAL_LM" else ("negative", "positive")
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": task, **lora}
    model = get_peft_model(load_model(str(base), task=kind, labels=labels), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder))
    return folder
