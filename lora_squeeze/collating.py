"""Encoded examples → batches, padded on the right; images through the model's processor, when they are needed.

What a processor makes of an image (how many tokens, which tensors) is different for every model. It is
given the text up to where the last image has been read; what follows is joined to that, token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lora_squeeze.data import opened
from lora_squeeze.encoding import IGNORED, Encoded
from lora_squeeze.errors import DataError, ModelError
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
    read = [one[:size] for one, size in zip(seen.pop("input_ids").tolist(), lengths, strict=True)]
    heads: list[list[int]] = [[*row.input_ids[: row.lead], *one] for row, one in zip(rows, read, strict=True)]
    tails = [row.input_ids[row.head_size :] for row in rows]
    labels = [_labels(row, head, reader) for row, head in zip(rows, heads, strict=True)]
    batch: dict[str, Any] = {
        "input_ids": _padded([[*h, *t] for h, t in zip(heads, tails, strict=True)], reader.tokenizer.pad_token_id),
        "attention_mask": _padded([[1] * len(one) for one in labels], 0),
        "labels": _padded(labels, IGNORED),
    }
    for name, values in seen.items():
        if name == "cross_attention_mask":
            raise ModelError(
                f"{type(reader.processor).__name__} says token by token which images are seen: not supported"
            )
        of_tokens = name.endswith("token_type_ids")  # which token is text, which is an image
        batch[name] = _padded(_continued(values.tolist(), rows, lengths, tails), 0) if of_tokens else values
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
    except Exception as error:  # what a processor raises is up to its author
        names = "; ".join(str(one) for row in rows for one in row.images)
        raise ModelError(f"the model's processor does not take {names}: {error}") from error


def _labels(row: Encoded, head: Sequence[int], seeing: Seeing) -> list[int]:
    """The labels of a whole row: none for what stands for images.

    The words of the head stand in the processor's ids as they do in the row's, with the frames of images between
    them; from the right, as what is learnt is mostly there. The word before an image may have grown together with
    its frame (as newlines do): then it is not learnt.
    """
    found = [IGNORED] * len(head)
    if all(label == IGNORED for label in row.labels[: row.head_size]):
        return [*found, *row.labels[row.head_size :]]
    words = row.input_ids[: row.head_size]
    at = len(head)
    for place in range(len(words) - 1, -1, -1):
        word, before_image = words[place], words[place + 1 : place + 2] == (seeing.token_id,)
        if word == seeing.token_id:
            while at and head[at - 1] in seeing.frame:
                at -= 1
        elif at and head[at - 1] == word:
            at -= 1
            found[at] = row.labels[place]
        elif before_image and at < len(head) and head[at] == word:
            found[at] = row.labels[place]  # it also occurs in frames, and was taken for a part of one
        elif not before_image:
            raise DataError(f"{row.images[0]}: what is to be learnt between its images cannot be told from them")
        elif at and not (place and head[at - 1] == words[place - 1]):
            at -= 1  # it has grown together with the frame, into a word of which frames know nothing
    return [*found, *row.labels[row.head_size :]]


def _continued(
    values: list[list[int]], rows: Sequence[Encoded], lengths: Sequence[int], tails: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Types of tokens, 0 being a text, for what was joined to the heads."""
    return [
        [*[0] * row.lead, *one[:size], *[0] * len(tail)]
        for one, row, size, tail in zip(values, rows, lengths, tails, strict=True)
    ]


def _padded(values: Iterable[Sequence[int]], filler: int) -> Any:
    torch = require("torch", "train")
    rows = list(values)
    longest = max(map(len, rows))
    return torch.tensor([[*one, *[filler] * (longest - len(one))] for one in rows])
