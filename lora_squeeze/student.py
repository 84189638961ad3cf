"""Student's t: how far from 0 the mean of a few values has to lie before chance is no explanation."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

__all__ = ["LEVEL", "sign_of", "standard_errors"]

LEVEL = 0.95

_MANY = 1000


@cache
def standard_errors(count: int) -> float:
    """To either side of a mean of so many values, a two-sided 95 % interval: 12.7 for two, towards 1.96 for many.

    One value says nothing of its spread: infinitely many.

    Student, "The probable error of a mean", Biometrika 6, 1908.
    """
    if count < 2:
        return math.inf
    if count > _MANY:  # the sum is long, and the first terms of its expansion say the same
        normal = NormalDist().inv_cdf((1 + LEVEL) / 2)
        second = (5 * normal**5 + 16 * normal**3 + 3 * normal) / 96
        return normal + (normal**3 + normal) / 4 / (count - 1) + second / (count - 1) ** 2
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _share(middle, count - 1) < LEVEL else (low, middle)
    return math.sqrt(count - 1) * math.tan(middle)


def sign_of(mean: float, error: float, count: int) -> int:
    """1 or −1 if the 95 % interval of a mean lies above or below 0; 0: within noise, or one value alone.

    error
        the standard error of the mean.
    """
    if count < 2 or abs(mean) <= standard_errors(count) * error:
        return 0
    return 1 if mean > 0 else -1


def _share(angle: float, freedom: int) -> float:
    """P(|t| < √freedom · tan angle), a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    term = math.cos(angle) if freedom % 2 else 1.0
    total = 0.0
    for power in range(freedom % 2, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if freedom % 2 else total
