"""What vLLM, SGLang and llama.cpp make of an adapter, by their own loaders' rules."""

from __future__ import annotations

import math
import re

import pytest
from adapters import (
    PREFIX,
    WEIGHTS,
    read_config,
    relative,
)
from safetensors.torch import load_file


class NotLoadedError(Exception):
    pass


def factors(folder, infix=""):
    """Module name → lora_A and lora_B in float64; anything else in the file is refused. The prefix may be missing.

    infix
        what may stand between lora_A and .weight.
    """
    found = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        match = re.fullmatch(rf"(.+)\.lora_([AB]){infix}\.weight", key)
        if match is None:
            raise NotLoadedError(key)
        found.setdefault(match[1].removeprefix(PREFIX), {})[match[2]] = tensor.double()
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def as_vllm(folder, max_lora_rank=16):
    """peft_helper.py without patterns: one alpha / r (rsLoRA alpha / √r) for all, physical ranks from the tensors."""
    config = read_config(folder)
    if config.get("use_dora") or config.get("modules_to_save") or config["r"] > max_lora_rank:
        raise NotLoadedError(config)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    pairs = factors(folder)
    if any(len(down) > max_lora_rank for down, _ in pairs.values()):
        raise NotLoadedError("rank")
    return {name: scale * up @ down for name, (down, up) in pairs.items()}


def as_sglang(folder):
    """lora_config.py: entries that differ from r and lora_alpha are rejected; buffers of r rows; alpha / r."""
    config = read_config(folder)
    if config.get("peft_type", "").lower() != "lora":
        raise NotLoadedError("peft_type")
    differing = [rank for rank in config["rank_pattern"].values() if rank != config["r"]]
    differing += [alpha for alpha in config["alpha_pattern"].values() if alpha != config["lora_alpha"]]
    if differing or config.get("use_dora"):
        raise NotLoadedError(config)
    pairs = factors(folder, infix=r"(?:\.\w+)?")  # it looks for lora_A anywhere in a key
    if any(len(down) != config["r"] for down, _ in pairs.values()):
        raise NotLoadedError("shape")
    return {name: config["lora_alpha"] / config["r"] * up @ down for name, (down, up) in pairs.items()}


def as_llamacpp(folder):
    """convert_lora_to_gguf.py and the loader: lora_alpha over the rank of each tensor, nothing else is read."""
    alpha = float(read_config(folder)["lora_alpha"])
    return {name: alpha / up.shape[1] * up @ down for name, (down, up) in factors(folder).items()}


LOADERS = {"vllm": as_vllm, "sglang": as_sglang, "llamacpp": as_llamacpp}


def same_updates(found, expected, tolerance=1e-6):
    return found.keys() == expected.keys() and all(
        relative(found[name], expected[name]) <= tolerance for name in expected
    )


every_loader = pytest.mark.parametrize("runtime", LOADERS)
