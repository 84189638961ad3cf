"""What is trained: projector and head once, and after that, with both of them frozen, nothing but a LoRA."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from benchmarks.in_squeeze_runs import ROOT, Training
from lora_squeeze.annealing.schedule import custom, parse_schedule
from reproductions.vision.data import Data, Question
from reproductions.vision.model import TARGETS, SeeingClassifier

SOURCE = 64
STEPS, WARMUP, BATCH = 120, 20, 32
CONTINUED, LEAST = 24, 8  # steps after Cont-Squeeze's squeeze, and of every stage in "Minimum Steps"
ALIGNED, ALIGNING_RATES = 25, {"projector": 1e-3, "classifier": 2e-2}  # steps of the training before, and its rates
# In so few steps nothing is learnt by heart.
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONT = 1  # the rank that Cont-Squeeze goes to

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Places:
    """The text model, a folder for what is computed and trained, and one for what was measured."""

    model: str
    own: Path = ROOT / "build" / "vision"
    results: Path = RESULTS

    @property
    def measurements(self) -> Path:
        """One JSON line for each."""
        return self.results / "measurements.jsonl"

    @property
    def aligned(self) -> Path:
        """The model that every LoRA is trained on."""
        return self.own / "aligned"


@dataclass(frozen=True)
class Trained:
    """An adapter, by how it was trained.

    kind
        "direct" at its rank; "in-squeeze" or "cont-squeeze" from rank 64 down to it; "none": no adapter at all.
    """

    kind: str
    rank: int
    rate: float
    seed: int

    @property
    def source(self) -> Trained:
        """The training that it comes out of: Cont-Squeeze branches off from one at rank 64."""
        return Trained("direct", SOURCE, self.rate, self.seed) if self.kind == "cont-squeeze" else self

    def folder(self, places: Places) -> Path:
        """Where it is, or will be."""
        return places.own / "adapters" / f"{self.kind}-{self.rank}-{self.rate:g}-{self.seed}"


# --- encoding -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """Questions and features → what the model takes."""

    tokenizer: Any
    answers: tuple[str, ...]

    def __call__(self, questions: Sequence[Question], seen: torch.Tensor) -> dict[str, torch.Tensor]:
        """One batch; seen is (questions, tokens, width)."""
        words = self.tokenizer([one.text for one in questions], padding=True, return_tensors="pt")
        labels = torch.tensor([self.answers.index(one.answer) for one in questions])
        fields = {name: words[name] for name in ("input_ids", "attention_mask")}
        return {**fields, "features": seen, "labels": labels}


def encoder_of(places: Places, data: Data) -> Encoder:
    """With the text model's tokenizer."""
    return Encoder(transformers.AutoTokenizer.from_pretrained(places.model), data.answers)


def batches(data: Data, encode: Encoder, *, steps: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """In an order that depends on the seed alone; of every eight batches, questions of like length go together."""
    generator = random.Random(seed)
    waiting: list[list[Question]] = []
    for _ in range(steps):
        if not waiting:
            drawn = generator.sample(data.training, min(8 * BATCH, len(data.training)))
            alike = sorted(drawn, key=lambda one: len(one.text))
            waiting = [alike[start : start + BATCH] for start in range(0, len(alike), BATCH)]
            generator.shuffle(waiting)
        some = waiting.pop()
        yield encode(some, data.seen.training[[one.image for one in some]])


# --- before the LoRA ----------------------------------------------------------------------------------------------


def aligned(places: Places, data: Data) -> Path:
    """The model with a trained projector and head on frozen text layers; it is trained if it is not there."""
    if not places.aligned.exists():
        torch.manual_seed(0)
        model = SeeingClassifier.from_pretrained(
            places.model, num_labels=len(data.answers), dtype=torch.float32, ignore_mismatched_sizes=True, **NO_DROPOUT
        ).requires_grad_(False)
        groups = [
            {"params": list(getattr(model, name).requires_grad_(True).parameters()), "lr": rate}
            for name, rate in ALIGNING_RATES.items()
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        scheduler = _scheduler(optimizer)
        model.train()
        for batch in batches(data, encoder_of(places, data), steps=ALIGNED, seed=-1):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        _saved(model, places.aligned)
    return places.aligned


def digest_of(folder: Path) -> str:
    """Of the weights in a folder: measurements on different ones are not mixed."""
    parts = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(chain(part.read_bytes() for part in parts))).hexdigest()[:16]


# --- the LoRA -----------------------------------------------------------------------------------------------------


def train(one: Trained, places: Places, data: Data) -> Path:
    """The adapter's folder; it is trained if it is not there, and at rank 64 its Cont-Squeeze along with it."""
    folder = one.folder(places)
    if folder.exists():
        return folder
    training = LoraTraining(one.source, places, data)
    if one.kind == "in-squeeze":
        schedule = parse_schedule(f"minimum={LEAST}", source=SOURCE, target=one.rank, steps=STEPS)
        training.squeeze(schedule)
    if one.source.kind == "direct" and one.source.rank == SOURCE:
        training.advance(STEPS - CONTINUED)
        branch = training.copy()
        schedule = custom([(0, SOURCE), (STEPS - CONTINUED, CONT)], STEPS)
        # The step that was just made ended the stage.
        branch.squeeze(schedule, learning_rate="rewarm", warmup_steps=CONTINUED // 4, step=STEPS - CONTINUED - 1)
        branch.squeezer.step()
        branch.advance(CONTINUED)
        continued = Trained("cont-squeeze", CONT, one.rate, one.seed).folder(places)
        _saved(branch.model, continued)
    training.advance(STEPS - training.step)
    _saved(training.model, one.source.folder(places))
    return folder


class LoraTraining(Training):
    """A LoRA on the text's side of the aligned model; `Training` has the loop, and the squeezes on the way."""

    def __init__(self, one: Trained, places: Places, data: Data) -> None:
        torch.manual_seed(one.seed)
        model = SeeingClassifier.from_pretrained(aligned(places, data)).requires_grad_(False)
        rank = SOURCE if one.kind == "in-squeeze" else one.rank
        self.model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
        factors = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(factors, lr=one.rate, weight_decay=0.0)
        self.scheduler = _scheduler(self.optimizer)
        self.batches = list(batches(data, encoder_of(places, data), steps=STEPS, seed=one.seed))
        self.squeezer: Any = None
        self.step, self.seconds, self.switching = 0, 0.0, 0.0


def _scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP, 1.0))


def _saved(model: Any, folder: Path) -> None:
    """Save a model under its name only when it is complete."""
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    if not folder.exists():
        unfinished.rename(folder)
