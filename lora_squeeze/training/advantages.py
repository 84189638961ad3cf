"""Rewards of a group of completions → how much better than the group each of them is.

`rewards` is (prompts, completions of each); so is the result. A function of one's own has the same
form, and `transform(advantages, batch)` may afterwards turn (completions,) into (completions,) or,
token by token, (completions, tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from lora_squeeze.dotted import import_function
from lora_squeeze.errors import SettingsError

__all__ = ["ADVANTAGES", "LOSSES", "Advantage", "Transform", "advantage_of", "dr_grpo", "grpo", "maxrl", "transform_of"]

Advantage: TypeAlias = Callable[[Tensor], Tensor]
Transform: TypeAlias = Callable[[Tensor, dict[str, Any]], Tensor]

_TINY = 1e-4  # as in TRL: a group of almost equal rewards teaches almost nothing


def grpo(rewards: Tensor) -> Tensor:
    """(r − mean) / std of the group (arXiv 2402.03300)."""
    return _centred(rewards) / (rewards.std(dim=1, keepdim=True) + _TINY)


def dr_grpo(rewards: Tensor) -> Tensor:
    """r − mean of the group: without the division, hard and easy prompts count alike (arXiv 2503.20783)."""
    return _centred(rewards)


def maxrl(rewards: Tensor) -> Tensor:
    """(r − mean) / mean of the group, 0 where no completion earned anything: rare successes count more."""
    mean = rewards.mean(dim=1, keepdim=True)
    return (_centred(rewards) / mean.clamp(min=_TINY)).where(mean > _TINY, rewards.new_zeros(()))


ADVANTAGES: dict[str, Advantage] = {"grpo": grpo, "dr_grpo": dr_grpo, "maxrl": maxrl}

# How token losses are averaged (TRL's loss_type): by sequence, over a constant length, over all tokens.
LOSSES = {"grpo": "grpo", "dr_grpo": "dr_grpo"}


def advantage_of(mode: str) -> Advantage:
    """The function that `[algorithm] advantage_mode` names: grpo, dr_grpo, maxrl, or package.module.function."""
    if mode in ADVANTAGES:
        return ADVANTAGES[mode]
    if "." not in mode and ":" not in mode:
        known = ", ".join(ADVANTAGES)
        raise SettingsError(
            f"[algorithm] advantage_mode '{mode}' is unknown; known are {known} and package.module.function"
        )
    return import_function(mode, key="[algorithm] advantage_mode")


def transform_of(mode: str) -> Transform | None:
    """The function that `[algorithm] transform_mode` names: none, or package.module.function."""
    if mode == "none":
        return None
    if "." not in mode and ":" not in mode:
        raise SettingsError(
            f"[algorithm] transform_mode '{mode}' is unknown; known are none and package.module.function"
        )
    return import_function(mode, key="[algorithm] transform_mode")


def _centred(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean(dim=1, keepdim=True)
