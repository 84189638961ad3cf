"""What PEFT calls its files, and what it puts before the names of all modules."""

from __future__ import annotations

__all__ = ["CONFIG", "PICKLED_WEIGHTS", "PREFIX", "WEIGHTS"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"

PREFIX = "base_model.model."
