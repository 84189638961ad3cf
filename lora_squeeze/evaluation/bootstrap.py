"""How sure a number is: paired bootstrap over examples.

Examples are drawn with replacement, the same ones for all adapters; the spread of a difference over
the draws says how far it could be chance. What two adapters get right and wrong together then cancels.

Of few examples the draws spread too little: they hold no value that the examples do not, and of two they
are on the same side of 0 half of the time. So below `MANY` examples the interval of a difference is as
wide as Student's t has it, too, and below `LEAST` there is no verdict at all: that all of so few point
the same way happens by chance more often than once in twenty, whatever they are (the sign test).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_squeeze.evaluation.scoring import RELATIVE, Scores
from lora_squeeze.measurements import Estimate
from lora_squeeze.student import LEVEL, standard_errors

__all__ = ["DRAWS", "HIGHER_IS_BETTER", "LEAST", "estimates", "judged", "share_of_draws"]

DRAWS = 2000
LEAST = 6  # 2 · 2⁻⁵ is above 1 − LEVEL, 2 · 2⁻⁶ below
MANY = 100  # from here on the draws and Student's t agree to a few per cent
HIGHER_IS_BETTER = ("accuracy", "accuracy-norm", "agreement")

_NORMAL = standard_errors(sys.maxsize)  # 1.96
_NUMBERS_AT_A_TIME = 1 << 24


def estimates(
    scores: Sequence[Scores], metrics: Sequence[str], *, draws: int = DRAWS, seed: int = 0
) -> list[dict[str, Estimate]]:
    """Every metric of every adapter with its interval, and its difference to the first adapter's.

    Intervals are the middle 95 % of the draws, those of differences at least as wide as Student's t has them where
    there are few examples; one example has none. A difference whose interval holds 0 is within noise.
    """
    examples = len(scores[0][metrics[0]][0])
    names = [(number, metric) for number in range(len(scores)) for metric in metrics]
    sums = torch.stack([torch.stack(scores[number][metric]) for number, metric in names])  # (names, 2, examples)
    drawn = torch.cat([_ratio(part) for part in _draws(sums, draws, seed)], dim=1)  # (names, draws)
    values = _ratio(sums.sum(-1, keepdim=True))[:, 0]
    for place, (_, metric) in enumerate(names):
        if metric == "perplexity":
            values[place], drawn[place] = values[place].exp(), drawn[place].exp()
    found: list[dict[str, Estimate]] = [{} for _ in scores]
    for place, (number, metric) in enumerate(names):
        first = None if number == 0 or metric in RELATIVE else names.index((0, metric))
        found[number][metric] = _estimate(metric, values, drawn, place, first, examples)
    return found


def share_of_draws(
    columns: Sequence[tuple[Tensor, Tensor]], holds: Callable[[list[float]], bool], *, draws: int = DRAWS, seed: int = 0
) -> float:
    """In which share of the draws something holds of the ratios of these columns (a, b), drawn together."""
    sums = torch.stack([torch.stack(pair) for pair in columns])
    drawn = torch.cat([_ratio(part) for part in _draws(sums, draws, seed)], dim=1)
    return sum(holds(one) for one in drawn.T.tolist()) / draws


def _draws(sums: Tensor, draws: int, seed: int) -> Iterator[Tensor]:
    """Sums over resampled examples: (names, 2, some draws) at a time."""
    generator = torch.Generator().manual_seed(seed)
    examples = sums.shape[-1]
    step = max(1, _NUMBERS_AT_A_TIME // examples)
    for start in range(0, draws, step):
        count = min(step, draws - start)
        chosen = torch.randint(examples, (count, examples), generator=generator)
        times = torch.zeros(count, examples, dtype=torch.float64)
        times.scatter_add_(1, chosen, torch.ones_like(times))
        yield sums @ times.T


def _ratio(sums: Tensor) -> Tensor:
    return sums[:, 0] / sums[:, 1]


def judged(estimate: Estimate, *, higher_is_better: bool, examples: int) -> Estimate:
    """The estimate with its verdict; without one where there is no difference, or no interval of it for another reason.

    examples
        that it was measured on.
    """
    difference, low, high = estimate.difference, estimate.difference_low, estimate.difference_high
    if difference is None:
        return replace(estimate, verdict="")
    if difference == low == high == 0:
        return replace(estimate, verdict="same")
    if examples < LEAST:
        return replace(estimate, verdict="too few examples")
    if low is None or high is None:
        return replace(estimate, verdict="")
    if low <= 0 <= high:
        return replace(estimate, verdict="within noise")
    return replace(estimate, verdict="better" if (difference > 0) == higher_is_better else "worse")


def _estimate(metric: str, values: Tensor, drawn: Tensor, place: int, first: int | None, examples: int) -> Estimate:
    value = float(values[place])
    low, high = _interval(drawn[place], examples)
    if first is None:
        return Estimate(value, low, high)
    difference, drawn_differences = float(values[place] - values[first]), drawn[place] - drawn[first]
    ends = _widened(_interval(drawn_differences, examples), difference, drawn_differences, examples)
    found = Estimate(value, low, high, difference, *ends)
    return judged(found, higher_is_better=metric in HIGHER_IS_BETTER, examples=examples)


def _interval(drawn: Tensor, examples: int) -> tuple[float, float] | tuple[None, None]:
    """The middle 95 % of the draws; None, None where these say nothing."""
    if examples < 2 or bool(drawn.isnan().any()):
        return None, None
    ends = torch.quantile(drawn, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=drawn.dtype))
    return float(ends[0]), float(ends[1])


def _widened(
    ends: tuple[float, float] | tuple[None, None], difference: float, drawn: Tensor, examples: int
) -> tuple[float, float] | tuple[None, None]:
    """An interval of draws, at least as wide as their number of examples asks for.

    Both ends move out as far as Student's t is wider than the normal distribution (the expanded percentile interval of
    Hesterberg, "What teachers should know about the bootstrap", 2015), and beyond the difference ± t standard errors.
    """
    low, high = ends
    if low is None or high is None or examples >= MANY:
        return ends
    missing = math.sqrt(examples / (examples - 1))  # the draws' variance has n where the sample's has n − 1
    wider = missing * standard_errors(examples) / _NORMAL
    spread = missing * standard_errors(examples) * float(drawn.std(correction=0))
    return (
        min(difference - wider * (difference - low), difference - spread),
        max(difference + wider * (high - difference), difference + spread),
    )
