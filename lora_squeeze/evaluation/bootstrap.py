"""How sure a number is: paired bootstrap over examples.

Examples are drawn with replacement, the same ones for all adapters; the spread of a difference over
the draws says how far it could be chance. What two adapters get right and wrong together then cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_squeeze.evaluation.scoring import RELATIVE, Scores
from lora_squeeze.measurements import Estimate

__all__ = ["DRAWS", "HIGHER_IS_BETTER", "estimates", "judged", "share_of_draws"]

DRAWS = 2000
LEVEL = 0.95
HIGHER_IS_BETTER = ("accuracy", "accuracy-norm", "agreement")

_NUMBERS_AT_A_TIME = 1 << 24


def estimates(
    scores: Sequence[Scores], metrics: Sequence[str], *, draws: int = DRAWS, seed: int = 0
) -> list[dict[str, Estimate]]:
    """Every metric of every adapter with its interval, and its difference to the first adapter's.

    Intervals are the middle 95 % of the draws. A difference whose interval holds 0 is within noise.
    """
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
        found[number][metric] = _estimate(metric, values, drawn, place, first)
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


def judged(estimate: Estimate, *, higher_is_better: bool) -> Estimate:
    """The estimate with its verdict; without one where there is no difference or no interval of it."""
    difference, low, high = estimate.difference, estimate.difference_low, estimate.difference_high
    if difference is None or low is None or high is None or math.isnan(low) or math.isnan(high):
        return replace(estimate, verdict="")
    if difference == low == high == 0:
        return replace(estimate, verdict="same")
    if low <= 0 <= high:
        return replace(estimate, verdict="within noise")
    return replace(estimate, verdict="better" if (difference > 0) == higher_is_better else "worse")


def _estimate(metric: str, values: Tensor, drawn: Tensor, place: int, first: int | None) -> Estimate:
    low, high = _interval(drawn[place])
    value = float(values[place])
    if first is None:
        return Estimate(value, low, high)
    found = Estimate(value, low, high, float(values[place] - values[first]), *_interval(drawn[place] - drawn[first]))
    return judged(found, higher_is_better=metric in HIGHER_IS_BETTER)


def _interval(drawn: Tensor) -> tuple[float, float]:
    ends = torch.quantile(drawn, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=drawn.dtype))
    return float(ends[0]), float(ends[1])
