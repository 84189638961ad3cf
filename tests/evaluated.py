"""Adapters with random factors on saved tiny models, for the tests that run them on data."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny import save_tiny_bert, save_tiny_llama

from lora_squeeze.models import load_model

__all__ = ["save_adapter", "save_world"]


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


def save_world(folder: Path) -> Path:
    """Two tiny models, "llama" and "bert", with two adapters each: "a" and "b", and the classifiers "c" and "d"."""
    language, classifier = save_tiny_llama(folder / "llama"), save_tiny_bert(folder / "bert")
    save_adapter(language, folder / "a", size=0.15)
    save_adapter(language, folder / "b", seed=1, r=3, size=0.15)
    save_adapter(classifier, folder / "c", task="SEQ_CLS", target_modules=["query", "value", "dense"])
    save_adapter(classifier, folder / "d", task="SEQ_CLS", seed=1, target_modules=["query"])
    return folder
