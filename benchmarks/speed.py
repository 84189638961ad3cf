"""Speed and memory of analyze + compress on Llama-shaped adapters, beside two other ways of doing it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.breakdown import REST, WAIT
from benchmarks.contender import CONTENDERS, WEIGHTS
from benchmarks.machine import table, verdict
from benchmarks.synthetic import LLAMA_3_2_1B, LLAMA_3_8B, Shape, write_adapter

OURS, SLOW, FLOOR = "lora-squeeze", "straightforward", "floor"
SHAPES = (LLAMA_3_8B, LLAMA_3_2_1B)
FASTER_THAN_SLOW = {1: 3.5, 2: 5.0}  # targets by number of cores
WITHIN_FLOOR = 1.5
PEAK_MB = 128.0

INTRODUCTION = f"""\
bf16 adapters of rank 64 on all seven linear modules of each layer, analyzed and written at rank 16. Every run
is a process of its own, pinned to its cores; the contenders take turns. Times are those of the job;
"whole process" adds starting Python and importing torch. Peak memory is what the job adds to that.

- `{FLOOR}`: read the file, form the two float64 second moments and two thin products of each module, write.
  Each moment is one plain product. No decomposition, no hash, no sync, no check: a yardstick, not a tool.
- `{SLOW}`: load everything, float32, QR + SVD once to analyze and once more to compress, `save_file`.
- `{OURS}`: `compress_adapter` + `analyze`. It also measures the error of every layer, hashes the source,
  fsyncs the output and reads it back."""


@dataclass(frozen=True)
class Run:
    """One process: the job's seconds, its peak memory above the imports (MB), and the whole process's seconds."""

    seconds: float
    peak_mb: float
    process_seconds: float


def section(scratch: Path, *, rounds: int) -> str:
    """Measure and describe; adapters and outputs go to the folder `scratch`."""
    cores = [count for count in FASTER_THAN_SLOW if count <= len(os.sched_getaffinity(0))]
    parts = ["## Speed and memory", INTRODUCTION, f"{rounds} rounds."]
    missing = [str(count) for count in FASTER_THAN_SLOW if count not in cores]
    if missing:
        parts.append(f"Not measured on {', '.join(missing)} cores: this machine has not that many.")
    for shape in SHAPES:
        adapter = write_adapter(scratch / shape.name, shape)
        (adapter / WEIGHTS).read_bytes()  # into the page cache, for everyone
        parts += _shape_section(shape, adapter, scratch / "out", cores=cores, rounds=rounds)
        if shape is LLAMA_3_8B:
            parts += _breakdown_section(adapter, scratch / "out", rounds=rounds)
        shutil.rmtree(adapter)
    return "\n\n".join(parts)


def _shape_section(shape: Shape, adapter: Path, output: Path, *, cores: list[int], rounds: int) -> list[str]:
    runs: defaultdict[tuple[int, str], list[Run]] = defaultdict(list)
    for _ in range(rounds):
        for count in cores:
            for name in CONTENDERS:
                runs[count, name].append(_run(name, adapter, output, cores=count))
    modules = shape.layers * len(shape.modules)
    size = (adapter / WEIGHTS).stat().st_size / 1e6
    rows, targets = [], []
    for count in cores:
        middle = {name: median(run.seconds for run in runs[count, name]) for name in CONTENDERS}
        peak = max(run.peak_mb for run in runs[count, OURS])
        for name in CONTENDERS:
            own = runs[count, name]
            rows.append((
                f"{name}, {_cores(count)}",
                f"{middle[name]:.2f} s",
                f"{min(run.seconds for run in own):.2f} s",
                f"{median(run.process_seconds for run in own):.2f} s",
                f"{max(run.peak_mb for run in own):.0f} MB",
                f"{middle[SLOW] / middle[name]:.2f} ×",
                f"{middle[name] / middle[FLOOR]:.2f} ×",
            ))  # fmt: skip
        faster, within = middle[SLOW] / middle[OURS], middle[OURS] / middle[FLOOR]
        on, wanted = _cores(count), FASTER_THAN_SLOW[count]
        targets += [
            (f"{on}: faster than {SLOW}", f"≥ {wanted} ×", f"{faster:.2f} ×", verdict(faster >= wanted)),
            (f"{on}: beside the {FLOOR}", f"≤ {WITHIN_FLOOR} ×", f"{within:.2f} ×", verdict(within <= WITHIN_FLOOR)),
            (f"{on}: peak memory", f"≤ {PEAK_MB:.0f} MB", f"{peak:.0f} MB", verdict(peak <= PEAK_MB)),
        ]
    heading = ("", "median", "least", "whole process", "peak memory", f"{SLOW} / this", f"this / {FLOOR}")
    return [
        f"### {shape.name}: {modules} modules, {size:.0f} MB",
        table(heading, rows),
        table(("Claim", "target", "measured", ""), targets),
    ]


def _breakdown_section(adapter: Path, output: Path, *, rounds: int) -> list[str]:
    runs = [_process([sys.executable, "-m", "benchmarks.breakdown"], adapter, output) for _ in range(rounds)]
    parts = {part: median(run[part] for run in runs) for part in runs[0]}
    total = sum(parts.values())
    rows = [(part, f"{seconds:.2f} s", f"{seconds / total:.0%}") for part, seconds in parts.items()]
    return [
        "### Where its time goes",
        f"Processor time on one core, medians of {rounds} runs with the library's functions wrapped. "
        f'"{REST.capitalize()}" holds opening the adapter, handing work to threads and building the report; '
        f'"{WAIT}" is time in which no thread of it ran.',
        table(("Part", "time", "share"), [*rows, ("sum", f"{total:.2f} s", "100%")]),
    ]


def _run(name: str, adapter: Path, output: Path, *, cores: int) -> Run:
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.contender", name, "--cores", str(cores)]
    found = _process(command, adapter, output)
    return Run(found["seconds"], found["peak_mb"], time.perf_counter() - start)


def _process(command: list[str], adapter: Path, output: Path) -> dict[str, float]:
    done = subprocess.run([*command, str(adapter), str(output)], capture_output=True, text=True, check=False)
    shutil.rmtree(output, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"
