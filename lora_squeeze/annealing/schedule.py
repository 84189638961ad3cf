"""Schedules: which rank is in force after how many steps. Pure numbers, no tensors.

In-Squeeze (LoRA-Squeeze, arXiv 2602.10993) lowers the rank in stages during one training run:

    standard    each stage has steps in proportion to its rank
    minimum     200 steps for each stage first, what remains in proportion to its rank
    equal       the same number of steps for each stage
    inverse     steps in inverse proportion to the rank: most of them at the lowest
    post        Post-Squeeze: one squeeze after the last step
    cont        Cont-Squeeze: one squeeze, then 200 steps at the lower rank

A schedule has one spelling everywhere: `minimum=100` on the command line and in TOML is the function
`minimum(ranks, steps, least=100)` here, and "64@0, 16@500, 4@80%" lists the stages themselves.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

from lora_squeeze.errors import RankError, SettingsError

__all__ = [
    "SCHEDULES",
    "Schedule",
    "Stage",
    "cont",
    "custom",
    "equal",
    "geometric_ranks",
    "inverse",
    "linear_ranks",
    "minimum",
    "parse_schedule",
    "post",
    "standard",
]

LEAST_STEPS = 200  # of a stage in "Minimum Steps", and of the last one in Cont-Squeeze


@dataclass(frozen=True)
class Stage:
    """A rank, and the number of optimizer steps after which it comes into force."""

    start: int
    rank: int


@dataclass(frozen=True)
class Schedule:
    """Stages of falling rank over a training run of so many optimizer steps.

    The first stage starts at step 0. A stage that starts at the last step is a squeeze of the finished
    adapter. Raises RankError for ranks and starts that do not follow one another.
    """

    stages: tuple[Stage, ...]
    steps: int
    spelling: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of the stages, in their order."""
        return tuple(stage.rank for stage in self.stages)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps of each stage; the last one may have none."""
        ends = [*self._starts[1:], self.steps]
        return tuple(end - start for start, end in zip(self._starts, ends, strict=True))

    def stage_at(self, step: int) -> int:
        """The number (from 0) of the stage in force once `step` optimizer steps have been made."""
        return max(bisect_right(self._starts, step) - 1, 0)

    def rank_at(self, step: int) -> int:
        """The rank in force once `step` optimizer steps have been made; beyond the end, the last."""
        return self.stages[self.stage_at(step)].rank

    def to_json(self) -> str:
        """All fields; `from_json` reads them back."""
        return json.dumps({"record": "Schedule", **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read what `to_json` wrote. Raises SettingsError if the text is something else."""
        try:
            fields = json.loads(text)
            if fields["record"] != "Schedule":
                raise ValueError(f"it is a {fields['record']} record")
            stages = tuple(Stage(int(stage["start"]), int(stage["rank"])) for stage in fields["stages"])
            return cls(stages, int(fields["steps"]), str(fields["spelling"]))
        except (KeyError, TypeError, ValueError) as error:
            raise SettingsError(f"not a Schedule record: {error}") from error

    @cached_property
    def _starts(self) -> list[int]:
        return [stage.start for stage in self.stages]


def standard(ranks: Sequence[int], steps: int) -> Schedule:
    """In-Squeeze "Standard": steps in proportion to the rank."""
    return _staged("standard", ranks, _shares(ranks, steps), steps)


def minimum(ranks: Sequence[int], steps: int, *, least: int = LEAST_STEPS) -> Schedule:
    """In-Squeeze "Minimum Steps": `least` steps a stage, the rest in proportion to the rank."""
    rest = steps - least * len(ranks)
    if least < 1 or rest < 0:
        raise SettingsError(
            f"minimum={least} is not possible: {len(ranks)} stages of at least {least} steps need "
            f"{least * len(ranks)} steps, and there are {steps}; take fewer ranks or a smaller minimum, such as "
            f"minimum={max(steps // (2 * len(ranks)), 1)}"
        )
    return _staged(f"minimum={least}", ranks, [least + share for share in _shares(ranks, rest)], steps)


def equal(ranks: Sequence[int], steps: int) -> Schedule:
    """The same number of steps for every rank."""
    return _staged("equal", ranks, _shares([1] * len(ranks), steps), steps)


def inverse(ranks: Sequence[int], steps: int) -> Schedule:
    """Steps in inverse proportion to the rank."""
    _check_ranks(ranks)
    return _staged("inverse", ranks, _shares([1 / rank for rank in ranks], steps), steps)


def post(ranks: Sequence[int], steps: int) -> Schedule:
    """Post-Squeeze: all steps at the first rank, one squeeze to the last after them."""
    return _once("post", ranks, steps, at=steps)


def cont(ranks: Sequence[int], steps: int, *, after: int = LEAST_STEPS) -> Schedule:
    """Cont-Squeeze: one squeeze from the first rank to the last, `after` of the steps after it."""
    if not 0 < after < steps:
        raise SettingsError(f"cont={after} is not possible: of {steps} steps, some must come before the squeeze")
    return _once(f"cont={after}", ranks, steps, at=steps - after)


def custom(stages: Sequence[tuple[int, int]], steps: int) -> Schedule:
    """Your own (step, rank) pairs; the first step is 0."""
    return Schedule(tuple(Stage(start, rank) for start, rank in stages), steps, _listed(stages))


def geometric_ranks(source: int, target: int, *, factor: float = 2.0) -> tuple[int, ...]:
    """From source to target, each rank the one before divided by `factor`: 64, 32, 16, 8."""
    if not (source >= target >= 1 and factor > 1):
        raise RankError(
            f"ranks from {source} down to {target} by a factor of {factor:g} are not possible: the target must be at "
            f"least 1 and at most {source}, the rank that training starts at"
        )
    count = math.ceil(round(math.log(source / target, factor), 9))
    between = (round(source / factor**power) for power in range(1, count))
    return _distinct([source, *between, target])


def linear_ranks(source: int, target: int, *, count: int) -> tuple[int, ...]:
    """From source to target in `count` ranks at equal distances: 64, 45, 27, 8."""
    if not (source >= target >= 1 and (count > 1 or (count == 1 and source == target))):
        raise RankError(f"{count} ranks from {source} down to {target} are not possible")
    return _distinct([round(source + (target - source) * index / max(count - 1, 1)) for index in range(count)])


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    function.__name__: function for function in (standard, minimum, equal, inverse, post, cont)
}
_VALUES = {"minimum": "least", "cont": "after"}
_STAGE = re.compile(r"\s*(\d+)\s*@\s*(\d+(?:\.\d+)?)\s*(%?)\s*")


def parse_schedule(
    spelling: str,
    *,
    steps: int,
    ranks: Sequence[int] | None = None,
    source: int | None = None,
    target: int | None = None,
    spacing: str = "geometric",
) -> Schedule:
    """Read "NAME", "NAME=VALUE" or a list "RANK@STEP, RANK@PERCENT%, …" for a run of so many steps.

    ranks
        of the stages; or
    source, target, spacing
        the first and the last of them, and how the others lie between: "geometric" (halving), or
        "linear" (as many of them, at equal distances).

    Raises SettingsError for another spelling or an impossible number of steps, RankError for ranks, also
    for a list that begins above `source`, the rank that there is.
    """
    if "@" in spelling:
        if ranks is not None or target is not None:
            raise SettingsError(f"schedule '{spelling}' lists its ranks itself; leave out ranks and target")
        listed = custom(_read_stages(spelling, steps), steps)
        _check_start(listed.ranks[0], source)
        return listed
    name, separator, text = (part.strip() for part in spelling.partition("="))
    if name not in SCHEDULES or (separator and name not in _VALUES):
        known = ", ".join(f"{one}[=STEPS]" if one in _VALUES else one for one in SCHEDULES)
        raise SettingsError(f"unknown schedule '{spelling}'; known are {known}, and a list such as '64@0, 8@75%'")
    if separator and not re.fullmatch(r"\d+", text):
        raise SettingsError(f"schedule '{spelling}': '{text}' is not a number of steps")
    options = {_VALUES[name]: int(text)} if separator else {}
    return SCHEDULES[name](_chosen_ranks(ranks, source, target, spacing), steps, **options)


def _chosen_ranks(ranks: Sequence[int] | None, source: int | None, target: int | None, spacing: str) -> tuple[int, ...]:
    if ranks is not None and target is not None:
        raise SettingsError(
            f"the ranks {list(ranks)} and the target {target} are two answers to one question: give one"
        )
    if ranks is not None:
        if source is not None and source != ranks[0]:
            raise RankError(f"the first of the ranks is {ranks[0]}, but training starts at rank {source}")
        return tuple(ranks)
    if source is None or target is None:
        raise SettingsError("a schedule needs its ranks, or the first and the last of them")
    halving = geometric_ranks(source, target)
    if spacing == "geometric":
        return halving
    if spacing == "linear":
        return linear_ranks(source, target, count=len(halving))
    raise SettingsError(f"spacing '{spacing}' is not known; known are geometric, linear")


def _check_start(first: int, source: int | None) -> None:
    if source is not None and first > source:
        raise RankError(
            f"the schedule starts at rank {first}, but training starts at rank {source}; begin the list with {source}@0"
        )


def _read_stages(spelling: str, steps: int) -> list[tuple[int, int]]:
    stages: list[tuple[int, int]] = []
    for part in spelling.split(","):
        match = _STAGE.fullmatch(part)
        if match is None or ("." in match[2] and not match[3]):
            raise SettingsError(f"schedule '{spelling}': '{part.strip()}' is not RANK@STEP or RANK@PERCENT%")
        position = round(float(match[2]) / 100 * steps) if match[3] else int(match[2])
        stages.append((position, int(match[1])))
    return stages


def _once(spelling: str, ranks: Sequence[int], steps: int, *, at: int) -> Schedule:
    _check_ranks(ranks)
    return Schedule((Stage(0, ranks[0]), Stage(at, ranks[-1])), steps, spelling)


def _staged(spelling: str, ranks: Sequence[int], lengths: Sequence[int], steps: int) -> Schedule:
    if 0 in lengths:
        rank = ranks[list(lengths).index(0)]
        raise SettingsError(
            f"{spelling}: {steps} steps leave none for rank {rank}; take fewer ranks or more steps, or minimum=1"
        )
    starts = accumulate(lengths[:-1], initial=0)
    return Schedule(tuple(map(Stage, starts, ranks)), steps, spelling)


def _shares(weights: Sequence[float], steps: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `steps` (largest remainders)."""
    if not weights or min(weights) <= 0:
        raise RankError(f"the ranks of a schedule are whole numbers of at least 1, not {list(weights)}")
    exact = [steps * weight / sum(weights) for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: steps - sum(shares)]:
        shares[index] += 1
    return shares


def _distinct(ranks: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ranks))


def _listed(stages: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{rank}@{start}" for start, rank in stages)


def _check_ranks(ranks: Sequence[int]) -> None:
    if not ranks or any(type(rank) is not int or rank < 1 for rank in ranks):
        raise RankError(f"the ranks of a schedule are whole numbers of at least 1, not {list(ranks)}")


def _check(schedule: Schedule) -> None:
    stages = schedule.stages
    _check_ranks(schedule.ranks)
    if stages[0].start != 0:
        raise RankError(f"the first stage starts at step {stages[0].start}; it must start at 0")
    for before, after in pairwise(stages):
        if after.rank >= before.rank:
            raise RankError(f"rank {after.rank} cannot follow rank {before.rank}: a squeeze lowers the rank")
        if after.start <= before.start:
            raise RankError(f"rank {after.rank} starts at step {after.start}, not after rank {before.rank}")
    if stages[-1].start > schedule.steps or schedule.steps < 0:
        raise RankError(
            f"rank {stages[-1].rank} starts at step {stages[-1].start}, after the last of {schedule.steps} steps"
        )
