"""Prompts, with their images where there are any → what adapters write after them, greedily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_squeeze.collating import collate
from lora_squeeze.data import Answered
from lora_squeeze.encoding import IGNORED, Encoded, encode
from lora_squeeze.evaluation.subject import Contestant, Subject, activate


@torch.no_grad()
def completions(
    subject: Subject,
    contestants: Sequence[Contestant],
    examples: Sequence[Answered],
    *,
    batch_size: int,
    max_tokens: int,
) -> list[list[str]]:
    """What every contestant writes after every prompt, by greedy decoding of at most so many tokens.

    They take turns on each batch, whose images are opened once. Raises what `lora_squeeze.collating.collate` raises.
    """
    tokenizer = subject.tokenizer
    written: list[list[str]] = [[] for _ in contestants]
    for start in range(0, len(examples), batch_size):
        batch = prompts(examples[start : start + batch_size], subject.reader)
        inputs = {name: value.to(subject.device) for name, value in batch.items()}
        for contestant, texts in zip(contestants, written, strict=True):
            activate(subject, contestant)
            found = subject.model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = found[:, inputs["input_ids"].shape[1] :]
            texts += [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new]
    return written


def prompts(examples: Sequence[Answered], reader: Any) -> dict[str, Tensor]:
    """A batch for `generate`: input_ids and attention_mask, (examples, longest), and what the processor adds.

    `collate` pads on the right, but what is written must follow its prompt: here the padding is on the left, in
    every tensor that has a number for each token.

    reader
        the tokenizer, or `lora_squeeze.seeing.Seeing`.
    """
    batch = collate([_prompt(one, reader) for one in examples], reader)
    del batch["labels"]
    mask = batch["attention_mask"]
    empty = mask.shape[1] - mask.sum(dim=1)

    def moved(values: Tensor) -> Tensor:
        return torch.stack([one.roll(by) for one, by in zip(values, empty.tolist(), strict=True)])

    of_tokens = [name for name in batch if name in ("input_ids", "attention_mask") or name.endswith("token_type_ids")]
    return {**batch, **{name: moved(batch[name]) for name in of_tokens}}


def _prompt(example: Answered, reader: Any) -> Encoded:
    encoded = encode(example, reader)
    size = next(place for place, label in enumerate(encoded.labels) if label != IGNORED)
    return replace(encoded, input_ids=encoded.input_ids[:size], labels=encoded.labels[:size])
