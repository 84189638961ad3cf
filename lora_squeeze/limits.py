"""Limits: what any policy has to respect when it chooses ranks.

A pattern matches a layer as PEFT matches rank_pattern: re.match(rf"(.*\\.)?({pattern})$", name), so
"q_proj" names every module of that name and r"layers\\.0\\..*" everything in layer 0. The first
pattern that matches decides. Parts of one module (MODULE#PART) match as their module does, get one
rank and are never left out.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lora_squeeze.adapter import whole
from lora_squeeze.errors import RankError

__all__ = ["EQUAL", "NO_LIMITS", "Group", "Limits", "Ranked", "check_limits", "groups"]

# Named groups for `equal`: what is replaced by "*" to find the layers that belong together. kohya's
# names have underscores for dots, so a word may begin and end at either.
EQUAL = {
    "qkv": r"(?<![^\W_])(to_)?(q|k|v|query|key|value)(_proj|_lin)?(?![^\W_])",
    "experts": r"(?<![^\W_])experts[._]\d+(?![^\W_])|#\d+$",
}


class Ranked(Protocol):
    """Anything that has a layer's name and rank: a spectrum, or a layer that was not decomposed."""

    @property
    def name(self) -> str: ...
    @property
    def rank(self) -> int: ...


@dataclass(frozen=True)
class Limits:
    """Bounds, steps, overrides and groups of ranks.

    min_rank, max_rank
        of every layer. A layer whose own rank is below min_rank keeps it.
    multiple_of
        ranks are rounded up to a multiple of this.
    steps
        ranks are rounded up to one of these, such as the ranks a server has kernels for.
    rank_for
        (pattern, rank) pairs: these layers get this rank, whatever the policy says.
    equal
        patterns, or names of EQUAL: layers whose names differ only in what the pattern matches get
        the same rank, the largest that any of them needs.
    one_rank
        all layers get the same rank, but for those that rank_for gives another (such as 0: left out).
    """

    min_rank: int | None = None
    max_rank: int | None = None
    multiple_of: int = 1
    steps: tuple[int, ...] = ()
    rank_for: tuple[tuple[str, int], ...] = ()
    equal: tuple[str, ...] = ()
    one_rank: bool = False


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Group:
    """Layers that get the same rank (usually one), and the ranks they may get, ascending."""

    members: tuple[int, ...]  # positions in the list of layers
    allowed: Sequence[int]

    def round_up(self, rank: int) -> int:
        """The smallest allowed rank that is not below this one; the largest if there is none."""
        return self.allowed[min(bisect_left(self.allowed, rank), len(self.allowed) - 1)]


def groups(layers: Sequence[Ranked], limits: Limits, *, least: int = 0) -> list[Group]:
    """Which layers go together and which ranks they may get, in the order of the layers.

    least
        the smallest rank where `min_rank` does not say: 0 lets a policy leave layers out.

    Raises RankError for contradictions and for patterns that match no layer.
    """
    check_limits(limits)
    overrides = [(_expression(pattern), rank) for pattern, rank in limits.rank_for]
    members: dict[str, list[int]] = {}
    forced: dict[str, int] = {}
    used: set[int] = set()
    keys = _group_keys(layers, limits.equal)
    for position, (layer, key) in enumerate(zip(layers, keys, strict=True)):
        members.setdefault(key, []).append(position)
        for number, (expression, rank) in enumerate(overrides):
            if expression.match(whole(layer.name)):
                used.add(number)
                if forced.setdefault(key, rank) != rank:
                    raise RankError(
                        f"layer '{layer.name}': rank_for asks for {rank}, but for {forced[key]} in another layer of "
                        "its group; layers in a group get the same rank"
                    )
                break
    for number, (expression, _) in enumerate(overrides):
        if number not in used:
            pattern = limits.rank_for[number][0]
            if any(expression.match(whole(layer.name)) for layer in layers):
                raise RankError(f"rank_for '{pattern}' decides nothing: a pattern before it matches the same layers")
            raise RankError(f"rank_for '{pattern}' matches no layer; the first layer is '{layers[0].name}'")
    if limits.one_rank:
        members = _together(members, apart=forced)
    least = least if limits.min_rank is None else limits.min_rank
    cache: dict[tuple[int, int], Sequence[int]] = {}
    found: list[Group] = []
    for key, positions in members.items():
        own = max(layers[position].rank for position in positions)
        parts = any(layers[position].name != whole(layers[position].name) for position in positions)
        lowest = max(least, 1) if parts else least
        if key in forced:
            allowed: Sequence[int] = (min(forced[key], own),)
        else:
            allowed = cache.setdefault((own, lowest), _allowed(own, limits, lowest))
        found.append(Group(tuple(positions), allowed))
    return found


def _together(members: Mapping[str, list[int]], *, apart: Collection[str]) -> dict[str, list[int]]:
    """All groups as one, but for some; "" is the name of no layer."""
    found: dict[str, list[int]] = {}
    for key, positions in members.items():
        found.setdefault(key if key in apart else "", []).extend(positions)
    return {key: sorted(positions) for key, positions in found.items()}


def check_limits(limits: Limits) -> None:
    """Raise RankError for limits that contradict themselves, or patterns that are none, whatever the adapter."""
    for name in ("min_rank", "max_rank"):
        value = getattr(limits, name)
        if value is not None and value < 0:
            raise RankError(f"{name} {value} is not possible: ranks are not negative")
    if limits.max_rank == 0:
        raise RankError("max_rank 0 would leave nothing of the adapter")
    if limits.min_rank is not None and limits.max_rank is not None and limits.min_rank > limits.max_rank:
        raise RankError(f"min_rank {limits.min_rank} is above max_rank {limits.max_rank}")
    if limits.multiple_of < 1:
        raise RankError(f"multiple_of {limits.multiple_of} is not possible: it is at least 1")
    if limits.max_rank is not None and limits.multiple_of > limits.max_rank:
        raise RankError(f"multiple_of {limits.multiple_of} is above max_rank {limits.max_rank}")
    if limits.steps and min(limits.steps) < 1:
        raise RankError(f"step {min(limits.steps)} is not possible: steps are ranks of at least 1")
    if limits.steps and not any(step % limits.multiple_of == 0 for step in limits.steps):
        raise RankError(f"none of the steps {list(limits.steps)} is a multiple_of {limits.multiple_of}")
    if limits.steps and limits.max_rank is not None and min(limits.steps) > limits.max_rank:
        raise RankError(f"all steps are above max_rank {limits.max_rank}")
    for pattern in limits.equal:
        _group_expression(pattern)
    for pattern, rank in limits.rank_for:
        _expression(pattern)
        if rank < 0 or (limits.max_rank is not None and rank > limits.max_rank):
            raise RankError(f"rank_for '{pattern}={rank}' contradicts the limits: 0 to max_rank {limits.max_rank}")


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise RankError(f"rank_for '{pattern}' is not a regular expression: {error}") from error


def _group_expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(EQUAL.get(pattern, pattern))
    except re.error as error:
        raise RankError(f"equal '{pattern}' is not a regular expression: {error}") from error


def _group_keys(layers: Sequence[Ranked], equal: Iterable[str]) -> list[str]:
    keys = [layer.name for layer in layers]
    for pattern in equal:
        expression = _group_expression(pattern)
        if not any(expression.search(layer.name) for layer in layers):
            raise RankError(f"equal '{pattern}' matches no layer; the first layer is '{layers[0].name}'")
        keys = [expression.sub("*", key) for key in keys]
    return [whole(key) for key in keys]


def _allowed(own: int, limits: Limits, least: int) -> Sequence[int]:
    """The ranks a layer of this rank may get. Its own rank is always one: rounding up stops there."""
    top = own if limits.max_rank is None else min(own, limits.max_rank)
    bottom = min(least, top)
    if limits.multiple_of == 1 and not limits.steps:
        return range(bottom, top + 1)
    candidates = limits.steps or range(limits.multiple_of, top + 1, limits.multiple_of)
    fitting = sorted(rank for rank in set(candidates) if bottom <= rank <= top and rank % limits.multiple_of == 0)
    if own <= top and (not fitting or fitting[-1] < own):
        fitting.append(own)
    if not fitting:
        among = f"among the steps {list(limits.steps)}" if limits.steps else f"a multiple_of {limits.multiple_of}"
        raise RankError(f"no rank between {bottom} and {top} is {among}")
    return ([0] if bottom == 0 else []) + fitting
