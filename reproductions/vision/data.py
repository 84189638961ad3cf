"""easy-VQA from its package, and the features of its images: open questions, each with an answer and an image.

Yes and no are left out. They are the answers to three quarters of the questions, most of which the question alone
gives away ("is there a red shape?": no), and would hide what is seen in the image.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from reproductions.vision.backbone import backbone, features, grey, onnx_file, pixels_of

VALIDATED = 400  # images of the training split, the last ones, that nothing is trained on
CLOSED = ("yes", "no")


class Question(NamedTuple):
    """A question about an image, by its number in its split, and the answer."""

    text: str
    answer: str
    image: int


@dataclass(frozen=True)
class Seen:
    """What the backbone sees: of every image of a split (images, tokens, width), and of a grey one (tokens, width)."""

    training: Tensor
    test: Tensor
    grey: Tensor


@dataclass(frozen=True)
class Data:
    """Questions by what they are for, the answers that there are, and the features of the images.

    training, validation
        about different images of the training split.
    test
        about the images of the test split, all of them.
    """

    answers: tuple[str, ...]
    training: tuple[Question, ...]
    validation: tuple[Question, ...]
    test: tuple[Question, ...]
    seen: Seen

    def blind(self) -> float:
        """The share of the test that the most frequent answer to each question gets, of those in training."""
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for one in self.training:
            counts[one.text][one.answer] += 1
        return share(
            bool(counts[one.text]) and counts[one.text].most_common(1)[0][0] == one.answer for one in self.test
        )

    def majority(self) -> float:
        """The share of the most frequent answer of the test."""
        return Counter(one.answer for one in self.test).most_common(1)[0][1] / len(self.test)


def share(right: Iterable[bool]) -> float:
    """Of what is right."""
    found = list(right)
    return sum(found) / len(found)


def data_of(package: Path, seen: Seen) -> Data:
    """The splits of easy-VQA's data folder."""
    training, test = (questions_of(package / part / "questions.json") for part in ("train", "test"))
    first = len(seen.training) - VALIDATED
    return Data(
        tuple(sorted({one.answer for one in training})),
        tuple(one for one in training if one.image < first),
        tuple(one for one in training if one.image >= first),
        test,
        seen,
    )


def questions_of(path: Path) -> tuple[Question, ...]:
    """The open questions of a split."""
    found = (Question(*one) for one in json.loads(path.read_text(encoding="utf-8")))
    return tuple(one for one in found if one.answer not in CLOSED)


@cache
def package_folder() -> Path:
    """Where the package has its data."""
    from packaged import package_file

    return package_file("easy_vqa", "data")


def seen_by_backbone(package: Path, cached: Path) -> Seen:
    """The features of all images; they are computed if the file is not there, which takes a few minutes."""
    if not cached.exists():
        model = backbone(onnx_file())
        parts = {
            name: features(model, map(pixels_of, _images(package / folder / "images")))
            for name, folder in (("training", "train"), ("test", "test"))
        }
        cached.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cached.with_suffix(".part")
        torch.save({**parts, "grey": features(model, [grey()])[0]}, unfinished)
        unfinished.rename(cached)
    return Seen(**torch.load(cached, weights_only=True))


def _images(folder: Path) -> list[Path]:
    """By number, which is their name."""
    return sorted(folder.glob("*.png"), key=lambda path: int(path.stem))
