"""What a free answer is worth beside those that people gave: from 0 to 1."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence

from lora_squeeze.errors import DataError


def exact(written: str, answers: Sequence[str]) -> float:
    """1 for one of the answers, but for case and white space; else 0. Raises DataError for no answers."""
    return float(_folded(written) in [_folded(one) for one in _some(answers)])


def soft_accuracy(written: str, answers: Sequence[str]) -> float:
    """VQA accuracy: the mean over people left out of min(1, others who said it / 3) (arXiv 1505.00468).

    Case, articles and punctuation at the ends of words do not count. Raises DataError for no answers.
    """
    said = [_plain(one) == _plain(written) for one in _some(answers)]
    return sum(min(1.0, (sum(said) - one) / 3) for one in said) / len(said)


def anls(written: str, answers: Sequence[str]) -> float:
    """1 − edit distance / longer length to the nearest answer; below a half it is 0 (arXiv 1907.00490).

    Case and white space do not count. Raises DataError for no answers.
    """
    pairs = [(_folded(written), _folded(one)) for one in _some(answers)]
    nearest = max(1 - _edits(one, other) / max(len(one), len(other), 1) for one, other in pairs)
    return nearest if nearest >= 0.5 else 0.0


METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = {"exact": exact, "soft": soft_accuracy, "anls": anls}


def _some(answers: Sequence[str]) -> Sequence[str]:
    if not answers:
        raise DataError("a question has no answers to compare with; leave it out of the data")
    return answers


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _plain(text: str) -> str:
    words = (word.strip(string.punctuation) for word in text.lower().split())
    return " ".join(word for word in words if word and word not in ("a", "an", "the"))


def _edits(one: str, other: str) -> int:
    before = list(range(len(other) + 1))
    for row, left in enumerate(one, start=1):
        now = [row]
        for column, right in enumerate(other, start=1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (left != right)))
        before = now
    return before[-1]
