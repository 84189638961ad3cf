"""Examples → token ids, with the loss on what is to be learnt and nothing else.

A prompt is followed by its completion: where the tokens of the whole text begin with those of the
prompt, they are used; where the boundary falls inside a token, prompt and completion are encoded
apart, which is what the model will see when it completes the prompt.

An image is a single token here; `lora_squeeze.collating` shows it to the model.
"""

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
    Picture,
    Prompt,
    Text,
    images_of,
)
from lora_squeeze.data.examples import with_places
from lora_squeeze.data.messages import PLACE
from lora_squeeze.errors import DataError, ModelError
from lora_squeeze.seeing import Seeing, tokenizer_of

__all__ = ["IGNORED", "Encoded", "encode", "encode_class", "pieces_of", "prompt_text"]

IGNORED = -100  # the label of a token that does not count in the loss


@dataclass(frozen=True)
class Encoded:
    """Token ids and, of the same length, labels: the id again where the token is to be learnt, else IGNORED.

    images
        that the model is shown. Each is a single token among the ids.
    head
        the text up to where the last image has been read; it is the first `head_size` of the ids, without the `lead`
        special tokens before it.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    images: tuple[Picture, ...] = ()
    head: str = ""
    head_size: int = 0
    lead: int = 0

    @property
    def learnt(self) -> int:
        """How many tokens count."""
        return sum(label != IGNORED for label in self.labels)


def encode(example: Example, reader: Any, *, max_length: int = 0, completion_only: bool = True) -> Encoded:
    """Encode an example for a causal language model.

    reader
        the tokenizer, or `lora_squeeze.seeing.Seeing`.
    max_length
        in tokens, an image counting as one; what is longer loses its end, and the images there. 0: no limit.
    completion_only
        whether prompts are left out of the loss.

    Raises DataError for an example that is not a text to learn (a class, a preference), ModelError for images that
    a tokenizer alone cannot show.
    """
    pieces = pieces_of(example, reader)
    tokenizer = tokenizer_of(reader)
    ids, counts, ends = _encode_pieces(pieces, tokenizer)
    end = tokenizer.eos_token_id
    if _conversation(example) is None and end is not None and ids[-1:] != [end]:  # a template sets its own end
        ids, counts = [*ids, end], [*counts, True]
    everything = not completion_only
    labels = [one if counted or everything else IGNORED for one, counted in zip(ids, counts, strict=True)]
    encoded = Encoded(tuple(ids[: max_length or None]), tuple(labels[: max_length or None]))
    if not isinstance(reader, Seeing):
        return encoded
    shown = ids.count(reader.token_id)
    if shown != len(images_of(example)):
        raise DataError(
            f"{_named(example)}: the model would be shown {len(images_of(example))} images and find {shown} places "
            f"for them; is {reader.token} in a text, or an image after the last thing to learn, or with the system?"
        )
    return _with_head(encoded, pieces, ends, images_of(example), reader)


def encode_class(example: Labelled, tokenizer: Any, labels: Sequence[str], *, max_length: int = 0) -> dict[str, Any]:
    """Encode an example for a sequence classification: what the tokenizer gives, and the label's number.

    Raises DataError for a label that is not among `labels`.
    """
    if example.label not in labels:
        raise DataError(f"label '{example.label}' is not one of {', '.join(labels)} (text: {example.text[:40]!r})")
    encoded = tokenizer(example.text, truncation=bool(max_length), max_length=max_length or None)
    return {**encoded, "labels": labels.index(example.label)}


def prompt_text(prompt: Prompt, reader: Any) -> str:
    """A prompt as the model reads it: a text as it is, messages through the chat template."""
    return prompt if isinstance(prompt, str) else _render(prompt, reader, reply=True)


def pieces_of(example: Example, reader: Any) -> list[tuple[str, bool]]:
    """The text of an example in pieces, with marks for its images, and for each piece whether it is to be learnt."""
    images = images_of(example)
    if not images:
        return _pieces(example, reader)
    if not isinstance(reader, Seeing):
        raise ModelError(f"{images[0]}: the model reads only texts; columns image = '' ignores images")
    try:
        example = with_places(example)
    except ValueError as error:
        raise DataError(f"{images[0]}: {error}") from error
    pieces: list[tuple[str, bool]] = []
    for piece, learnt in _pieces(example, reader):
        for number, text in enumerate(piece.split(PLACE)):
            pieces += [(reader.mark, False)] * (number > 0) + [(text, learnt)] * bool(text)
    return _joined(pieces)


def _joined(pieces: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """What is only read is one piece up to what is learnt."""
    joined: list[tuple[str, bool]] = []
    for text, learnt in pieces:
        if joined and not learnt and not joined[-1][1]:
            joined[-1] = (joined[-1][0] + text, False)
        else:
            joined.append((text, learnt))
    return joined


def _named(example: Example) -> str:
    images = images_of(example)
    return str(images[0]) if images else repr(example)[:60]


def _pieces(example: Example, reader: Any) -> list[tuple[str, bool]]:
    if messages := _conversation(example):
        return _chat_pieces(messages, reader)
    match example:
        case Text(text):
            return [(text, True)]
        case Completion(prompt, completion) | Answered(prompt, completion):
            return [(prompt_text(prompt, reader), False), (completion, True)]
        case Choice(question, choices, answer):
            return [(f"{question}\nAnswer:", False), (f" {choices[answer]}", True)]
        case _:
            kind = KINDS[type(example)]
            raise DataError(
                f"data of the kind '{kind}' hold no text to learn to write; give texts, completions or chats"
            )


def _conversation(example: Example) -> tuple[Message, ...] | None:
    match example:
        case Chat(messages):
            return messages
        case Completion(prompt, reply) | Answered(prompt, reply) if not isinstance(prompt, str):
            return (*prompt, Message("assistant", reply))
        case _:
            return None


def _with_head(
    encoded: Encoded, pieces: Sequence[tuple[str, bool]], ends: Sequence[int], images: Sequence[Picture], seeing: Seeing
) -> Encoded:
    """With the images that are left after the end was cut off, and the text up to where the last has been read.

    That is the end of the prompt around it, so that the processor reads it as a whole; where the prompt is cut, or
    the image stands in what is learnt, it ends with the image.
    """
    ids = encoded.input_ids
    places = [at for at, one in enumerate(ids) if one == seeing.token_id]
    if not places:
        return encoded
    labels = tuple(IGNORED if at in places else label for at, label in enumerate(encoded.labels))
    text, bos = "", seeing.tokenizer.bos_token_id
    lead = int(bos is not None and ids[0] == bos and not _begins_with_special(pieces[0][0], seeing.tokenizer))
    for (piece, learnt), end in zip(pieces, ends, strict=True):
        if end > places[-1]:
            whole = not learnt and end <= len(ids)
            left = len(places) - text.count(seeing.token)
            text += piece if whole else seeing.token.join(piece.split(seeing.token)[:left]) + seeing.token
            size = end if whole else places[-1] + 1
            return Encoded(ids, labels, tuple(images[: len(places)]), text, size, lead)
        text += piece
    raise AssertionError("a token of the pieces is in none of them")


def _encode_pieces(pieces: Sequence[tuple[str, bool]], tokenizer: Any) -> tuple[list[int], list[bool], list[int]]:
    """Ids of the whole text, whether each counts, and where pieces end; special tokens at the start are the first's."""
    templated = _begins_with_special(pieces[0][0], tokenizer)
    whole = _ids("".join(text for text, _ in pieces), tokenizer, special=not templated)
    ids: list[int] = []
    counts: list[bool] = []
    ends: list[int] = []
    so_far = ""
    for number, (text, learnt) in enumerate(pieces, start=1):
        so_far += text
        upto = whole if number == len(pieces) else _ids(so_far, tokenizer, special=not templated)
        if whole[: len(upto)] != upto or upto[: len(ids)] != ids:
            whole = [*ids, *_ids(text, tokenizer, special=not ids and not templated)]
            upto = whole
            rest = "".join(later for later, _ in pieces[number:])
            whole = [*upto, *_ids(rest, tokenizer, special=False)] if rest else upto
        counts += [learnt] * (len(upto) - len(ids))
        ids = upto
        ends.append(len(ids))
    return ids, counts, ends


def _ids(text: str, tokenizer: Any, *, special: bool) -> list[int]:
    """Token ids without a token for the end of the text, which only `encode` sets."""
    ids: list[int] = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    if (
        special
        and len(ids) > 1
        and ids[-1] in ends
        and not text.endswith(str(tokenizer.convert_ids_to_tokens(ids[-1])))
    ):
        return ids[:-1]
    return ids


def _begins_with_special(text: str, tokenizer: Any) -> bool:
    """Whether the text brings its own first token, as chat templates do: it must not be added twice."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def _render(messages: Sequence[Message], reader: Any, *, reply: bool) -> str:
    try:
        if isinstance(reader, Seeing):
            return reader.render(list(messages), add_generation_prompt=reply)
        turns = [{"role": one.role, "content": one.content} for one in messages]
        return reader.apply_chat_template(turns, tokenize=False, add_generation_prompt=reply)
    except Exception as error:  # what a template raises is up to its author
        raise ModelError(f"the model's chat template does not take this conversation: {error}") from error


def _chat_pieces(messages: Sequence[Message], reader: Any) -> list[tuple[str, bool]]:
    """Alternately what is read and what the assistant says; what follows its last word is left out.

    A template may show earlier turns differently once others have followed; then only the last
    turn of the assistant is learnt, after the conversation as the model will see it.
    """
    said = [place for place, message in enumerate(messages) if message.role == "assistant"]
    pieces = _turns(messages, said, reader) or _turns(messages, said[-1:], reader)
    if pieces is None:
        raise ModelError(
            "the model's chat template does not begin a reply as it asks for one; give completions instead"
        )
    return pieces


def _turns(messages: Sequence[Message], said: Sequence[int], reader: Any) -> list[tuple[str, bool]] | None:
    whole = _render(messages[: said[-1] + 1], reader, reply=False)
    pieces: list[tuple[str, bool]] = []
    so_far = ""
    for place in said:
        asked = _render(messages[:place], reader, reply=True) if place else ""
        answered = _render(messages[: place + 1], reader, reply=False)
        if not (asked.startswith(so_far) and answered.startswith(asked) and whole.startswith(answered)):
            return None
        pieces += [(asked[len(so_far) :], False), (answered[len(asked) :], True)]
        so_far = answered
    return pieces
