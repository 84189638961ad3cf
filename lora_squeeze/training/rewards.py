"""Rewards that can be checked: a completion and what was asked → a number.

A function of one's own has the same form: `reward(completion: str, example: Answered) -> float`;
`example` has the prompt, the answer and all fields of the row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

from lora_squeeze.data import Answered
from lora_squeeze.dotted import import_function
from lora_squeeze.errors import SettingsError

__all__ = ["REWARDS", "Reward", "exact", "numeric", "regex", "reward_of"]

Reward: TypeAlias = Callable[[str, Answered], float]

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def exact(completion: str, example: Answered) -> float:
    """1 if the completion is the answer, but for white space around it; else 0."""
    return float(completion.strip() == example.answer.strip())


def numeric(completion: str, example: Answered) -> float:
    """1 if the last number of the completion equals the last number of the answer; else 0."""
    found, wanted = _last_number(completion), _last_number(example.answer)
    return float(found is not None and wanted is not None and abs(found - wanted) <= 1e-6 * max(1.0, abs(wanted)))


def regex(pattern: str) -> Reward:
    """1 if the pattern occurs in the completion; {answer} in it stands for the answer, literally."""
    try:
        re.compile(pattern.replace("{answer}", "x"))
    except re.error as error:
        raise SettingsError(f"[reward] pattern '{pattern}' is not a regular expression: {error}") from error

    def reward(completion: str, example: Answered) -> float:
        return float(re.search(pattern.replace("{answer}", re.escape(example.answer)), completion) is not None)

    return reward


REWARDS: dict[str, Reward] = {"exact": exact, "numeric": numeric}


def reward_of(kind: str, *, pattern: str = "") -> Reward:
    """The reward that `[reward] type` names: exact, numeric, regex, or package.module.function."""
    if kind == "regex":
        return regex(pattern)
    if kind in REWARDS:
        return REWARDS[kind]
    if "." not in kind and ":" not in kind:
        known = ", ".join([*REWARDS, "regex"])
        raise SettingsError(f"[reward] type '{kind}' is unknown; known are {known} and package.module.function")
    return import_function(kind, key="[reward] type")


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
