"""What a training changes is held in float32, whatever the dtype of the model around it.

PEFT does so with factors, but copies the modules that are trained as a whole (a classifier's head) in the
model's own dtype: float16 gradients cannot be unscaled, and small steps of bfloat16 weights are lost.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lora_squeeze.extras import require

__all__ = ["hold_in_float32"]


def hold_in_float32(model: Any, *, name: str = "default") -> None:
    """Hold an adapter's modules that are trained as a whole in float32; what goes in and out keeps its dtype."""
    torch = require("torch", "train")
    wrapper = require("peft.utils", "train").ModulesToSaveWrapper
    for module in [one for one in model.modules() if isinstance(one, wrapper)]:
        if name not in module.modules_to_save:
            continue
        trained = module.modules_to_save[name]
        halves = {one.dtype for one in trained.parameters()} & {torch.float16, torch.bfloat16}
        if halves:
            trained.float()
            # Autocast would do, but generating and evaluating happen outside of it, too.
            trained.register_forward_pre_hook(_widened, with_kwargs=True)
            trained.register_forward_hook(partial(_narrowed, halves.pop()))


def _widened(_module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch = require("torch", "train")
    return (
        tuple(_in_dtype(one, torch.float32) for one in given),
        {key: _in_dtype(one, torch.float32) for key, one in named.items()},
    )


def _narrowed(dtype: Any, _module: Any, _given: Any, made: Any) -> Any:
    return tuple(_in_dtype(one, dtype) for one in made) if type(made) is tuple else _in_dtype(made, dtype)


def _in_dtype(value: Any, dtype: Any) -> Any:
    torch = require("torch", "train")
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
