"""Budgets: the components that keep most energy for what they cost.

Taking the i-th component of a group of layers gains Σ σ_i² and costs what one more rank costs there
(out + in parameters, or bytes, or simply 1). Components are taken by gain per cost, as long as they
fit, and what remains is filled with the best that still fit. For a knapsack this is within one
component of the optimum, and since σ falls within a layer its order is respected by itself. Where
only some ranks are allowed, the steps between them take the place of components, and their upper
concave hull takes the place of the falling σ.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from lora_squeeze.errors import RankError
from lora_squeeze.limits import Group
from lora_squeeze.records import Spectrum

__all__ = ["Unreachable", "cheapest_for_energy", "filled", "most_energy", "price_of", "smallest"]

_HALVINGS = 32  # of the price; what remains is taken one by one


class Unreachable(RankError):
    """The limits do not allow what a policy asks for; less of it may be possible."""


@dataclass(frozen=True)
class _Ladder:
    """The steps of one group, by falling gain per cost: after step i it has ranks[i]."""

    name: str
    negative_ratios: list[float]  # ascending
    costs: Sequence[int]  # after 0, 1, 2, … steps, above the start
    energies: Sequence[float]  # after 0, 1, 2, … steps
    ranks: Sequence[int]  # after 0, 1, 2, … steps


def most_energy(
    spectra: Sequence[Spectrum], groups: Sequence[Group], cost: Callable[[Spectrum], int], budget: int
) -> list[int]:
    """The rank of each group such that Σ cost · rank ≤ budget and the energy kept is largest.

    Raises RankError if even the smallest allowed ranks cost more.
    """
    ladders = [_ladder(spectra, group, cost) for group in groups]
    left = budget - sum(price_of(spectra, group, group.allowed[0], cost) for group in groups)
    if left < 0:
        raise RankError(f"the smallest ranks allowed already cost {budget - left}, and the budget is {budget}")
    steps = _steps_at_best_price(ladders, lambda taken: _total(ladders, taken) <= left)
    left -= _total(ladders, steps)
    for position in _next_best(ladders, steps):
        ladder, step = ladders[position], steps[position]
        price = ladder.costs[step + 1] - ladder.costs[step]
        if price <= left:
            steps[position] += 1
            left -= price
    return [ladder.ranks[step] for ladder, step in zip(ladders, steps, strict=True)]


def cheapest_for_energy(spectra: Sequence[Spectrum], groups: Sequence[Group], energy: float) -> list[int]:
    """The shortest prefix of the pooled components, largest first, that reaches this energy.

    Raises Unreachable if the ranks allowed cannot reach it.
    """
    ladders = [_ladder(spectra, group, lambda _: 1) for group in groups]

    def kept(steps: Sequence[int]) -> float:
        return sum(ladder.energies[step] for ladder, step in zip(ladders, steps, strict=True))

    steps = _steps_at_best_price(ladders, lambda taken: kept(taken) < energy)
    following = _next_best(ladders, steps)
    # The last few digits of a sum depend on its order; the full sum must always be reachable.
    while kept(steps) < energy * (1 - 1e-12):
        position = next(following, None)
        if position is None:
            whole = sum(spectrum.energy for spectrum in spectra)
            raise Unreachable(
                f"the limits on the ranks allow {kept(steps) / whole:.6g} of the energy to be kept, no more"
            )
        steps[position] += 1
    return [ladder.ranks[step] for ladder, step in zip(ladders, steps, strict=True)]


def smallest(spectra: Sequence[Spectrum], found: Sequence[Group], cost: Callable[[Spectrum], int]) -> list[int]:
    """The least that may be written: the smallest allowed ranks, but one component at least."""
    ranks = [group.allowed[0] for group in found]
    if not any(ranks):
        prices = {
            position: price_of(spectra, group, group.round_up(1), cost)
            for position, group in enumerate(found)
            if group.allowed[-1] > 0
        }
        if prices:
            cheapest = min(prices, key=prices.__getitem__)
            ranks[cheapest] = found[cheapest].round_up(1)
    return ranks


def filled(
    spectra: Sequence[Spectrum],
    found: Sequence[Group],
    ranks: list[int],
    cost: Callable[[Spectrum], int],
    left: Callable[[Sequence[int]], int],
) -> list[int]:
    """Take what still fits, best first, until nothing does; `left` is what a plan leaves of the budget."""
    while True:
        room = left(ranks)
        steps: list[tuple[float, int, int]] = []
        for position, (group, rank) in enumerate(zip(found, ranks, strict=True)):
            more = group.round_up(rank + 1)
            price = price_of(spectra, group, more, cost) - price_of(spectra, group, rank, cost)
            gain = sum(spectra[m].retained_energy(more) - spectra[m].retained_energy(rank) for m in group.members)
            if more > rank and gain > 0 and 0 < price <= room:
                steps.append((-gain / price, position, more))
        for _, position, more in sorted(steps):
            tried = [*ranks[:position], more, *ranks[position + 1 :]]
            if left(tried) >= 0:
                ranks = tried
                break
        else:
            return ranks


def price_of(spectra: Sequence[Spectrum], group: Group, rank: int, cost: Callable[[Spectrum], int]) -> int:
    """What a group costs at this rank; a layer whose own rank is lower keeps that."""
    return sum(cost(spectra[member]) * min(rank, spectra[member].rank) for member in group.members)


def _energy(spectra: Sequence[Spectrum], group: Group, rank: int) -> float:
    return sum(spectra[member].retained_energy(rank) for member in group.members)


def _ladder(spectra: Sequence[Spectrum], group: Group, cost: Callable[[Spectrum], int]) -> _Ladder:
    first, *others = (spectra[member] for member in group.members)
    allowed = group.allowed
    if not others and isinstance(allowed, range):
        price = cost(first)
        values = [value for value in first.singular_values[allowed[0] : allowed[-1]] if value > 0]
        start = min(allowed[0], len(first.singular_values))
        return _Ladder(
            name=first.name,
            negative_ratios=[-value * value / price for value in values],
            costs=range(0, price * (len(values) + 1), price),
            energies=first.cumulative_energy[start : start + len(values) + 1],
            ranks=allowed[: len(values) + 1],
        )
    hull = _upper_hull(
        [_Point(rank, price_of(spectra, group, rank, cost), _energy(spectra, group, rank)) for rank in allowed]
    )
    return _Ladder(
        name=first.name,
        negative_ratios=[-_slope(low, high) for low, high in pairwise(hull)],
        costs=[point.cost - hull[0].cost for point in hull],
        energies=[point.energy for point in hull],
        ranks=[point.rank for point in hull],
    )


class _Point(NamedTuple):
    rank: int
    cost: int
    energy: float


def _upper_hull(points: Sequence[_Point]) -> list[_Point]:
    """The points, by rising cost, between which energy rises ever more slowly."""
    hull = [points[0]]
    for point in points[1:]:
        if point.energy <= hull[-1].energy:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) < _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(low: _Point, high: _Point) -> float:
    return (high.energy - low.energy) / (high.cost - low.cost)


def _steps_at_best_price(ladders: Sequence[_Ladder], within: Callable[[Sequence[int]], bool]) -> list[int]:
    """The steps that are worth the lowest price (gain per cost) at which `within` still holds."""

    def taken(price: float) -> list[int]:
        return [bisect_right(ladder.negative_ratios, -price) for ladder in ladders]

    everything = [len(ladder.negative_ratios) for ladder in ladders]
    if within(everything):
        return everything
    high = max((-ladder.negative_ratios[0] for ladder in ladders if ladder.negative_ratios), default=0.0) * 2
    low = 0.0
    for _ in range(_HALVINGS):
        # Energies span many orders of magnitude: halve the exponent once there is a lower end.
        middle = (low * high) ** 0.5 if low > 0 else high * 1e-6
        if within(taken(middle)):
            high = middle
        else:
            low = middle
    return taken(high)


def _total(ladders: Sequence[_Ladder], steps: Sequence[int]) -> int:
    return sum(ladder.costs[step] for ladder, step in zip(ladders, steps, strict=True))


def _next_best(ladders: Sequence[_Ladder], steps: list[int]) -> Iterator[int]:
    """Positions whose next step is worth most; those the caller takes come again with the one after.

    Equal worth is decided by name, so that the order of the layers in the file does not matter.
    """
    heap = [
        (ladder.negative_ratios[step], ladder.name, position)
        for position, (ladder, step) in enumerate(zip(ladders, steps, strict=True))
        if step < len(ladder.negative_ratios)
    ]
    heapq.heapify(heap)
    while heap:
        _, name, position = heapq.heappop(heap)
        before = steps[position]
        yield position
        step, ratios = steps[position], ladders[position].negative_ratios
        if before < step < len(ratios):
            heapq.heappush(heap, (ratios[step], name, position))
