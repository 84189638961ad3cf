"""How the page writes numbers of several seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from benchmarks.in_squeeze_runs import SEEDS
from reproductions.small.findings import Mean

__all__ = ["count", "judged", "nats", "percent", "points"]


def percent(one: Mean | None) -> str:
    """A share."""
    return "–" if one is None else f"{one.value:.1%}{_error(one, 100, 1)}"


def points(one: Mean | None) -> str:
    """A difference of shares."""
    return "–" if one is None else f"{100 * one.value:+.1f}{_error(one, 100, 1)}"


def nats(one: Mean | None, *, sign: str = "") -> str:
    """A loss, or with sign="+" a difference of losses."""
    return "–" if one is None else f"{one.value:{sign}.3f}{_error(one, 1, 3)}"


def judged(one: Mean) -> str:
    """Whether a difference is one."""
    return {1: "higher", -1: "lower", 0: "within noise"}[one.sign] if len(one.values) > 1 else "one seed"


def count(found: Collection[Mean], *, better: int = 1) -> str:
    """How many are better, how many worse, and how many noise."""
    if all(len(one.values) < 2 for one in found):
        return f"{len(found)} compared, with one seed"
    signs = Counter(better * one.sign for one in found)
    return f"better in {signs[1]}, worse in {signs[-1]}, within noise in {signs[0]} of {len(found)}"


def _error(one: Mean, factor: float, digits: int) -> str:
    seeds = len(one.values)
    if seeds == 1:
        return " (1 seed)"
    return f" ± {factor * one.error:.{digits}f}" + (f" ({seeds} seeds)" if seeds < len(SEEDS) else "")
