"""Encoded examples → batches, padded on the right; images through the model's processor, when they are needed.

What a processor makes of an image (how many tokens, which tensors) is different for every model. It is
given the text up to where the last image has been read; what follows is joined to that, token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any

from lora_squeeze.data import opened
from lora_squeeze.encoding import IGNORED, Encoded
from lora_squeeze.errors import LoraSqueezeError, ModelError
from lora_squeeze.extras import require
from lora_squeeze.seeing import Seeing

__all__ = ["collate"]


def collate(encoded: Iterable[Encoded], reader: Any) -> dict[str, Any]:
    """A batch: input_ids, attention_mask and labels, each (examples, longest), and what the processor adds.

    reader
        the tokenizer, or `lora_squeeze.seeing.Seeing`.

    Raises DataError for an image that cannot be read, ModelError for one that the processor refuses.
    """
    rows = list(encoded)
    if not isinstance(reader, Seeing):
        return {
            "input_ids": _padded((row.input_ids for row in rows), reader.pad_token_id),
            "attention_mask": _padded(([1] * len(row.input_ids) for row in rows), 0),
            "labels": _padded((row.labels for row in rows), IGNORED),
        }
    seen = _seen(rows, reader)
    lengths = [sum(one) for one in seen.pop("attention_mask").tolist()]
    ids: list[list[int]] = [one[:size] for one, size in zip(seen.pop("input_ids").tolist(), lengths, strict=True)]
    labels = [_labels(row, head) for row, head in zip(rows, ids, strict=True)]
    tails = [row.input_ids[row.head_size :] for row in rows]
    batch: dict[str, Any] = {
        "input_ids": _padded([[*h, *t] for h, t in zip(ids, tails, strict=True)], reader.tokenizer.pad_token_id),
        "attention_mask": _padded([[1] * (len(h) + len(t)) for h, t in zip(ids, tails, strict=True)], 0),
        "labels": _padded(labels, IGNORED),
    }
    for name, values in seen.items():
        of_tokens = name.endswith("token_type_ids")  # which token is text, which is an image
        batch[name] = _padded(_continued(values.tolist(), lengths, tails), 0) if of_tokens else values
    return batch


def _seen(rows: Sequence[Encoded], seeing: Seeing) -> dict[str, Any]:
    """The heads of rows as the processor reads them, with their images."""
    images = [[opened(one) for one in row.images] for row in rows]
    try:
        return dict(
            seeing.processor(
                text=[row.head for row in rows],
                images=images if any(images) else None,
                add_special_tokens=False,
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
        )
    except LoraSqueezeError:
        raise
    except Exception as error:  # what a processor raises is up to its author
        names = ", ".join(one.name for row in rows for one in row.images)
        raise ModelError(f"the model's processor does not take these images ({names}): {error}") from error


def _labels(row: Encoded, head: Sequence[int]) -> list[int]:
    """The labels of a whole row: none for what stands for images."""
    before, learnt = row.input_ids[: row.head_size], row.labels[: row.head_size]
    labels = [IGNORED] * len(head)
    if any(label != IGNORED for label in learnt):
        for place, there, size in SequenceMatcher(None, before, head, autojunk=False).get_matching_blocks():
            labels[there : there + size] = learnt[place : place + size]
    return [*labels, *row.labels[row.head_size :]]


def _continued(values: list[list[int]], lengths: Sequence[int], tails: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[*one[:size], *[0] * len(tail)] for one, size, tail in zip(values, lengths, tails, strict=True)]


def _padded(values: Iterable[Sequence[int]], filler: int) -> Any:
    torch = require("torch", "train")
    rows = list(values)
    longest = max(map(len, rows))
    return torch.tensor([[*one, *[filler] * (longest - len(one))] for one in rows])
