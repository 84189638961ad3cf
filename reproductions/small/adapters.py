"""The adapters that are squeezed: TREC-50's from the In-Squeeze benchmark, one of each other task trained here."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks.in_squeeze import read_results
from benchmarks.in_squeeze_runs import ROOT, SOURCE, Results, Run, Training
from reproductions.small.tasks import questions_of

TREC = "trec-50"


@dataclass(frozen=True)
class Places:
    """The base model, the folder of the In-Squeeze benchmark, and one's own for adapters and measurements."""

    model: str
    in_squeeze: Path = ROOT / "build" / "in-squeeze"
    own: Path = ROOT / "build" / "small"

    @property
    def measurements(self) -> Path:
        """One JSON line for each."""
        return self.own / "measurements.jsonl"

    def runs(self) -> Results:
        """What the In-Squeeze benchmark has trained and measured so far."""
        return read_results(self.in_squeeze / "runs.jsonl")


@dataclass(frozen=True)
class Trained:
    """An adapter, by what it was trained on and how."""

    task: str
    rank: int
    rate: float
    seed: int

    @property
    def run(self) -> Run:
        """As the In-Squeeze benchmark calls it: at its highest rank, Post-Squeeze branches off."""
        kind = "source" if self.rank == SOURCE and self.task == TREC else "direct"
        return Run(kind, self.rank, self.rate, self.seed)

    def folder(self, places: Places) -> Path:
        """Where it is, or will be."""
        if self.task == TREC:
            return places.in_squeeze / "adapters" / self.run.name
        return places.own / "adapters" / f"{self.task}-{self.run.name}"


def ready(one: Trained, places: Places, runs: Results) -> bool:
    """Whether there is this adapter, or it can be trained here."""
    return one.task != TREC or (one.run.key in runs and one.folder(places).exists())


def train(one: Trained, places: Places) -> Path:
    """The adapter's folder; it is trained if it is not there. Raises ValueError for one of the In-Squeeze benchmark."""
    folder = one.folder(places)
    if folder.exists():
        return folder
    if one.task == TREC:
        raise ValueError(f"{folder} is missing: make bench-in-squeeze trains it")
    training = Training(one.run, data=questions_of(one.task, places.model))
    training.advance(len(training.batches))
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    training.model.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder
