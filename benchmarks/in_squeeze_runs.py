"""The runs of the In-Squeeze benchmark: which there are, and how one is made.

The learning rate is tuned on a validation split with seed 0, once at rank 64, and separately at ranks 8
(for 8 and 4) and 1 (for 2 and 1); the test split is only ever scored.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model

from lora_squeeze import Squeezer, fixed
from lora_squeeze.annealing.live import live_adapter
from lora_squeeze.annealing.schedule import Schedule, custom, parse_schedule
from lora_squeeze.annealing.switch import switch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

SOURCE, TARGETS = 64, (1, 2, 4, 8)
BETWEEN = (16, 32)  # further ranks that are trained directly, for the gains between all pairs of ranks
STEPS, WARMUP, BATCH = 160, 16, 16
CONTINUED, LEAST = 32, 10  # steps after Cont-Squeeze's squeeze, and of every stage in "Minimum Steps"
SEEDS = (0, 1, 2)
# Tried at each of these ranks.
RATES = {64: (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3), 8: (5e-4, 1e-3, 2e-3), 1: (1e-3, 2e-3, 4e-3, 8e-3)}
TUNED_AT = {64: 64, 32: 64, 16: 8, 8: 8, 4: 8, 2: 1, 1: 1}  # whose best rate a rank takes
HEAD = 0.02  # learning rate of the classification head, which is new: the same in every run, so that ranks are compared


@dataclass(frozen=True)
class Run:
    """What one training is to be.

    kind
        "direct", "source" (at rank 64: Post- and Cont-Squeeze branch off from it), "in-squeeze", "geometry" or
        "cost".
    """

    kind: str
    rank: int
    rate: float
    seed: int = 0
    schedule: str = ""
    state: str = "transport"
    balance: str = "keep"
    per_rank: bool = False

    @property
    def key(self) -> str:
        """Its name among the results."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def name(self) -> str:
        """Its name among files."""
        return "-".join(f"{value}" for value in asdict(self).values()).replace("/", "_")


Results = dict[str, dict[str, Any]]


# --- which runs there are -----------------------------------------------------------------------------------------


def planned(results: Results) -> Iterator[Run]:
    """Every run that can be made by now, the most telling ones first: rates have to be tuned before the rest."""
    yield from tuning()
    if any(run.key not in results for run in tuning()):
        return
    high = best_rate(results, SOURCE)
    for seed in SEEDS:
        yield Run("source", SOURCE, high, seed)
        for rank in (8, 1):
            yield Run("in-squeeze", rank, high, seed, f"minimum={LEAST}")
            yield Run("direct", rank, best_rate(results, rank), seed)
            yield Run("in-squeeze", rank, high, seed, "standard")
    for rank in (64, 32, 8, 1):
        yield Run("cost", rank, high)
    yield Run("geometry", SOURCE, high)
    for seed in SEEDS:
        for rank in (8, 1):
            yield Run("in-squeeze", rank, high, seed, f"minimum={LEAST}", state="reset")
            yield Run("in-squeeze", rank, high, seed, f"minimum={LEAST}", balance="balanced")
    for seed in SEEDS:
        for rank in (4, 2):
            yield Run("in-squeeze", rank, high, seed, f"minimum={LEAST}")
            yield Run("direct", rank, best_rate(results, rank), seed)
    for seed in SEEDS:
        for rank in (*TARGETS, *BETWEEN):
            yield Run("direct", rank, high, seed)
            yield Run("direct", rank, best_rate(results, rank), seed)
    for seed in SEEDS:
        for rank in (8, 1):
            yield Run("in-squeeze", rank, high, seed, f"minimum={LEAST}", per_rank=True)
        for rank in (4, 2):
            yield Run("in-squeeze", rank, high, seed, "standard")


def tuning() -> Iterator[Run]:
    for rank, rates in RATES.items():
        for rate in rates:
            yield Run("direct", rank, rate)


def best_rate(results: Results, rank: int) -> float:
    """By accuracy on the validation split, with seed 0."""
    at = TUNED_AT[rank]
    return max(RATES[at], key=lambda rate: results[Run("direct", at, rate).key]["validation"])


# --- one run ------------------------------------------------------------------------------------------------------


def carried_out(run: Run, results: Results, adapters: Path) -> dict[str, Any]:
    """Make a run; what was trained at one rank is kept in the folder `adapters`, under the run's name."""
    if run.kind == "cost":
        return in_a_process_of_its_own(run)
    if run.kind == "geometry":
        return geometry(run)
    training = Training(run)
    if run.kind == "direct":
        training.advance(STEPS)
        training.model.save_pretrained(adapters / run.name)
        return training.scores(validated=run in tuning())
    if run.kind == "source":
        return source(training, results, adapters / run.name)
    schedule = parse_schedule(run.schedule, source=SOURCE, target=run.rank, steps=STEPS)
    rates = {rank: best_rate(results, rank) for rank in (SOURCE, *TARGETS) if rank in schedule.ranks}
    training.squeeze(schedule, state=run.state, balance=run.balance, learning_rates=rates if run.per_rank else None)
    training.advance(STEPS)
    return training.scores()


def source(training: Training, results: Results, adapter: Path) -> dict[str, Any]:
    """A training at rank 64, which is saved; Post-Squeeze of its end, and Cont-Squeeze from a few steps before."""
    branches: dict[str, dict[str, Any]] = {}
    training.advance(STEPS - CONTINUED)
    for rank in TARGETS:
        branch = training.copy()
        branch.squeeze(
            custom([(0, SOURCE), (STEPS - CONTINUED, rank)], STEPS),
            learning_rate="rewarm",
            warmup_steps=CONTINUED // 4,
            learning_rates={rank: best_rate(results, rank)},
            step=STEPS - CONTINUED - 1,
        )
        branch.squeezer.step()  # the step that was just made ended the stage
        branch.advance(CONTINUED)
        branches[f"cont {rank}"] = branch.scores()
    training.advance(CONTINUED)
    training.model.save_pretrained(adapter)
    scores = training.scores()
    for rank in TARGETS:
        branch = training.copy()
        switch(branch.model, [], partial(fixed, rank=rank), adapter_name="default")
        branches[f"post {rank}"] = branch.scores()
    return {**scores, "branches": branches}


class Training:
    """MiniLM with an adapter, the data in an order that depends on the seed alone, and how far it has come.

    data
        default: the 50 classes of TREC.
    """

    def __init__(self, run: Run, *, data: Questions | None = None, optimizer: str = "adamw") -> None:
        torch.manual_seed(run.seed)
        self.data = data = data or questions()
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            data.model, num_labels=len(data.classes), dtype=torch.float32
        )
        rank = SOURCE if run.kind == "in-squeeze" else run.rank
        lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=rank, target_modules="all-linear")
        self.model = get_peft_model(model, lora)
        named = [(name, one) for name, one in self.model.named_parameters() if one.requires_grad]
        groups = [
            {"params": [one for name, one in named if "lora_" in name], "lr": run.rate},
            {"params": [one for name, one in named if "lora_" not in name], "lr": HEAD},
        ]
        if optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=run.rate, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=run.rate, weight_decay=0.0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min((step + 1) / WARMUP, 1.0))
        self.batches = data.batches(run.seed)
        self.squeezer: Any = None
        self.step, self.seconds, self.switching = 0, 0.0, 0.0

    def copy(self) -> Training:
        """Another training that has come as far; the first goes on independently."""
        other = copy.copy(self)
        other.model, other.optimizer, other.scheduler = copy.deepcopy((self.model, self.optimizer, self.scheduler))
        return other

    def squeeze(self, schedule: Schedule, **options: Any) -> None:
        self.squeezer = Squeezer(self.model, self.optimizer, schedule, lr_scheduler=self.scheduler, **options)

    def advance(self, steps: int) -> None:
        self.model.train()
        for step in range(self.step, self.step + steps):
            batch = self.batches[step]
            start = time.process_time()
            self.model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            before = time.process_time()
            if self.squeezer is not None:
                self.squeezer.step()
            now = time.process_time()
            self.seconds, self.switching = self.seconds + now - start, self.switching + now - before
        self.step += steps

    def scores(self, *, validated: bool = False) -> dict[str, Any]:
        return {
            **({"validation": accuracy(self.model, self.data.validation)} if validated else {}),
            "test": accuracy(self.model, self.data.test),
            "cpu_seconds": self.seconds,
            "switching_cpu_seconds": self.switching,
            "parameters": live_adapter(self.model).parameters,
        }


@dataclass(frozen=True)
class Questions:
    """The splits, which are the same for all runs, and how they are encoded."""

    model: str
    classes: tuple[str, ...]
    training: Sequence[Any]
    validation: Sequence[dict[str, torch.Tensor]]
    test: Sequence[dict[str, torch.Tensor]]
    encode: Callable[[Sequence[Any]], dict[str, torch.Tensor]]

    def batches(self, seed: int) -> list[dict[str, torch.Tensor]]:
        """In an order that depends on the seed alone; within every 128, texts of like length go together."""
        generator = random.Random(seed)
        order: list[Any] = []
        while len(order) < STEPS * BATCH:  # as many passes over the data as it takes
            once = list(self.training)
            generator.shuffle(once)
            order += once
        order = order[: STEPS * BATCH]
        batches: list[list[Any]] = []
        for start in range(0, len(order), 8 * BATCH):
            alike = sorted(order[start : start + 8 * BATCH], key=lambda one: len(one.text))
            some = [alike[at : at + BATCH] for at in range(0, len(alike), BATCH)]
            generator.shuffle(some)
            batches += some
        return [self.encode(batch) for batch in batches]


@cache
def questions() -> Questions:
    from packaged import minilm, read_examples, trec

    return encoded(str(minilm()), read_examples(trec()))


def splits(examples: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """For training, validation and test; the same for all runs."""
    from packaged import split

    rest, test = split(examples, held_out=0.2, seed=0)
    return *split(rest, held_out=0.1, seed=0), test


def encoded(source: str, examples: Sequence[Any], *, max_length: int = 64, most: int | None = None) -> Questions:
    """Examples for a model: its splits in batches; at most so many examples for validation and for the test."""
    training, validation, test = splits(examples)
    classes = tuple(sorted({example.label for example in examples}))
    index = {label: number for number, label in enumerate(classes)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)

    def encode(some: Sequence[Any]) -> dict[str, torch.Tensor]:
        texts = [one.text for one in some]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        return {**batch, "labels": torch.tensor([index[one.label] for one in some])}

    def sorted_batches(some: Sequence[Any]) -> list[dict[str, torch.Tensor]]:
        ordered = sorted(some, key=lambda one: len(one.text))
        return [encode(ordered[start : start + 64]) for start in range(0, len(ordered), 64)]

    return Questions(source, classes, training, *(sorted_batches(part[:most]) for part in (validation, test)), encode)


@torch.inference_mode()
def accuracy(model: torch.nn.Module, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    model.eval()
    right = [(model(**batch).logits.argmax(dim=1) == batch["labels"]).sum().item() for batch in batches]
    return sum(right) / sum(len(batch["labels"]) for batch in batches)


# --- geometry and cost --------------------------------------------------------------------------------------------


def geometry(run: Run, *, before: int = 40, after: int = 20) -> dict[str, Any]:
    """How far a switch that drops nothing takes the next steps off their way, by optimizer and treatment."""
    found: dict[str, Any] = {}
    for optimizer, rate in (("adamw", run.rate), ("sgd", 0.3)):
        training = Training(Run(run.kind, run.rank, rate), optimizer=optimizer)
        training.advance(before)
        start = updates(training.model)
        plain = training.copy()
        torch.manual_seed(run.seed)  # the same dropout for all of them
        plain.advance(after)
        way = updates(plain.model) - start
        for balance in ("keep", "balanced"):
            for state in ("transport", "reset"):
                other = training.copy()
                switch(other.model, [other.optimizer], partial(fixed, rank=SOURCE), balance=balance, state=state)
                if state == "reset":
                    other.optimizer.state.clear()
                torch.manual_seed(run.seed)
                other.advance(after)
                moved = updates(other.model) - start
                found[f"{optimizer} {balance} {state}"] = {
                    "off": float((moved - way).norm() / way.norm()),
                    "length": float(moved.norm() / way.norm()),
                    "validation": accuracy(other.model, questions().validation),
                }
        found[f"{optimizer} unswitched"] = {"validation": accuracy(plain.model, questions().validation)}
        sizes = [(float(one.down.norm()), float(one.up.norm())) for one in loaded(training.model)]
        found[f"{optimizer} sizes"] = [statistics.median(values) for values in zip(*sizes, strict=True)]
    return found


def loaded(model: torch.nn.Module) -> list[Any]:
    adapter = live_adapter(model)
    return [adapter.load(name) for name in adapter.layers]


def updates(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([(layer.scale * layer.up @ layer.down).flatten() for layer in loaded(model)])


def in_a_process_of_its_own(run: Run) -> dict[str, Any]:
    """Peak memory belongs to a process, so each rank gets one."""
    command = [sys.executable, "-m", "benchmarks.in_squeeze", "--cost-of-rank", str(run.rank)]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def peak_mib() -> float:
    """The most memory that this process has held. (Its ru_maxrss would begin at that of the process that began it.)"""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def cost(rank: int, *, steps: int = 15) -> dict[str, Any]:
    training = Training(Run("cost", rank, 1e-3))
    data = questions()
    widest = max(training.batches, key=lambda batch: batch["input_ids"].numel())
    training.batches = [widest] * (steps + 3)
    baseline = peak_mib()
    training.advance(3)
    times: list[float] = []
    for _ in range(steps):
        before = training.seconds
        training.advance(1)
        times.append(training.seconds - before)
    adapter = live_adapter(training.model)
    return {
        "step_cpu_seconds": min(times),
        "peak_mib": peak_mib(),
        "before_mib": baseline,
        "parameters": adapter.parameters,
        # parameters, gradients and both of Adam's moments, in float32
        "training_state_mib": adapter.parameters * 16 / 2**20,
        "classes": len(data.classes),
    }
