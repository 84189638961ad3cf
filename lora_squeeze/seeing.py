"""How a model that sees is told where in a text an image stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_squeeze.data.messages import PLACE, Message
from lora_squeeze.errors import ModelError
from lora_squeeze.extras import require

__all__ = ["Seeing", "seeing_of", "tokenizer_of"]


@dataclass(frozen=True)
class Seeing:
    """The processor of a model that sees: its tokenizer, and the spelling of an image.

    token
        stands for one image in a text; the processor puts as many as the image takes in its place.
    mark
        the token with what the model's chat template has around it.
    frame
        the ids that may take the token's place.
    takes_parts
        whether the chat template takes messages in parts, and writes the tokens itself.
    """

    processor: Any
    tokenizer: Any
    token: str
    mark: str
    frame: frozenset[int] = field(repr=False)
    takes_parts: bool

    @property
    def token_id(self) -> int:
        """Of `token`."""
        return self.tokenizer.convert_tokens_to_ids(self.token)

    def render(self, messages: list[Message], **options: Any) -> str:
        """Messages through the chat template: the processor's, else the tokenizer's."""
        template = self.tokenizer if self.processor.chat_template is None else self.processor
        turns = [{"role": one.role, "content": self._content(one)} for one in messages]
        return template.apply_chat_template(turns, tokenize=False, **options)

    def _content(self, message: Message) -> Any:
        if not self.takes_parts:
            return message.content.replace(PLACE, self.token)
        parts: list[dict[str, str]] = []
        for number, text in enumerate(message.content.split(PLACE)):
            parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
        return parts or [{"type": "text", "text": ""}]


def tokenizer_of(reader: Any) -> Any:
    """The tokenizer of what reads examples: it is one, or Seeing has it."""
    return reader.tokenizer if isinstance(reader, Seeing) else reader


def seeing_of(processor: Any, tokenizer: Any) -> Seeing:
    """Find out how a processor spells images, by showing it one. Raises ModelError if it takes none."""
    if getattr(processor, "image_processor", None) is None:
        raise ModelError(f"{type(processor).__name__} takes no images")
    reasons: list[str] = []
    for name in ("image_token", "boi_token"):  # Gemma 4 marks an image by the first, older Gemma 3 by the second
        if token := getattr(processor, name, None):
            try:
                frame = _frame(processor, str(token))
            except Exception as error:  # what a processor raises is up to its author
                reasons.append(str(error))
                continue
            mark = _mark(processor, str(token)) if processor.chat_template is not None else ""
            return Seeing(processor, tokenizer, str(token), mark or str(token), frame, bool(mark))
    raise ModelError(f"{type(processor).__name__} takes no images: {'; '.join(reasons) or 'no token stands for one'}")


def _frame(processor: Any, token: str) -> frozenset[int]:
    image = require("PIL.Image", "vision").new("RGB", (64, 64))
    ids = processor(text=[token], images=[[image]], add_special_tokens=False)["input_ids"]
    return frozenset(int(one) for one in ids[0])


def _mark(processor: Any, token: str) -> str:
    """What the chat template writes between the beginning of a turn and its text where the turn has an image.

    "" if it does not take messages in parts.
    """
    text = {"type": "text", "text": "?"}
    try:
        with_image, without = (
            str(processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False))
            for parts in ([{"type": "image"}, text], [text])
        )
    except Exception:  # what a template raises is up to its author
        return ""
    if token not in with_image or "'type'" in with_image:
        return ""
    before = without.partition("?")[0]
    found = with_image.removeprefix(before).partition("?")[0]
    return found if token in found and with_image.startswith(before) else token
