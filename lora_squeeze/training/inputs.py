"""Data as the methods take them: examples of the right kind, training and held-out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_squeeze.data import (
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
    Text,
    images_of,
    labels_of,
    read_examples,
    split,
)
from lora_squeeze.encoding import Encoded, encode, encode_class
from lora_squeeze.errors import DataError
from lora_squeeze.extras import require
from lora_squeeze.training.settings import RunSettings

__all__ = [
    "Inputs",
    "as_answered",
    "classes",
    "encoded",
    "groups",
    "places",
    "preferences",
    "read_inputs",
    "sequences",
]

_TAKES: dict[str, tuple[type, ...]] = {
    "sft": (Text, Completion, Chat, Answered, Choice),
    "classify": (Labelled,),
    "dpo": (Preference,),
    "grpo": (Answered, Completion),
}


@dataclass(frozen=True)
class Inputs:
    """Examples to train on and to evaluate on, and, of a classification, the classes."""

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    labels: tuple[str, ...] = ()

    @property
    def have_images(self) -> bool:
        """Whether a model is needed that sees."""
        return any(map(images_of, (*self.training, *self.held_out)))


def read_inputs(settings: RunSettings, *, labels: Sequence[str] = ()) -> Inputs:
    """Read what `[data]` names.

    labels
        of the adapter that training starts from; none: those that occur.

    Raises DataError, also for a kind of data that the method has no use for.
    """
    chosen = settings.data
    training = read_examples(chosen.source, columns=chosen.columns, limit=chosen.max_examples)
    held_out: tuple[Example, ...] = ()
    if chosen.eval_source:
        held_out = read_examples(chosen.eval_source, columns=chosen.columns)
    elif chosen.eval_fraction:
        training, held_out = split(training, held_out=chosen.eval_fraction, seed=settings.training.seed)
    held_out = held_out[: chosen.max_eval_examples or None]
    for examples, sources in ((training, chosen.source), (held_out, chosen.eval_source or chosen.source)):
        _check_kind(examples, settings.method, sources)
    if settings.method != "classify":
        return Inputs(training, held_out)
    found = tuple(labels) or labels_of(training)
    if len(found) < 2:
        raise DataError(
            f"{', '.join(chosen.source)}: all examples have the label '{', '.join(found)}'; nothing to learn"
        )
    return Inputs(training, held_out, found)


def encoded(examples: Sequence[Example], reader: Any, settings: RunSettings) -> tuple[list[Encoded], int]:
    """Examples as token ids with labels, and how many had to be left out: cut off before anything to learn."""
    training = settings.training
    found = [
        encode(one, reader, max_length=training.max_length, completion_only=training.completion_only)
        for one in examples
    ]
    kept = [one for one in found if one.learnt]
    if found and not kept:
        raise DataError(f"every example is longer than [training] max_length = {training.max_length} tokens")
    return kept, len(found) - len(kept)


def sequences(encoded: Sequence[Encoded]) -> Any:
    """Token ids and labels."""
    return _dataset([{"input_ids": list(one.input_ids), "labels": list(one.labels)} for one in encoded])


def places(count: int, start: int = 0) -> Any:
    """Numbers of examples, which are put into batches when they are needed."""
    return _dataset([{"place": place} for place in range(start, start + count)])


def classes(examples: Sequence[Example], tokenizer: Any, labels: Sequence[str], settings: RunSettings) -> Any:
    """Examples as token ids and the number of their class."""
    length = settings.training.max_length
    labelled = (one for one in examples if isinstance(one, Labelled))
    return _dataset([encode_class(one, tokenizer, labels, max_length=length) for one in labelled])


def preferences(examples: Sequence[Example]) -> Any:
    """Pairs as TRL takes them: all texts, or, if any prompt is a conversation, all conversations."""
    pairs = [one for one in examples if isinstance(one, Preference)]
    if all(isinstance(one.prompt, str) for one in pairs):
        return _dataset([{"prompt": one.prompt, "chosen": one.chosen, "rejected": one.rejected} for one in pairs])
    return _dataset(
        [{"prompt": _turns(one.prompt), "chosen": _said(one.chosen), "rejected": _said(one.rejected)} for one in pairs]
    )


def as_answered(examples: Sequence[Example]) -> tuple[Answered, ...]:
    """Prompts with their answers; the completion of an example is its answer."""
    return tuple(
        one if isinstance(one, Answered) else Answered(one.prompt, one.completion, {})
        for one in examples
        if isinstance(one, Answered | Completion)
    )


def groups(examples: Sequence[Answered]) -> Any:
    """Prompts as TRL takes them, each with the place of its example."""
    plain = all(isinstance(one.prompt, str) for one in examples)
    prompts = [one.prompt if plain else _turns(one.prompt) for one in examples]
    return _dataset([{"prompt": prompt, "place": place} for place, prompt in enumerate(prompts)])


def _turns(prompt: Prompt) -> list[dict[str, str]]:
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return [{"role": message.role, "content": message.content} for message in messages]


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _check_kind(examples: Sequence[Example], method: str, sources: Sequence[str]) -> None:
    if examples and not isinstance(examples[0], _TAKES[method]):
        kind = type(examples[0])
        fitting = [name for name, kinds in _TAKES.items() if kind in kinds]
        advice = f'; for these, [training] method = "{fitting[0]}"' if fitting else ""
        wanted = " or ".join(KINDS[one] for one in _TAKES[method])
        raise DataError(
            f"{', '.join(sources)}: data of the kind '{KINDS[kind]}', and method {method} needs {wanted}{advice}"
        )
    if method != "sft" and any(map(images_of, examples)):
        raise DataError(
            f"{', '.join(sources)}: holds images, which only method sft learns from; [data] columns = {{ image = '' }} "
            "reads the texts alone"
        )


def _dataset(rows: list[dict[str, Any]]) -> Any:
    return require("datasets", "train").Dataset.from_list(rows) if rows else None
