"""What PEFT calls its files, and what it puts before and behind the names of modules."""

from __future__ import annotations

__all__ = ["BIAS", "CONFIG", "PICKLED_WEIGHTS", "PREFIX", "WEIGHTS"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"

PREFIX = "base_model.model."
BIAS = ".lora_B.bias"
