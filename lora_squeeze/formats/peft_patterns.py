"""PEFT's patterns of module names: which one matches a name first, and how to write few that match many.

PEFT asks re.match(rf"(.*\\.)?({key})$", name) of one key after the other, for every module. Python keeps
512 compiled expressions: with more keys, each is compiled again for every module, which takes minutes
for a thousand modules and days for the experts of a large model. So beyond a few hundred keys, all names
of one value are written as one expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["MANY", "BadPattern", "FirstMatch", "endings", "expression_of", "grouped", "patterns_for", "targeted"]

# Half of what Python's cache of compiled expressions holds: rank_pattern and alpha_pattern share it.
MANY = 256


class BadPattern(ValueError):
    """A key is no regular expression; says which and why."""


class FirstMatch:
    """The value of the first key that matches a name.

    Keys that mean one name alone are looked up instead of tried, so their number costs nothing.
    Raises BadPattern.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        self._exact: dict[str, tuple[int, float]] = {}
        self._tried: list[tuple[int, re.Pattern[str], float]] = []
        self._count = len(values)
        for place, (key, value) in enumerate(values.items()):
            name = re.sub(r"\\(.)", r"\1", key[1:])
            if key == _literal(name):
                self._exact.setdefault(name, (place, value))
                continue
            try:
                self._tried.append((place, re.compile(rf"(.*\.)?({key})$"), value))
            except (re.error, RecursionError, OverflowError) as error:
                raise BadPattern(f"key '{key}' is not a regular expression: {error}") from error

    def get(self, name: str, default: float) -> float:
        """The first match's value, or the default."""
        last, value = self._exact.get(name, (self._count, default))
        return next((other for place, key, other in self._tried if place < last and key.match(name)), value)


def targeted(name: str, target: str) -> bool:
    """PEFT's rule for lists of targets."""
    return name == target or name.endswith(f".{target}")


def endings(names: Iterable[str]) -> set[str]:
    """All targets that mean one of these names: their last words."""
    return {name[start:] for name in names for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))}


def patterns_for(values: Mapping[str, float], layers: Iterable[str]) -> dict[str, float]:
    """Patterns that give exactly these layers these values, as few as their last names allow.

    Where all layers of a last name (such as q_proj) have one value, that name is the pattern; other
    layers are named in full, anchored and escaped.
    """
    by_last_name: dict[str, list[str]] = {}
    for name in layers:
        by_last_name.setdefault(name.rpartition(".")[2], []).append(name)
    patterns: dict[str, float] = {}
    single: dict[str, float] = {}
    for last_name, names in by_last_name.items():
        own = {values.get(name) for name in names}
        if len(own) == 1 and len(names) > 1:
            value = own.pop()
            if value is not None:
                patterns[re.escape(last_name)] = value
        else:
            single.update({name: values[name] for name in names if name in values})
    return {**patterns, **grouped(single)}


def grouped(values: Mapping[str, float]) -> dict[str, float]:
    """Anchored keys that mean exactly these names: one for each name or, if they are many, one for each value."""
    if len(values) <= MANY:
        return {_literal(name): value for name, value in values.items()}
    names: dict[float, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    return {f"^{expression_of(same)}": value for value, same in names.items()}


def expression_of(names: Iterable[str]) -> str:
    """A regular expression that matches exactly these names; what they share, word by word, is written once."""
    return _alternatives([name.split(".") for name in names])


def _literal(name: str) -> str:
    return f"^{re.escape(name)}"


def _alternatives(names: Sequence[Sequence[str]]) -> str:
    following: dict[str, list[Sequence[str]]] = {}
    for first, *rest in names:
        following.setdefault(first, []).append(rest)
    words: dict[str, list[str]] = {}  # what follows → the words that it follows
    for first, rests in following.items():
        longer = [rest for rest in rests if rest]
        then = rf"\.{_alternatives(longer)}" if longer else ""
        if longer and len(longer) < len(rests):
            then = f"({then})?"  # one of the names ends here
        words.setdefault(then, []).append(re.escape(first))
    return _one_of([f"{_one_of(firsts)}{then}" for then, firsts in words.items()])


def _one_of(expressions: Sequence[str]) -> str:
    return expressions[0] if len(expressions) == 1 else f"({'|'.join(expressions)})"
