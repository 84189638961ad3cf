"""Examples → rows of token ids → padded batches, in the order that pads least.

A row is one forward pass' worth of an example: the text itself, or one of the answers that a
question has. What a language model is asked about a class is a question with the classes as answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from lora_squeeze.collating import collate
from lora_squeeze.data import Choice, Completion, Example, Labelled, images_of
from lora_squeeze.encoding import IGNORED, Encoded, encode, encode_class
from lora_squeeze.errors import DataError
from lora_squeeze.models import Task
from lora_squeeze.seeing import tokenizer_of

__all__ = ["PROMPT", "Batch", "Kind", "Row", "batches_of", "digest_of", "kind_of", "learnt_rows", "rows_of"]

PROMPT = "{text}\nAnswer:"  # what stands before an answer; the answer follows after a space

Kind = Literal["texts", "choices", "classes"]


@dataclass(frozen=True)
class Row:
    """One sequence to run, and what of it counts.

    example, candidate
        which example it belongs to, and which of its answers it is.
    encoded
        token ids and labels of a language model, or the tokenizer's fields and the class of a classifier.
    size
        the characters of what is learnt, to compare answers of different lengths.
    """

    example: int
    candidate: int
    encoded: Encoded | dict[str, Any]
    size: int = 0

    @property
    def length(self) -> int:
        """In tokens."""
        return len(self.encoded.input_ids if isinstance(self.encoded, Encoded) else self.encoded["input_ids"])


@dataclass(frozen=True)
class Batch:
    """Rows, padded; `inputs` are what the model takes, labels are apart."""

    rows: tuple[Row, ...]
    inputs: dict[str, Tensor]
    labels: Tensor  # (rows, longest) of a language model, (rows,) of a classifier


def kind_of(examples: Sequence[Example], task: Task) -> Kind:
    """How these data are measured with such a model. Raises DataError if they do not fit together."""
    first = examples[0]
    if task == "sequence-classification":
        if not isinstance(first, Labelled):
            raise DataError("the model classifies texts: data of texts with their labels are needed")
        if any(map(images_of, examples)):
            raise DataError("the model classifies texts and sees no images; --columns image= ignores them")
        return "classes"
    return "choices" if isinstance(first, (Choice, Labelled)) else "texts"


def rows_of(
    examples: Sequence[Example],
    reader: Any,
    *,
    task: Task,
    labels: Sequence[str] = (),
    prompt: str = PROMPT,
    max_length: int = 0,
) -> list[Row]:
    """Every row that measuring these examples takes; questions have one for each answer.

    reader
        the tokenizer, or `lora_squeeze.seeing.Seeing`.
    labels
        the classes, of a classifier or as the answers of a language model.
    prompt
        of a question or a text that is classified by a language model; {text} stands for it.

    Raises DataError, saying which example, for what cannot be encoded or has nothing left to learn.
    """
    rows: list[Row] = []
    for place, example in enumerate(examples):
        if task == "sequence-classification":
            assert isinstance(example, Labelled)
            rows.append(Row(place, 0, encode_class(example, reader, labels, max_length=max_length)))
        elif isinstance(example, (Choice, Labelled)):
            answers = example.choices if isinstance(example, Choice) else labels
            rows += [
                Row(place, number, _answer(example, answer, reader, prompt, max_length), len(answer))
                for number, answer in enumerate(answers)
            ]
        else:
            rows.append(Row(place, 0, encode(example, reader, max_length=max_length)))
    return _checked(rows)


def learnt_rows(
    examples: Sequence[Example],
    reader: Any,
    *,
    task: Task,
    labels: Sequence[str] = (),
    prompt: str = PROMPT,
    max_length: int = 0,
) -> list[Row]:
    """One row for each example, with the right answer: what the adapter saw, or would see, in training."""
    if kind_of(examples, task) != "choices":
        return rows_of(examples, reader, task=task, labels=labels, max_length=max_length)
    return _checked([
        Row(place, 0, _answer(example, right_answer(example), reader, prompt, max_length))
        for place, example in enumerate(examples)
    ])  # fmt: skip


def right_answer(example: Example) -> str:
    """The text of a question's answer, or of a text's class."""
    assert isinstance(example, (Choice, Labelled))
    return example.choices[example.answer] if isinstance(example, Choice) else example.label


def batches_of(
    rows: Sequence[Row],
    reader: Any,
    *,
    batch_size: int = 16,
    device: str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> Iterable[Batch]:
    """Pad rows to batches, the longest first: what does not fit into memory shows at once, but for large images.

    on_batch
        called with the number of rows when a batch has been used.
    """
    if batch_size < 1:
        raise DataError(f"batches of {batch_size} rows are not possible")
    ordered = sorted(rows, key=lambda row: -row.length)
    for start in range(0, len(ordered), batch_size):
        chosen = tuple(ordered[start : start + batch_size])
        padded = _padded(chosen, reader)
        inputs = {name: tensor.to(device) for name, tensor in padded.items() if name != "labels"}
        yield Batch(rows=chosen, inputs=inputs, labels=padded["labels"].to(device))
        if on_batch is not None:
            on_batch(len(chosen))


def digest_of(examples: Iterable[Example]) -> str:
    """SHA-256 of examples in their order, whatever file they come from."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example!r}\n".encode())
    return digest.hexdigest()


def _padded(rows: Sequence[Row], reader: Any) -> dict[str, Tensor]:
    encoded = [row.encoded for row in rows]
    if isinstance(encoded[0], Encoded):
        return collate([one for one in encoded if isinstance(one, Encoded)], reader)
    return dict(reader.pad(encoded, return_tensors="pt"))


def _answer(example: Example, answer: str, reader: Any, prompt: str, max_length: int) -> Encoded:
    """A question and one answer, without the token for the end: that says nothing about the answer."""
    text = example.question if isinstance(example, Choice) else example.text if isinstance(example, Labelled) else ""
    if "{text}" not in prompt:
        raise DataError(f"the prompt {prompt!r} has no {{text}} in it, which stands for the question")
    whole = encode(Completion(prompt.replace("{text}", text), f" {answer}", images_of(example)), reader)
    ids, labels = whole.input_ids, whole.labels
    if ids[-1] == tokenizer_of(reader).eos_token_id:
        ids, labels = ids[:-1], labels[:-1]
    if max_length and len(ids) > max_length:  # a question loses its beginning, never its answer
        if whole.images:
            raise DataError(
                f"{whole.images[0]}: the question has {len(ids)} tokens, and the image at its beginning cannot be cut "
                f"off: give --max-length {len(ids)}, or 0"
            )
        ids, labels = ids[-max_length:], labels[-max_length:]
    return replace(whole, input_ids=ids, labels=labels)


def _checked(rows: list[Row]) -> list[Row]:
    for row in rows:
        # The first token is never predicted, so it cannot count.
        if isinstance(row.encoded, Encoded) and not any(label != IGNORED for label in row.encoded.labels[1:]):
            raise DataError(
                f"example {row.example + 1} has no token whose loss counts (after {row.length} tokens); is it empty, "
                "or cut off by --max-length?"
            )
    return rows
