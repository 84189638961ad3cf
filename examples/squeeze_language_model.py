"""Train a LoRA for a causal language model at a high rank, squeeze it, and see what it costs.

SmolLM2-135M-Instruct learns to name what a TREC question asks for: it reads "Question: How far is the
moon ? Type:" and is trained to go on with " number"; the loss is that of the answer alone. The adapter
is trained with PEFT, analysed and squeezed with lora-squeeze, and every adapter is then loaded back from
disk with PEFT: of all answers, the one that it finds likeliest after a held-out question counts.

    make demo-lm
    python examples/squeeze_language_model.py --rank 128 --ranks 32 8 2
    python examples/squeeze_language_model.py --model gpt2 --data reviews.jsonl --prompt "{text} It was"

The packaged model is a 4-bit file whose weights are dequantised and then trained like any others: its
numbers are not those of the original SmolLM2. Any other label in --data is itself the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaged import Example, read_examples, smollm2, split, trec
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from walkthrough import Options, Score, announce, compare, console, option_parser, prepare, train

TREC_WORDS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "thing",
    "HUM": "person",
    "LOC": "place",
    "NUM": "number",
}
IGNORED = -100  # the target of a position that does not count in the loss


class LanguageModelOptions(Options):
    """`Options`, and the text that stands before an answer."""

    prompt: str


class Task(NamedTuple):
    """How a labelled text becomes tokens."""

    tokenizer: Any
    prompt: str

    def prompt_tokens(self, example: Example) -> list[int]:
        """What the model reads."""
        return self.tokenizer(self.prompt.format(text=example.text))["input_ids"]

    def answer_tokens(self, label: str) -> list[int]:
        """What it should go on with; the space belongs to the answer in most vocabularies."""
        return self.tokenizer(f" {label}", add_special_tokens=False)["input_ids"]


def main() -> None:
    o = parse_options()
    prepare(o.seed)
    announce(f"Training a LoRA of rank {o.rank}")
    console.print(f"Model: {o.model or 'SmolLM2-135M-Instruct, its 4-bit weights dequantised (once: about 20 s)'}")
    source = o.model or str(smollm2())
    examples = read_examples(o.data) if o.data else [coarse(example) for example in read_examples(trec())]
    training, held_out = split(examples, held_out=0.2, seed=o.seed)
    held_out = held_out[: o.questions]
    answers = sorted({example.label for example in examples})
    task = Task(AutoTokenizer.from_pretrained(source), o.prompt)
    console.print(f"{len(training):,} questions to train on, {len(held_out):,} others held out; seed {o.seed}")
    console.print(f"Answers: {', '.join(answers)}")

    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=o.rank, lora_alpha=o.rank, target_modules="all-linear")
    model = get_peft_model(base_model(source), config)
    console.print(f"Before training, {score(model, task, answers, held_out).accuracy:.1%} are answered correctly")
    train(model, partial(batch_of, task), training, o)
    original = o.out / "original"
    model.save_pretrained(str(original))

    def evaluate(folder: Path) -> Score:
        return score(PeftModel.from_pretrained(base_model(source), folder), task, answers, held_out)

    compare(original, evaluate, o)


def parse_options() -> LanguageModelOptions:
    parser = option_parser(
        __doc__,
        model="SmolLM2-135M-Instruct, from its package",
        data="TREC with 6 classes, from its package",
        out="build/demo-lm",
        steps=60,
        batch_size=16,
        questions=400,
    )
    parser.add_argument("--prompt", default="Question: {text} Type:", help="before an answer (default: %(default)s)")
    return parser.parse_args(namespace=LanguageModelOptions())


def coarse(example: Example) -> Example:
    """A TREC question with the word for its coarse class: NUM:date becomes number."""
    return example._replace(label=TREC_WORDS[example.label.split(":")[0]])


def base_model(source: str) -> torch.nn.Module:
    """The pretrained model in float32, which is faster than bfloat16 on most CPUs."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def batch_of(task: Task, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    prompts = [task.prompt_tokens(example) for example in examples]
    answers = [task.answer_tokens(example.label) for example in examples]
    targets = [[IGNORED] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
    batch = padded([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    return {**batch, "labels": pad_sequence([torch.tensor(t) for t in targets], True, IGNORED)}


def padded(sequences: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    """Token ids and attention mask, padded on the right."""
    ids = pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
    mask = pad_sequence([torch.ones(len(sequence), dtype=torch.long) for sequence in sequences], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def score(model: PeftModel, task: Task, answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """How often the right answer is the likeliest one, and the mean of −log p(right answer)."""
    model.eval()
    candidates = [task.answer_tokens(answer) for answer in answers]
    by_length = sorted(examples, key=lambda example: len(example.text))  # so that little is padded
    correct, loss = 0, 0.0
    for start in range(0, len(by_length), 32):
        batch = by_length[start : start + 32]
        likelihoods = log_likelihoods(model, [task.prompt_tokens(example) for example in batch], candidates)
        right = torch.tensor([answers.index(example.label) for example in batch])
        correct += int((likelihoods.argmax(dim=1) == right).sum())
        loss -= likelihoods.gather(1, right[:, None]).sum().item()
    return Score(correct, len(examples), loss / len(examples))


def log_likelihoods(model: PeftModel, prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    """log p(answer | prompt) as (prompts, answers).

    Answers that differ in their last token alone share a pass; for answers of one token, one is enough.
    """
    result = torch.empty(len(prompts), len(answers))
    for stem in {tuple(answer[:-1]) for answer in answers}:
        logits = model(**padded([[*prompt, *stem] for prompt in prompts])).logits
        for row, prompt in enumerate(prompts):
            # The distribution of a token is found at the position before it.
            log_p = logits[row, len(prompt) - 1 : len(prompt) + len(stem)].log_softmax(dim=1)
            for column, answer in enumerate(answers):
                if tuple(answer[:-1]) == stem:
                    result[row, column] = log_p[range(len(answer)), answer].sum()
    return result


if __name__ == "__main__":
    main()
