"""Learning rates through the stages: what the scheduler says, warmed up anew, begun anew, and by rank."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lora_squeeze.annealing.schedule import Schedule
from lora_squeeze.errors import SettingsError

__all__ = ["AFTER_SWITCH", "Rates", "apply_rates", "warm", "wrap_scheduler"]

AFTER_SWITCH = ("continue", "rewarm", "restart")

# Those whose rates are a curve over `base_lrs`, or over the rate that there is: both can be changed on the way.
# OneCycleLR and CyclicLR, for two, keep rates of their own, and a change would last for one step.
_FOLLOWING: tuple[Any, ...] = (
    LambdaLR,
    MultiplicativeLR,
    StepLR,
    MultiStepLR,
    ConstantLR,
    LinearLR,
    ExponentialLR,
    PolynomialLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ReduceLROnPlateau,
)
_COMPOSITE = (SequentialLR, ChainedScheduler)


@dataclass(frozen=True)
class Rates:
    """What happens to the learning rate at a switch.

    after_switch
        "continue": nothing. "rewarm": from zero up to what the scheduler says, within `warmup_steps`.
        "restart": every stage runs through the scheduler's whole curve, at its own length.
    warmup_steps
        of "rewarm"; None: a tenth of the stage, at least one.
    by_rank
        a stage's rank → the base learning rate from its start on: that of the first param group that
        holds factors; the others that hold some are scaled in proportion. Stages that are not named
        go on with what there is.

    Raises SettingsError for other values.
    """

    after_switch: str = "continue"
    warmup_steps: int | None = None
    by_rank: Mapping[int, float] = field(default_factory=dict[int, float])

    def __post_init__(self) -> None:
        if self.after_switch not in AFTER_SWITCH:
            raise SettingsError(
                f"learning rate '{self.after_switch}' is not known; known are {', '.join(AFTER_SWITCH)}"
            )
        if self.warmup_steps is not None and (self.after_switch != "rewarm" or self.warmup_steps < 0):
            raise SettingsError(f"warmup_steps={self.warmup_steps} is for learning_rate='rewarm', and at least 0")
        if any(not rate > 0 for rate in self.by_rank.values()):
            raise SettingsError(f"learning rates must be above zero, not {dict(self.by_rank)}")

    def check(self, schedule: Schedule, scheduler: Any) -> None:
        """Raise SettingsError if these rates do not go with the schedule or the scheduler."""
        unknown = [rank for rank in self.by_rank if rank not in schedule.ranks]
        if unknown:
            raise SettingsError(f"a learning rate is given for rank {unknown[0]}, which is not among {schedule.ranks}")
        inner = _inner(scheduler)
        fixed = [one for one in _parts(inner) if not _follows(one)] if self.by_rank else []
        if fixed:
            known = ", ".join(kind.__name__ for kind in (*_FOLLOWING, *_COMPOSITE))
            raise SettingsError(
                f"learning_rates need a scheduler that is known to go on from another base rate, and not "
                f"{type(fixed[0]).__name__}, which may return to its own; use one of {known}, "
                "or leave learning_rates out"
            )
        if self.after_switch == "restart" and inner is None:
            raise SettingsError("learning_rate='restart' runs a scheduler's curve again: pass lr_scheduler")
        if self.after_switch != "continue" and inner is not None and not isinstance(inner, LambdaLR):
            raise SettingsError(
                f"learning_rate='{self.after_switch}' needs a scheduler that knows its value at every step, a "
                f"LambdaLR as transformers.get_scheduler returns, and not {type(inner).__name__}; use 'continue'"
            )

    def factor(self, schedule: Schedule, step: int) -> float:
        """What the scheduler's rate is multiplied by at the step that follows `step` others."""
        stage = schedule.stage_at(step)
        if self.after_switch != "rewarm" or stage == 0:
            return 1.0
        warmup = self.warmup_steps
        if warmup is None:
            warmup = max(schedule.lengths[stage] // 10, 1)
        return min((step - schedule.stages[stage].start + 1) / max(warmup, 1), 1.0)

    def scheduler_step(self, schedule: Schedule, step: int) -> int:
        """The scheduler's step whose value holds at this one."""
        stage = schedule.stage_at(step)
        if self.after_switch != "restart" or step >= schedule.steps:
            return step
        return round((step - schedule.stages[stage].start) * schedule.steps / max(schedule.lengths[stage], 1))


def wrap_scheduler(scheduler: Any, rates: Rates, schedule: Schedule) -> None:
    """Let a LambdaLR follow the stages from now on; where it is now included. Others are left alone."""
    inner = _inner(scheduler)
    if rates.after_switch == "continue" or not isinstance(inner, LambdaLR):
        return
    ticks = _ticks(scheduler)

    def staged(curve: Callable[[int], float]) -> Callable[[int], float]:
        def value(tick: int) -> float:
            step = tick // ticks
            return curve(rates.scheduler_step(schedule, step) * ticks) * rates.factor(schedule, step)

        return value

    inner.lr_lambdas = [staged(curve) for curve in inner.lr_lambdas]
    for group, base, curve in zip(inner.optimizer.param_groups, inner.base_lrs, inner.lr_lambdas, strict=True):
        _set(group, float(base) * curve(inner.last_epoch))
    _remember(inner)


def apply_rates(
    optimizer: Optimizer,
    scheduler: Any,
    rates: Rates,
    schedule: Schedule,
    *,
    step: int,
    factors: Collection[nn.Parameter],
) -> None:
    """The base learning rate of the stage that begins at this step."""
    rate = rates.by_rank.get(schedule.rank_at(step))
    inner = _inner(scheduler)
    groups = [group for group in optimizer.param_groups if any(_among(one, factors) for one in group["params"])]
    if rate is None or not groups:
        return
    ratio = rate / float(groups[0].get("initial_lr", groups[0]["lr"]))
    floor = _floor(inner)
    for group in groups:
        base = float(group.get("initial_lr", group["lr"]))
        _set(group, _scaled(float(group["lr"]), ratio, base=base, floor=floor))
        if "initial_lr" in group:
            group["initial_lr"] = base * ratio
    for one in (*_parts(inner), inner):
        if hasattr(one, "base_lrs"):
            one.base_lrs = [group["initial_lr"] for group in one.optimizer.param_groups]
        if one is not None:
            _remember(one)


def warm(
    optimizer: Optimizer, rates: Rates, schedule: Schedule, *, step: int, factors: Collection[nn.Parameter]
) -> None:
    """Without a scheduler: the learning rate of the next step."""
    if rates.after_switch != "rewarm":
        return
    for group in optimizer.param_groups:
        if any(_among(one, factors) for one in group["params"]):
            base = group.setdefault("initial_lr", float(group["lr"]))
            _set(group, float(base) * rates.factor(schedule, step))


def _inner(scheduler: Any) -> Any:
    """The torch scheduler inside of accelerate's wrapper."""
    while type(scheduler).__name__ == "AcceleratedScheduler":
        scheduler = scheduler.scheduler
    return scheduler


def _parts(inner: Any) -> Iterator[Any]:
    """The schedulers that a scheduler consists of, at any depth; one of its own kind is its only part."""
    if isinstance(inner, _COMPOSITE):
        for one in inner._schedulers:
            yield from _parts(one)
    elif inner is not None:
        yield inner


def _follows(scheduler: Any) -> bool:
    """Whether it is one of those known, or a class of one's own that computes its rates as they do."""
    return any(isinstance(scheduler, kind) and type(scheduler).get_lr is kind.get_lr for kind in _FOLLOWING)


def _floor(inner: Any) -> float:
    """The rate down to which the curve falls whatever its base is."""
    if isinstance(inner, SequentialLR):
        return _floor(inner._schedulers[bisect_right(inner._milestones, inner.last_epoch)])
    return float(getattr(inner, "eta_min", 0.0))


def _scaled(rate: float, ratio: float, *, base: float, floor: float) -> float:
    """What a rate of a curve from `base` down to `floor` is if the base is `ratio` times as high."""
    if not floor or base == floor:
        return rate * ratio
    return floor + (rate - floor) * (base * ratio - floor) / (base - floor)


def _ticks(scheduler: Any) -> int:
    """How often the inner scheduler steps for each step of the optimizer."""
    if type(scheduler).__name__ != "AcceleratedScheduler" or scheduler.split_batches:
        return 1
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _set(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _remember(scheduler: Any) -> None:
    scheduler._last_lr = [float(group["lr"]) for group in scheduler.optimizer.param_groups]


def _among(parameter: nn.Parameter, factors: Collection[nn.Parameter]) -> bool:
    return any(parameter is factor for factor in factors)
