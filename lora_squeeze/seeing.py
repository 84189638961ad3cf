"""How a model that sees is told where in a text an image stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_squeeze.data.messages import PLACE, Message
from lora_squeeze.errors import ModelError

__all__ = ["Seeing", "seeing_of"]


@dataclass(frozen=True)
class Seeing:
    """The processor of a model that sees: its tokenizer, and the spelling of an image.

    token
        stands for one image in a text; the processor puts as many as the image takes in its place.
    mark
        the token with what the model's chat template has around it.
    takes_parts
        whether the chat template takes messages in parts, and writes the tokens itself.
    """

    processor: Any
    tokenizer: Any
    token: str
    mark: str
    takes_parts: bool

    def content(self, message: Message) -> Any:
        """A message as the chat template takes it."""
        if not self.takes_parts:
            return message.content.replace(PLACE, self.mark)
        parts: list[dict[str, str]] = []
        for number, text in enumerate(message.content.split(PLACE)):
            parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
        return parts


def seeing_of(processor: Any, tokenizer: Any) -> Seeing:
    """Find out how a processor spells images. Raises ModelError if it takes none."""
    token = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    if token is None or getattr(processor, "image_processor", None) is None:
        raise ModelError(f"{type(processor).__name__} takes no images")
    takes_parts = processor.chat_template is not None
    mark = _mark(processor, str(token)) if takes_parts else str(token)
    return Seeing(processor, tokenizer, str(token), mark, takes_parts)


def _mark(processor: Any, token: str) -> str:
    """What the chat template writes between the beginning of a turn and its text where the turn has an image."""
    text = {"type": "text", "text": "?"}
    with_image, without = (
        str(processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False))
        for parts in ([{"type": "image"}, text], [text])
    )
    before = without.partition("?")[0]
    found = with_image.removeprefix(before).partition("?")[0]
    return found if token in found and with_image.startswith(before) else token
