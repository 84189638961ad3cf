"""The adapters that are squeezed: TREC-50's from the In-Squeeze benchmark, one of each other task trained here."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks.in_squeeze import read_results
from benchmarks.in_squeeze_runs import ROOT, SOURCE, Results, Run, Training
from reproductions.small.tasks import questions_of

TREC = "trec-50"
RESULTS = Path(__file__).parent / "results"
SCORED = ("direct", "source", "in-squeeze")  # kinds of run; the benchmark has others, of cost and geometry


@dataclass(frozen=True)
class Places:
    """The base model, the folder of the In-Squeeze benchmark, one's own for adapters, and one for what was measured."""

    model: str
    in_squeeze: Path = ROOT / "build" / "in-squeeze"
    own: Path = ROOT / "build" / "small"
    results: Path = RESULTS

    @property
    def measurements(self) -> Path:
        """One JSON line for each."""
        return self.results / "measurements.jsonl"

    @property
    def kept_runs(self) -> Path:
        """Those of the In-Squeeze benchmark, one JSON line for each."""
        return self.results / "runs.jsonl"

    def runs(self) -> Results:
        """What the In-Squeeze benchmark has trained and measured so far, of which these measurements are."""
        return read_results(self.kept_runs)


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


def keep_runs(places: Places) -> None:
    """Add to the runs that are kept what the benchmark has made since.

    Raises ValueError if it has made one of them anew and differently: measurements of two adapters would be mixed.
    """
    path = places.in_squeeze / "runs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept, new = places.runs(), dict[str, str]()
    for line, one in ((line, json.loads(line)) for line in lines):
        key = json.dumps(one["run"], sort_keys=True)
        if one["run"]["kind"] not in SCORED:
            continue
        if key not in kept:
            new[key] = line
        elif kept[key]["test"] != one["result"]["test"]:
            raise ValueError(
                f"{path}: a run scores {one['result']['test']:.4f}, but {kept[key]['test']:.4f} in {places.kept_runs}: "
                f"it was trained anew. Keep what is measured of it apart, with --results FOLDER. The run: {key}"
            )
    if new:
        places.results.mkdir(parents=True, exist_ok=True)
        with places.kept_runs.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in new.values())


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
