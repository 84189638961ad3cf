"""Train a tiny language model that adds two digits, and is right in about a third of all cases.

Small enough for a campaign to run in minutes on any processor, and real: it has learnt what a sum looks
like, and partly what the answers are, from sums of which half were wrong. So there is something left for
examples/grpo.toml and examples/sft.toml to teach it.

    python examples/tiny_arithmetic.py build/tiny-arithmetic
    lora-squeeze campaign run examples/grpo.toml
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RIGHT = 0.5  # the share of the sums that it is shown right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/tiny-arithmetic"))
    parser.add_argument("--steps", type=int, default=800, help="of 64 sums each (default: %(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    pretrain(model, tokenizer, options.steps)
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    print(f"{options.folder}: {model.num_parameters():,} parameters, right in {accuracy(model, tokenizer):.0%} of sums")


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character of a sum, and two to pad with and to end with."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Learn to continue sums, right ones and wrong ones."""
    generator = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = tokenizer([some_sum(generator) for _ in range(64)], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def some_sum(generator: random.Random) -> str:
    first, second = generator.randrange(10), generator.randrange(10)
    right = generator.random() < RIGHT
    return f"{first}+{second}={first + second if right else generator.randrange(19)}<eos>"


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """The share of all sums to which a sampled answer is right."""
    sums = [(first, second) for first in range(10) for second in range(10)]
    prompts = tokenizer([f"{first}+{second}=" for first, second in sums], return_tensors="pt")
    answers = model.generate(**prompts, max_new_tokens=3, do_sample=True)[:, prompts["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return sum(text == str(first + second) for text, (first, second) in zip(texts, sums, strict=True)) / len(sums)


if __name__ == "__main__":
    main()
