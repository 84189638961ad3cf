"""The state of bitsandbytes' optimizers, in 32 or 8 bits, through a change of basis.

8-bit states are numbers of a fixed table (`qmap`), scaled block by block (`absmax`): they are multiplied
out, carried as float32, and quantised again. A tensor that has become small enough by the switch stays
in float32, as bitsandbytes itself decides for small tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["carried_state", "is_bitsandbytes", "release", "rules_of"]

_BLOCK = 256  # numbers that share a scale, in bitsandbytes' blockwise optimizers

# bitsandbytes' name of the algorithm → what its states are.
_RULES: dict[str, Mapping[str, str]] = {
    "adam": {"state1": "gradient", "state2": "square"},
    "lamb": {"state1": "gradient", "state2": "square"},
    "lion": {"state1": "gradient"},
    "momentum": {"state1": "gradient"},
    "rmsprop": {"state1": "square"},
    "adagrad": {"state1": "square"},
}


def is_bitsandbytes(optimizer: Optimizer) -> bool:
    """Whether it is one of bitsandbytes' own classes."""
    return any(kind.__module__.partition(".")[0] == "bitsandbytes" for kind in type(optimizer).__mro__)


def rules_of(optimizer: Any) -> Mapping[str, str] | None:
    """What its states are; None for an algorithm that is not known here."""
    return _RULES.get(getattr(optimizer, "optimizer_name", ""))


def carried_state(
    optimizer: Any, parameter: nn.Parameter, rules: Mapping[str, str], carry: Callable[[Tensor, str], Tensor]
) -> dict[str, Any]:
    """The state of one parameter after the change."""
    before: dict[str, Any] = optimizer.state.get(parameter, {})
    if not before:
        return {}
    mapped = {key: carry(_numbers(before, key), rule) for key, rule in rules.items()}
    group_index, index = next(
        (group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, one in enumerate(group["params"])
        if one is parameter
    )
    # bitsandbytes itself lays out the state of a tensor of the new size.
    stand_in = nn.Parameter(torch.zeros_like(next(iter(mapped.values())), dtype=parameter.dtype))
    try:
        optimizer.init_state(optimizer.param_groups[group_index], stand_in, group_index, index)
    finally:
        new: dict[str, Any] = optimizer.state.pop(stand_in, {})
    new["step"] = before["step"]
    if "unorm_vec" in new:
        new["unorm_vec"].copy_(before["unorm_vec"])
    for key, numbers in mapped.items():
        _write(new, key, numbers)
    return new


def release(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Drop what a paged optimizer holds of a state that is not used any more."""
    manager = getattr(optimizer, "page_mng", None)
    if manager is not None:
        gone = {id(value) for value in state.values()}
        manager.paged_tensors = [tensor for tensor in manager.paged_tensors if id(tensor) not in gone]


def _numbers(state: Mapping[str, Any], key: str) -> Tensor:
    stored: Tensor = state[key]
    if stored.dtype != torch.uint8:
        return stored
    from bitsandbytes.functional import dequantize_blockwise

    suffix = key.removeprefix("state")
    return dequantize_blockwise(
        stored, absmax=state[f"absmax{suffix}"], code=state[f"qmap{suffix}"], blocksize=_BLOCK
    ).reshape(stored.shape)


def _write(state: dict[str, Any], key: str, numbers: Tensor) -> None:
    stored: Tensor = state[key]
    if stored.dtype != torch.uint8:
        stored.copy_(numbers)
        return
    from bitsandbytes.functional import quantize_blockwise

    suffix = key.removeprefix("state")
    quantised, scales = quantize_blockwise(numbers.contiguous(), code=state[f"qmap{suffix}"], blocksize=_BLOCK)
    stored.copy_(quantised.reshape(stored.shape))
    state[f"absmax{suffix}"].copy_(scales.absmax)
