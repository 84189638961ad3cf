"""Train a LoRA for question classification at a high rank, squeeze it, and see what it costs.

A sentence encoder (all-MiniLM-L6-v2, 22.7 million parameters) learns to tell the 50 fine classes of
the TREC questions apart. The adapter is trained with PEFT, analysed and squeezed with lora-squeeze,
and every adapter is then loaded back from disk with PEFT and scored on questions held out of training.

    make demo
    python examples/squeeze_classifier.py --rank 32 --ranks 16 8 2
    python examples/squeeze_classifier.py --model distilbert-base-uncased --data my-texts.tsv

All classes are kept, rare ones too: a fifth of each class, and at least one question, is held out.
The classification head is not part of the LoRA: PEFT trains and saves it whole, and squeezing keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from packaged import Example, minilm, read_examples, split, trec
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from walkthrough import Options, Score, announce, compare, console, option_parser, prepare, train


def main() -> None:
    o = option_parser(
        __doc__,
        model="all-MiniLM-L6-v2, from its package",
        data="TREC with 50 classes, from its package",
        out="build/demo",
        steps=300,
        batch_size=32,
        questions=2000,
    ).parse_args(namespace=Options())
    prepare(o.seed)
    source = o.model or str(minilm())
    examples = read_examples(o.data or trec())
    training, held_out = split(examples, held_out=0.2, seed=o.seed)
    held_out = held_out[: o.questions]
    classes = sorted({example.label for example in examples})
    tokenizer = AutoTokenizer.from_pretrained(source)
    encode = partial(batch_of, tokenizer, {label: index for index, label in enumerate(classes)})

    announce(f"Training a LoRA of rank {o.rank}")
    console.print(f"Model: {o.model or 'all-MiniLM-L6-v2'}; {len(classes)} classes of questions")
    console.print(f"{len(training):,} questions to train on, {len(held_out):,} others held out; seed {o.seed}")
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=o.rank, lora_alpha=o.rank, target_modules="all-linear")
    model = get_peft_model(base_model(source, len(classes)), config)
    console.print(f"Before training, {score(model, encode, held_out).accuracy:.1%} are classified correctly")
    train(model, encode, training, o)
    original = o.out / "original"
    model.save_pretrained(str(original))

    def evaluate(folder: Path) -> Score:
        return score(PeftModel.from_pretrained(base_model(source, len(classes)), folder), encode, held_out)

    compare(original, evaluate, o)


def base_model(source: str, classes: int) -> torch.nn.Module:
    """The pretrained model in float32, with a new classification head."""
    return AutoModelForSequenceClassification.from_pretrained(source, num_labels=classes, dtype=torch.float32)


def batch_of(tokenizer: Any, index: dict[str, int], examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    texts = [example.text for example in examples]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    return {**batch, "labels": torch.tensor([index[example.label] for example in examples])}


@torch.inference_mode()
def score(model: PeftModel, encode: Any, examples: Sequence[Example]) -> Score:
    """Accuracy, and the mean cross-entropy of the right class."""
    model.eval()
    by_length = sorted(examples, key=lambda example: len(example.text))  # so that little is padded
    correct, loss = 0, 0.0
    for start in range(0, len(by_length), 64):
        batch = encode(by_length[start : start + 64])
        labels = batch.pop("labels")
        logits = model(**batch).logits  # (questions, classes)
        correct += int((logits.argmax(dim=1) == labels).sum())
        loss += cross_entropy(logits, labels, reduction="sum").item()
    return Score(correct, len(examples), loss / len(examples))


if __name__ == "__main__":
    main()
