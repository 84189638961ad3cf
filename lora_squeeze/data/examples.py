"""Rows of data → examples. What a row is shows in its keys.

    text                                            Text
    prompt, completion                              Completion
    messages                                        Chat
    text, label                                     Labelled
    question or context, choices, answer            Choice
    prompt, chosen, rejected                        Preference
    prompt or question, answer                      Answered
    any but chosen, rejected, with image or images  the same, with what is seen (see `lora_squeeze.data.images`)

Other keys are ignored; other names for these are translated with `columns`.

An image stands where the text says so: as <image>, or as a part {"type": "image"} of a message. Where it does not,
images come first: before a prompt, a question, a text, or what the user says first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from lora_squeeze.data.images import Picture, pictures_of
from lora_squeeze.data.messages import Message, Prompt, flattened, placed
from lora_squeeze.errors import DataError

__all__ = [
    "KINDS",
    "Answered",
    "Chat",
    "Choice",
    "Completion",
    "Example",
    "Labelled",
    "Message",
    "Preference",
    "Prompt",
    "Row",
    "Text",
    "example_of",
    "images_of",
    "with_places",
    "without_sight",
]


@dataclass(frozen=True)
class Row:
    """What a source holds at one place; `place` is a file and a line, or what comes nearest.

    folder
        where the file is: paths of images start there.
    """

    place: str
    fields: Mapping[str, Any]
    folder: Path = Path()


@dataclass(frozen=True)
class Text:
    """A text to be continued: every token counts."""

    text: str
    images: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What is read, and what shall follow; only the completion counts."""

    prompt: Prompt
    completion: str
    images: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Chat:
    """A conversation; what the assistant says counts."""

    messages: tuple[Message, ...]
    images: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Labelled:
    """A text and the class it belongs to."""

    text: str
    label: str
    images: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A question with its choices; `answer` is the place of the right one, counted from 0."""

    question: str
    choices: tuple[str, ...]
    answer: int
    images: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Preference:
    """Two completions of a prompt, of which one is better."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Answered:
    """A prompt whose completion can be checked against an answer; `fields` is the whole row."""

    prompt: Prompt
    answer: str
    fields: Mapping[str, Any]
    images: tuple[Picture, ...] = ()


Example: TypeAlias = Text | Completion | Chat | Labelled | Choice | Preference | Answered


def example_of(row: Row, columns: Mapping[str, str] | None = None) -> Example:
    """Turn a row into the example that its keys say it is.

    columns
        our key → the row's, as {"text": "sentence"}; for choices several, as "ending0, ending1". {"image": ""}
        reads the row without its images.

    Raises DataError, with the row's place, if the keys fit nothing or a value is of the wrong type.
    """
    fields = _renamed(row, columns or {})
    for kind, (keys, build) in _KINDS.items():
        if all(any(one in fields for one in key.split("|")) for key in keys):
            try:
                flat, brought, free = flattened(
                    fields, _texts(keys), row.folder, ignore_images=columns is not None and columns.get("image") == ""
                )
                return _with_images(build(flat), brought, pictures_of(fields, row.folder), free=free, place=row.place)
            except ValueError as error:
                raise DataError(f"{row.place}: {error} (read as {kind}: {', '.join(keys)})") from None
    raise DataError(
        f"{row.place}: has the keys {', '.join(map(str, row.fields)) or 'of nothing'}; known are "
        + "; ".join(f"{', '.join(keys).replace('|', ' or ')} ({kind})" for kind, (keys, _) in _KINDS.items())
        + ". Other names are translated by columns, as text = 'sentence'"
    )


def images_of(example: Example) -> tuple[Picture, ...]:
    """The images of an example; a preference has none."""
    return () if isinstance(example, Preference) else example.images


def with_places(example: Example) -> Example:
    """The example with a place in its text for each of its images (see `lora_squeeze.data.messages.placed`)."""
    match example:
        case Text(text, images) | Labelled(text, _, images) if images:
            return replace(example, text=placed(text, images))
        case Choice(question, _, _, images) if images:
            return replace(example, question=placed(question, images))
        case Completion(prompt, _, images) | Answered(prompt, _, _, images) if images:
            return replace(example, prompt=placed(prompt, images))
        case Chat(messages, images) if images:
            return replace(example, messages=placed(messages, images))
        case _:
            return example


def without_sight(example: Example) -> Example:
    """The example with grey images of the same sizes: what is still answered rightly was never seen."""
    if isinstance(example, Preference):
        return example
    return replace(example, images=tuple(replace(one, blank=True) for one in example.images))


class _BadValue(ValueError):
    pass


def _texts(keys: tuple[str, ...]) -> list[str]:
    """The fields of a kind that hold texts or messages."""
    return ["prompt", *(one for key in keys for one in key.split("|") if one not in ("label", "choices", "answer"))]


def _with_images(
    example: Example, brought: tuple[Picture, ...], beside: tuple[Picture, ...], *, free: int, place: str
) -> Example:
    """With the images of its messages, or of the row's columns; free: places in messages that bring none."""
    if not brought and not beside:
        if free:
            raise _BadValue(f"its messages have places for {free} images, and there are none")
        return example
    if isinstance(example, Preference):
        raise _BadValue("there is no method for preferences about images; columns image = '' reads the texts alone")
    if brought and beside:
        raise _BadValue("has images in its messages and in a column; give one of them")
    images = tuple(replace(one, place=place) for one in brought or beside)
    return with_places(replace(example, images=images))


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    fields = dict(row.fields)
    for ours, theirs in columns.items():
        if not theirs:
            for one in ("image", "images") if ours == "image" else (ours,):
                fields.pop(one, None)
            continue
        if ours in ("image", "images") and theirs not in row.fields:
            continue  # rows without an image may be among the others
        names = [name.strip() for name in theirs.split(",")]
        if missing := [name for name in names if name not in row.fields]:
            known = ", ".join(map(str, row.fields))
            raise DataError(f"{row.place}: has no '{missing[0]}', which columns names for '{ours}'; it has {known}")
        fields[ours] = row.fields[names[0]] if len(names) == 1 else [row.fields[name] for name in names]
    return fields


def _text_of(fields: Mapping[str, Any], *keys: str) -> str:
    key = next(key for key in keys if key in fields)
    value = fields[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _BadValue(f"'{key}' must be a text, not {_shown(value)}")
    return str(value)


def _messages(value: Any, key: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _BadValue(f"'{key}' must be a list of messages with role and content, not {_shown(value)}")
    messages: list[Message] = []
    for number, one in enumerate(value, start=1):
        if not isinstance(one, Mapping) or not all(isinstance(one.get(name), str) for name in ("role", "content")):
            raise _BadValue(f"message {number} of '{key}' must have a text as role and as content, not {_shown(one)}")
        messages.append(Message(one["role"], one["content"]))
    return tuple(messages)


def _prompt(fields: Mapping[str, Any], *keys: str) -> Prompt:
    key = next(key for key in keys if key in fields)
    return _text_of(fields, key) if isinstance(fields[key], str | int | float) else _messages(fields[key], key)


def _reply(fields: Mapping[str, Any], key: str) -> str:
    """A completion: a text, or a conversation's one message."""
    if isinstance(fields[key], str | int | float):
        return _text_of(fields, key)
    messages = _messages(fields[key], key)
    if len(messages) != 1:
        raise _BadValue(f"'{key}' must be a text or one message, not {len(messages)} messages")
    return messages[0].content


def _chat(fields: Mapping[str, Any]) -> Chat:
    messages = _messages(fields["messages"], "messages")
    if not any(message.role == "assistant" for message in messages):
        raise _BadValue("'messages' holds no message of the assistant, so there is nothing to learn")
    return Chat(messages)


def _labelled(fields: Mapping[str, Any]) -> Labelled:
    label = fields["label"]
    if not isinstance(label, str | int | bool):
        raise _BadValue(f"'label' must be a text or a whole number, not {_shown(label)}")
    return Labelled(_text_of(fields, "text"), str(label))


def _preference(fields: Mapping[str, Any]) -> Preference:
    if "prompt" in fields:
        return Preference(_prompt(fields, "prompt"), _reply(fields, "chosen"), _reply(fields, "rejected"))
    chosen, rejected = (_messages(fields[key], key) for key in ("chosen", "rejected"))
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        raise _BadValue(
            "without a prompt, 'chosen' and 'rejected' must be conversations that differ in the last message"
        )
    return Preference(chosen[:-1], chosen[-1].content, rejected[-1].content)


def _choice(fields: Mapping[str, Any]) -> Choice:
    """`choices` is a list, or {"text": […], "label": […]}; `answer` a place, a letter, a label or the text."""
    given, labels = fields["choices"], None
    if isinstance(given, Mapping):
        given, labels = given.get("text"), given.get("label")
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) < 2:
        raise _BadValue(f"'choices' must be a list of at least two texts, not {_shown(fields['choices'])}")
    choices = tuple(str(one) for one in given)
    question = "\n".join(_text_of(fields, key) for key in ("context", "question") if key in fields)
    return Choice(question, choices, _place_of(fields["answer"], choices, labels))


def _place_of(answer: Any, choices: tuple[str, ...], labels: Any) -> int:
    names = [str(label) for label in labels] if isinstance(labels, Sequence) else []
    if names and len(names) != len(choices):
        raise _BadValue(f"'choices' has {len(names)} labels for {len(choices)} choices")
    places = [str(number) for number in range(len(choices))]
    letters = [chr(ord("A") + number) for number in range(len(choices))]
    if names and all(name.removeprefix("-").isdecimal() for name in names):
        places = []  # counted from 0 beside labels that begin at 1, each would be read as its neighbour's label
    if isinstance(answer, bool) and str(answer) not in names:
        answer = int(answer)
    for known in (names, places) if isinstance(answer, int) else (names, choices, letters, places):
        if str(answer) in known:
            return list(known).index(str(answer))
    called = f"one of the labels {', '.join(names)}, nor " if names else ""
    raise _BadValue(
        f"'answer' is {_shown(answer)}: neither {called}one of the {len(choices)} choices, nor the letter"
        f"{' or place' if places else ''} of one"
    )


def _answered(fields: Mapping[str, Any]) -> Answered:
    return Answered(_prompt(fields, "prompt", "question"), _text_of(fields, "answer"), dict(fields))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# The first whose keys are all there decides, so what needs more keys comes first.
_KINDS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Example]]] = {
    "preferences": (("chosen", "rejected"), _preference),
    "multiple choice": (("question|context", "choices", "answer"), _choice),
    "chat": (("messages",), _chat),
    "completions": (
        ("prompt", "completion"),
        lambda fields: Completion(_prompt(fields, "prompt"), _reply(fields, "completion")),
    ),
    "answers": (("prompt|question", "answer"), _answered),
    "classes": (("text", "label"), _labelled),
    "texts": (("text",), lambda fields: Text(_text_of(fields, "text"))),
}

KINDS: Mapping[type, str] = {
    Preference: "preferences",
    Choice: "multiple choice",
    Chat: "chat",
    Completion: "completions",
    Answered: "answers",
    Labelled: "classes",
    Text: "texts",
}
