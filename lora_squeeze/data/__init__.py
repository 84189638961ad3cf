"""Sources → rows → examples: files, data sets and built-in ones as frozen records, without torch.

examples = read_examples("questions.jsonl")
training, held_out = split(examples, held_out=0.1, seed=0)
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from lora_squeeze.data.builtin import BUILTINS
from lora_squeeze.data.examples import (
    KINDS,
    Answered,
    Chat,
    Choice,
    Completion,
    Example,
    Labelled,
    Message,
    Preference,
    Prompt,
    Row,
    Text,
    example_of,
    images_of,
    without_sight,
)
from lora_squeeze.data.images import Picture, opened, picture_of
from lora_squeeze.data.sources import read_rows
from lora_squeeze.errors import DataError

__all__ = [
    "BUILTINS",
    "KINDS",
    "Answered",
    "Chat",
    "Choice",
    "Completion",
    "Example",
    "Labelled",
    "Message",
    "Picture",
    "Preference",
    "Prompt",
    "Row",
    "Text",
    "example_of",
    "images_of",
    "labels_of",
    "opened",
    "picture_of",
    "read_examples",
    "read_rows",
    "split",
    "without_sight",
]

One = TypeVar("One", bound=Example)


def read_examples(
    sources: str | Iterable[str], *, columns: Mapping[str, str] | None = None, limit: int = 0
) -> tuple[Example, ...]:
    """Read a source, or several, as examples of one kind (see `lora_squeeze.data.sources` and `.examples`).

    columns
        our key → theirs, as {"text": "sentence"}.
    limit
        at most so many; 0: all.

    Raises DataError, with file and line, if nothing is there, a row fits no kind, or kinds are mixed.
    """
    examples: list[Example] = []
    for row in read_rows(sources, limit=limit):
        example = example_of(row, columns)
        if examples and type(example) is not type(examples[0]):
            raise DataError(
                f"{row.place}: is of the kind '{KINDS[type(example)]}', but the rows before it are of the kind "
                f"'{KINDS[type(examples[0])]}'; one source has one kind"
            )
        examples.append(example)
    if not examples:
        named = sources if isinstance(sources, str) else ", ".join(sources)
        raise DataError(f"{named}: holds no row")
    return tuple(examples)


def split(examples: Sequence[One], *, held_out: float, seed: int = 0) -> tuple[tuple[One, ...], tuple[One, ...]]:
    """Split into training and held-out examples, each shuffled; equal ones, and those of one image, stay on one side.

    Labelled examples are split class by class, so that no class is missing from training. A class
    of one example is only trained on; of any other, at least one is held out. Raises DataError for
    a share outside of [0, 1) and for data that are too few.
    """
    if not 0 <= held_out < 1:
        raise DataError(f"held_out={held_out:g} is not possible: it is a fraction of the examples, below 1")
    generator = random.Random(seed)
    unique = _inseparable(examples)
    by_class: defaultdict[str, list[list[One]]] = defaultdict(list)
    for equal in unique:
        by_class[equal[0].label if isinstance(equal[0], Labelled) else ""].append(equal)
    sides: tuple[list[One], list[One]] = ([], [])
    for name in sorted(by_class):
        members = generator.sample(by_class[name], len(by_class[name]))
        count = max(round(held_out * len(members)), 1) if len(members) > 1 and held_out > 0 else 0
        for place, equal in enumerate(members):
            sides[place < count].extend(equal)
    for side in sides:
        generator.shuffle(side)
    if held_out > 0 and not all(sides):
        raise DataError(f"{len(examples)} examples are too few to hold any out: give more, or held_out=0")
    return tuple(sides[0]), tuple(sides[1])


def _inseparable(examples: Sequence[One]) -> list[list[One]]:
    """Groups of examples that are equal, or share an image with one another, in the order of the first of each."""
    group_of: dict[str, int] = {}
    groups: list[list[One]] = []
    for example in examples:
        marks = [repr(image) for image in images_of(example)] or [repr(example)]
        known = sorted({group_of[mark] for mark in marks if mark in group_of})
        place = known[0] if known else len(groups)
        if not known:
            groups.append([])
        for other in known[1:]:
            groups[place] += groups[other]
            groups[other] = []
            group_of.update((mark, place) for mark, at in group_of.items() if at == other)
        groups[place].append(example)
        group_of.update(dict.fromkeys(marks, place))
    return [group for group in groups if group]


def labels_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """The classes that occur, sorted; numbers in the order of their values."""
    found = {example.label for example in examples if isinstance(example, Labelled)}
    numeric = all(label.lstrip("-").isdecimal() for label in found)
    return tuple(sorted(found, key=(lambda label: (int(label), label)) if numeric else (lambda label: (0, label))))
