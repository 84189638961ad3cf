"""Small data sets for trying out: generated, the same every time, no file and no network.

Spelled `builtin:NAME`, `builtin:NAME:COUNT` or `builtin:NAME:COUNT:SEED`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lora_squeeze.data.examples import Row
from lora_squeeze.errors import DataError

__all__ = ["BUILTINS", "builtin_rows"]

COUNT = 1000  # rows, unless told


def builtin_rows(source: str) -> Iterator[Row]:
    """The rows of `builtin:NAME[:COUNT[:SEED]]`. Raises DataError for a name that there is not."""
    name, *numbers = source.split(":")[1:]
    if name not in BUILTINS:
        raise DataError(f"{source}: there is no built-in data set '{name}'; there are {', '.join(BUILTINS)}")
    if len(numbers) > 2 or not all(number.isascii() and number.isdecimal() for number in numbers):
        raise DataError(f"{source}: a built-in data set is spelled builtin:{name}:COUNT:SEED, with whole numbers")
    count, seed = (*map(int, numbers), *(COUNT, 0)[len(numbers) :])
    generator = random.Random(f"{name} {seed}")
    make = BUILTINS[name]
    return (Row(f"builtin:{name}, row {number}", make(generator)) for number in range(1, count + 1))


def _arithmetic(generator: random.Random) -> Mapping[str, Any]:
    first, second = generator.randrange(10), generator.randrange(10)
    return {"prompt": f"{first}+{second}=", "answer": str(first + second)}


def _sums(generator: random.Random) -> Mapping[str, Any]:
    row = _arithmetic(generator)
    return {"prompt": row["prompt"], "completion": row["answer"]}


_PRAISE = ("delightful", "moving", "clever", "gripping", "charming", "superb", "warm", "brilliant")
_BLAME = ("dull", "clumsy", "tedious", "lifeless", "shallow", "dreadful", "noisy", "pointless")
_SUBJECTS = ("film", "book", "concert", "play", "series", "exhibition")
_FRAMES = (
    "The {subject} was {word}.",
    "I found the {subject} {word} from start to end.",
    "What a {word} {subject}!",
    "Nobody had told me how {word} this {subject} is.",
    "They call it art; I call the {subject} {word}.",
)


def _judgement(generator: random.Random) -> tuple[str, str]:
    label = generator.choice(("negative", "positive"))
    word = generator.choice(_PRAISE if label == "positive" else _BLAME)
    return generator.choice(_FRAMES).format(subject=generator.choice(_SUBJECTS), word=word), label


def _sentiment(generator: random.Random) -> Mapping[str, Any]:
    text, label = _judgement(generator)
    return {"text": text, "label": label}


def _chat(generator: random.Random) -> Mapping[str, Any]:
    text, label = _judgement(generator)
    return {
        "messages": [
            {"role": "user", "content": f"Is this positive or negative? {text}"},
            {"role": "assistant", "content": f"It is {label}."},
        ]
    }


def _choices(generator: random.Random) -> Mapping[str, Any]:
    text, label = _judgement(generator)
    return {"context": text, "question": "How is it judged?", "choices": ["negative", "positive"], "answer": label}


def _preferences(generator: random.Random) -> Mapping[str, Any]:
    row = _arithmetic(generator)
    wrong = int(row["answer"]) + generator.choice((-1, 1, 2, 10))
    return {"prompt": row["prompt"], "chosen": row["answer"], "rejected": str(abs(wrong))}


def _texts(generator: random.Random) -> Mapping[str, Any]:
    return {"text": " ".join(_judgement(generator)[0] for _ in range(3))}


BUILTINS: dict[str, Callable[[random.Random], Mapping[str, Any]]] = {
    "arithmetic": _arithmetic,
    "sums": _sums,
    "sentiment": _sentiment,
    "chat": _chat,
    "choices": _choices,
    "preferences": _preferences,
    "texts": _texts,
}
