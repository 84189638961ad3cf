"""What both examples do with their model: train a LoRA, look at its ranks, squeeze it, compare.

An example brings a model and two functions: one that turns examples into a batch with a loss, and
one that scores a model on held-out examples. `compare` is where lora-squeeze is used.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from packaged import Example
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lora_squeeze import analyze_adapter, compress_adapter
from lora_squeeze.report.table import analysis_table

__all__ = ["Options", "Score", "announce", "compare", "console", "option_parser", "prepare", "progress", "train"]

T = TypeVar("T")
console = Console(highlight=False)


class Options(argparse.Namespace):
    """The options that both examples take."""

    model: str | None
    data: Path | None
    rank: int
    ranks: list[int]
    steps: int
    batch_size: int
    lr: float
    questions: int
    seed: int
    out: Path


class Score(NamedTuple):
    """How a model did on the held-out examples; the loss is the mean of −log p(right answer), in nats."""

    correct: int
    questions: int
    loss: float

    @property
    def accuracy(self) -> float:
        """The fraction that was right."""
        return self.correct / self.questions

    @property
    def standard_error(self) -> float:
        """Of the accuracy, as the held-out examples are a sample."""
        return (self.accuracy * (1 - self.accuracy) / self.questions) ** 0.5


@dataclass(frozen=True)
class Row:
    """One line of the final table: an adapter on disk, what squeezing cost it, and how it scored."""

    rank: int
    nbytes: int
    retained_variance: float
    relative_error: float
    folder: Path
    score: Score


def option_parser(
    description: str | None, *, model: str, data: str, out: str, steps: int, batch_size: int, questions: int
) -> argparse.ArgumentParser:
    """The options of `Options`, with an example's own defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="PATH_OR_ID", help=f"a model folder or a hub id (default: {model})")
    add("--data", type=Path, metavar="FILE", help=f"labelled texts; .jsonl, or 'label text' lines (default: {data})")
    add("--rank", type=int, default=64, help="the rank to train at (default: %(default)s)")
    add("--ranks", type=int, nargs="+", default=[32, 16, 8, 4, 1], metavar="RANK",
        help="ranks to squeeze to, besides the recommended one (default: 32 16 8 4 1)")  # fmt: skip
    add("--steps", type=int, default=steps, help="training steps (default: %(default)s)")
    add("--batch-size", type=int, default=batch_size, help="texts in a step (default: %(default)s)")
    add("--lr", type=float, default=5e-4, help="highest learning rate (default: %(default)s)")
    add("--questions", type=int, default=questions, help="held-out texts to score, at most (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the split, the weights and the batches (default: %(default)s)")
    add("--out", type=Path, default=Path(out), metavar="FOLDER", help="for the adapters (default: %(default)s)")
    return parser


def prepare(seed: int) -> None:
    """Make the run repeatable, and leave the screen to what this example has to say."""
    transformers.set_seed(seed)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def announce(title: str) -> None:
    """Start a section of the output."""
    console.print()
    console.rule(f"[bold]{title}", align="left")


def progress(items: Sequence[T], title: str) -> Iterator[T]:
    """Yield the items behind a progress bar, or with ten lines of text where no bar can be drawn."""
    if console.is_terminal:
        yield from track(items, title, console=console)
        return
    every = max(len(items) // 10, 1)
    for number, item in enumerate(items, start=1):
        yield item
        if number % every == 0 or number == len(items):
            console.print(f"{title}: {number} of {len(items)}")


def train(
    model: PeftModel, encode: Callable[[Sequence[Example]], dict[str, Any]], examples: Sequence[Example], o: Options
) -> None:
    """Minimise the model's loss with AdamW; the learning rate rises for a tenth of the steps, then falls to 0."""
    optimizer = torch.optim.AdamW(_parameter_groups(model, o.lr), weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, o.steps // 10, o.steps)
    losses: list[float] = []
    start = time.monotonic()
    model.train()
    for batch in progress(_batches(examples, o), "Training"):
        loss = model(**encode(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tenth = max(len(losses) // 10, 1)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    console.print(
        f"{o.steps} steps of {o.batch_size} took {time.monotonic() - start:.0f} s; "
        f"training loss {first:.2f} in the first tenth, {last:.2f} in the last"
    )


def _parameter_groups(model: PeftModel, lr: float) -> list[dict[str, Any]]:
    """The LoRA at the learning rate, a new head at ten times that: it starts from nothing, not from pretraining."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    lora = [parameter for name, parameter in trained if "lora_" in name]
    head = [parameter for name, parameter in trained if "lora_" not in name]
    return [{"params": lora, "lr": lr}, *([{"params": head, "lr": 10 * lr}] if head else [])]


def _batches(examples: Sequence[Example], o: Options) -> list[list[Example]]:
    """As many batches as there are steps; every example is used once before any is used again."""
    generator = random.Random(o.seed)
    order: list[Example] = []
    while len(order) < o.steps * o.batch_size:
        order += generator.sample(examples, len(examples))
    return [order[step * o.batch_size : (step + 1) * o.batch_size] for step in range(o.steps)]


def compare(original: Path, evaluate: Callable[[Path], Score], o: Options) -> None:
    """Analyse a trained adapter, squeeze it to several ranks, score every adapter as it is on disk."""
    announce("Rank analysis")
    analysis = analyze_adapter(original)
    console.print(analysis_table(analysis))

    announce("Squeezing and evaluating")
    ranks = {rank for rank in (*o.ranks, analysis.recommended_rank) if 0 < rank < analysis.source_rank}
    squeezed = [
        compress_adapter(original, original.with_name(f"rank-{rank}"), rank, overwrite=True)
        for rank in sorted(ranks, reverse=True)
    ]
    size = (original / "adapter_model.safetensors").stat().st_size
    adapters = [(analysis.source_rank, size, 1.0, 0.0, original)] + [
        (c.rank, c.bytes_after, c.retained_variance, c.relative_error, Path(c.output)) for c in squeezed
    ]
    rows = [Row(*adapter, score=evaluate(adapter[-1])) for adapter in progress(adapters, "Evaluating")]
    console.print()
    console.print(comparison_table(rows, analysis.recommended_rank))
    _explain(rows[0].score, original.parent)


def comparison_table(rows: Sequence[Row], recommended: int) -> Table:
    """One line for each adapter, the original first."""
    table = Table(title="What squeezing cost", title_justify="left", title_style="bold")
    table.add_column("adapter")
    for heading in ("rank", "bytes", "retained\nvariance", "relative\nerror", "held-out\nloss", "held-out\naccuracy"):
        table.add_column(heading, justify="right")
    for number, row in enumerate(rows):
        squeezed = "recommended" if row.rank == recommended else "squeezed"
        table.add_row(
            "original" if number == 0 else squeezed,
            str(row.rank),
            f"{row.nbytes:,}",
            f"{row.retained_variance:.2%}",
            f"{row.relative_error:.4f}",
            f"{row.score.loss:.3f}",
            f"{row.score.accuracy:.1%}",
            style="bold green" if row.rank == recommended else "",
        )
    return table


def _explain(score: Score, folder: Path) -> None:
    console.print("Retained variance and relative error are those of all layers together, weighted by energy.")
    console.print(
        f"Accuracy was measured on {score.questions:,} held-out questions: its standard error is "
        f"{100 * score.standard_error:.1f} points, and with one seed smaller differences are noise."
    )
    console.print(f"The adapters, ready for PEFT: {folder}/original, {folder}/rank-*", soft_wrap=True)
