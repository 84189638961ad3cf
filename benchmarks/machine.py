"""The machine and the versions that the numbers belong to, and one way to write numbers down."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from lora_squeeze import __version__


def describe() -> str:
    """One line: processor, cores, memory, system, versions."""
    cores = len(os.sched_getaffinity(0))
    return (
        f"{_processor()}, {cores} core{'s' if cores > 1 else ''}, {_memory_gb():.0f} GB of memory, "
        f"{platform.system()} {platform.machine()}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"lora-squeeze {__version__}"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(met: bool) -> str:
    """How the pages say whether a target was reached."""
    return "met" if met else "**missed**"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
