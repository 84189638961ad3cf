"""In-Squeeze against its alternatives at equal steps: a real model, real data, three seeds.

    make bench-in-squeeze                    # or, in pieces: ARGS="--minutes 8"

MiniLM learns to tell the 50 fine classes of the TREC questions apart: directly at rank 1, 2, 4 and 8, and
from rank 64 by Post-Squeeze, Cont-Squeeze and In-Squeeze. Every run makes the same number of steps.

Every finished run is a line of JSON in build/in-squeeze/runs.jsonl, and is not made again; several
processes may work at it at once. Adapters that were trained at one rank stay in build/in-squeeze/adapters.
Writes the measured part of docs/in-squeeze.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from benchmarks.in_squeeze_page import section
from benchmarks.in_squeeze_runs import ROOT, Results, Run, carried_out, cost, planned, tuning

PAGE = ROOT / "docs" / "in-squeeze.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def read_results(path: Path) -> Results:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {json.dumps(one["run"], sort_keys=True): one["result"] for one in map(json.loads, lines)}


def work(folder: Path, minutes: float) -> None:
    """Make runs until all are made or time is up; other processes may do the same."""
    folder.mkdir(parents=True, exist_ok=True)
    results, until = folder / "runs.jsonl", time.monotonic() + 60 * minutes
    while time.monotonic() < until:
        done = read_results(results)
        run = next((one for one in planned(done) if one.key not in done and claim(folder, one)), None)
        if run is None:
            return
        start = time.perf_counter()
        result = carried_out(run, done, folder / "adapters")
        line = json.dumps({"run": asdict(run), "result": result, "wall_seconds": time.perf_counter() - start})
        with results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line[:150], file=sys.stderr, flush=True)


def claim(folder: Path, run: Run) -> bool:
    """Whether this run is now this process's. What a process that is gone had claimed is free again."""
    path = folder / run.name
    for _ in range(2):
        try:
            with path.open("x") as file:
                file.write(str(os.getpid()))
            return True
        except FileExistsError:
            with suppress(ValueError, OSError):
                os.kill(int(path.read_text()), 0)
                return False
            path.unlink(missing_ok=True)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop beginning runs after so long")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "in-squeeze")
    parser.add_argument("--cost-of-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the batches are small: a second thread costs more than it brings
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.cost_of_rank:
        print(json.dumps(cost(options.cost_of_rank)))
        return
    work(options.folder, options.minutes)
    results = read_results(options.folder / "runs.jsonl")
    missing = sum(run.key not in results for run in planned(results))
    print(f"{len(results)} runs made, {missing} to be made", file=sys.stderr)
    if all(run.key in results for run in tuning()):
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{section(results)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
