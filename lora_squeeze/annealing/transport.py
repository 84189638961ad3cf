"""Optimizer state through a change of basis B' = B P, A' = Q A.

With G = ∂L/∂ΔW taken at the new update, ∂L/∂B' = c G A'ᵀ = (∂L/∂B) Qᵀ and ∂L/∂A' = Pᵀ (∂L/∂A). So

    gradient  gradients and their averages: B: X Qᵀ, A: Pᵀ X; exact
    point     displacements of the parameters themselves: B: X P, A: Q X; exact
    square    averages of squared gradients, element by element: B: X (Q∘Q)ᵀ, A: (P∘P)ᵀ X; an
              approximation that takes the latent directions' gradients as uncorrelated. New directions
              get the mean over the old ones, so that their first steps are not too long
    root      as `square`, for what is a root of it (Adamax)
    row, column  Adafactor's factored squares: multiplied out, mapped as `square`, and factored again
    kept      step counts and other numbers

Which state of which optimizer is which is written down in RULES, by the optimizer's full class name.
An optimizer that is not there is refused before anything is changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_squeeze.annealing import eightbit
from lora_squeeze.annealing.change import Change
from lora_squeeze.annealing.live import Site
from lora_squeeze.annealing.sharding import gathered, is_sharded, spread
from lora_squeeze.errors import SettingsError

__all__ = ["RULES", "STATES", "Carry", "carried", "check_optimizer", "check_state", "innermost"]

STATES = ("transport", "reset")

_ADAM = {"step": "kept", "exp_avg": "gradient", "exp_avg_sq": "square", "max_exp_avg_sq": "square"}

RULES: dict[str, Mapping[str, str]] = {
    "torch.optim.Adam": _ADAM,
    "torch.optim.AdamW": _ADAM,
    "torch.optim.RAdam": _ADAM,
    "torch.optim.NAdam": {**_ADAM, "mu_product": "kept"},
    "torch.optim.Adamax": {"step": "kept", "exp_avg": "gradient", "exp_inf": "root"},
    "torch.optim.Adagrad": {"step": "kept", "sum": "square"},
    "torch.optim.RMSprop": {
        "step": "kept",
        "square_avg": "square",
        "grad_avg": "gradient",
        "momentum_buffer": "point",  # of steps that were already divided by the root
    },
    "torch.optim.SGD": {"momentum_buffer": "gradient"},
    "torch.optim.Muon": {"momentum_buffer": "gradient"},
    "torch.optim.Adafactor": {"step": "kept", "row_var": "row", "col_var": "column", "variance": "square"},
    "transformers.optimization.Adafactor": {
        "step": "kept",
        "RMS": "kept",
        "exp_avg": "point",
        "exp_avg_sq_row": "row",
        "exp_avg_sq_col": "column",
        "exp_avg_sq": "square",
    },
    "lion_pytorch.lion_pytorch.Lion": {"exp_avg": "gradient"},
}


@dataclass(frozen=True)
class Carry:
    """Maps tensors of one parameter's shape to its shape after the change.

    site, side
        the module, and "down" (A) or "up" (B).
    changes
        one for each matrix that the parameter holds.
    """

    site: Site
    side: str
    changes: tuple[Change, ...]

    def __call__(self, tensor: Tensor, rule: str) -> Tensor:
        """Map one state by "gradient", "point", "square" or "root", in its own dtype; shards stay shards."""
        if rule == "root":
            return self(tensor.square(), "square").sqrt()
        down, given = self.side == "down", gathered(tensor)
        matrices = self.site.downs(given) if down else self.site.ups(given)
        mapped = torch.stack([self._one(*pair, rule) for pair in zip(matrices, self.changes, strict=True)])
        result = self.site.as_down(mapped) if down else self.site.as_up(mapped)
        return spread(result.contiguous().to(tensor.dtype), tensor)

    def _one(self, matrix: Tensor, change: Change, rule: str) -> Tensor:
        """(r, in) → (k, in), or (out, r) → (out, k)."""
        p, q = change.p, change.q
        down = self.side == "down"
        mix = {"gradient": p.T if down else q.T, "point": q if down else p}.get(rule)
        if mix is None:
            mix = (p * p).T if down else (q * q).T
        exact = matrix.to(mix)
        result = mix @ exact if down else exact @ mix
        if rule == "point" and change.fresh is not None and down:
            result[-len(change.fresh) :] = 0
        if rule == "square":
            self._fill(result, exact, change)
        return result

    def _fill(self, result: Tensor, before: Tensor, change: Change) -> None:
        """Squares of new directions: the mean over the old ones."""
        if self.side == "down":
            result[change.kept :] = before.mean(0)
        elif change.fresh is not None:
            result[:, -len(change.fresh) :] = before.mean(1, keepdim=True)


def innermost(optimizer: Any) -> Optimizer:
    """The torch optimizer inside of accelerate's wrapper."""
    while not isinstance(optimizer, Optimizer) or "AcceleratedOptimizer" in type(optimizer).__name__:
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise SettingsError(f"a {type(optimizer).__name__} is not a torch optimizer")
        optimizer = inner
    return optimizer


def check_state(state: str) -> None:
    """Raise SettingsError if this is not one of STATES."""
    if state not in STATES:
        raise SettingsError(f"state '{state}' is not known; known are {', '.join(STATES)}")


def check_optimizer(optimizer: Optimizer, *, state: str = "transport") -> None:
    """Raise SettingsError, by name and with what to do, if this optimizer's state cannot be carried along."""
    check_state(state)
    package = type(optimizer).__module__.partition(".")[0]
    if package == "deepspeed" or type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise SettingsError(
            f"{type(optimizer).__name__} divides its state among the processes, so ranks cannot change under it; "
            "train with DistributedDataParallel, or squeeze the adapter after the training"
        )
    if state == "transport":
        _rules_of(optimizer)


def carried(
    optimizer: Optimizer, carries: Mapping[nn.Parameter, Carry], *, state: str = "transport"
) -> dict[nn.Parameter, dict[str, Any]]:
    """The state that each parameter gets; empty where it starts anew. Nothing is changed here.

    Raises SettingsError for an optimizer, or an entry of its state, that is not in RULES.
    """
    check_optimizer(optimizer, state=state)
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter in carries]
    if state == "reset":
        return {parameter: {} for parameter in owned}
    rules = _rules_of(optimizer)
    new: dict[nn.Parameter, dict[str, Any]] = {}
    blockwise = eightbit.is_bitsandbytes(optimizer)
    for parameter in owned:
        before: dict[str, Any] = optimizer.state.get(parameter, {})
        if before and is_sharded(parameter) and (blockwise or {"row", "column"} & set(rules.values())):
            raise SettingsError(
                f"{_name(type(optimizer))}: its state under FSDP cannot be carried through a change of rank, as it is "
                "no tensor of the parameter's shape; take AdamW, or state='reset'"
            )
        unknown = [key for key, value in before.items() if key not in rules and value is not None]
        if unknown and not blockwise:
            raise SettingsError(f"{_refusal(optimizer)}: nothing is known of its state '{unknown[0]}'")
        if blockwise:
            new[parameter] = eightbit.carried_state(optimizer, parameter, rules, carries[parameter])
        else:
            new[parameter] = _carried_state(before, rules, carries[parameter])
    return new


def _carried_state(before: Mapping[str, Any], rules: Mapping[str, str], carry: Carry) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for key, value in before.items():
        rule = rules[key]
        if value is None or rule in ("kept", "row", "column"):
            new[key] = value
        else:
            new[key] = carry(value, rule)
    by_rule = {rule: key for key, rule in rules.items()}
    row, column = by_rule.get("row", ""), by_rule.get("column", "")
    if new.get(row) is not None:
        new[row], new[column] = _refactored(before[row], before[column], carry)
    return new


def _refactored(row: Tensor, column: Tensor, carry: Carry) -> tuple[Tensor, Tensor]:
    """Adafactor's means over columns and over rows of the squares: (…, m, 1) or (…, m), (…, 1, n) or (…, n)."""
    flat = row.dim() < len(carry.site.down.shape)
    rows, columns = (row.unsqueeze(-1), column.unsqueeze(-2)) if flat else (row, column)
    mean = rows.mean(dim=-2, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    squares = carry(rows / mean * columns, "square")
    new = squares.mean(dim=-1, keepdim=not flat), squares.mean(dim=-2, keepdim=not flat)
    return new[0].contiguous(), new[1].contiguous()


def _rules_of(optimizer: Optimizer) -> Mapping[str, str]:
    """The rules of the class, or of the one that it takes its `step` from."""
    if eightbit.is_bitsandbytes(optimizer):
        rules = eightbit.rules_of(optimizer)
        if rules is not None:
            return rules
    for kind in type(optimizer).__mro__:
        rules = RULES.get(_name(kind))
        if rules is not None and _step_of(kind) is _step_of(type(optimizer)):
            return rules
    raise SettingsError(_refusal(optimizer))


def _name(kind: type) -> str:
    module = "torch.optim" if kind.__module__.startswith("torch.optim.") else kind.__module__
    return f"{module}.{kind.__qualname__}"


def _step_of(kind: type) -> Callable[..., Any]:
    return inspect.unwrap(kind.step)  # pyright: ignore[reportAttributeAccessIssue]


def _refusal(optimizer: Optimizer) -> str:
    known: Sequence[str] = sorted({name.rpartition(".")[2] for name in RULES})
    return (
        f"{_name(type(optimizer))} is not an optimizer whose state can be carried through a change of "
        f"rank; take one of {', '.join(known)} or bitsandbytes' Adam, AdamW, Lion, SGD, RMSprop, Adagrad or LAMB, or "
        "start its state anew at every switch: state='reset'"
    )
