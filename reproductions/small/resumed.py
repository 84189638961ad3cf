"""What the commands of the experiments that go on where they were stopped have in common."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers

from benchmarks.in_squeeze_runs import ROOT

__all__ = ["BEGIN", "END", "parser_of", "prepare", "renewed"]

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def parser_of(description: str | None, *, own: Path, results: Path) -> argparse.ArgumentParser:
    """--minutes, --out and --results, with the folders for what is trained and for what was measured."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop measuring after so long; 0: write the page")
    parser.add_argument("--out", type=Path, default=own, help="adapters that are trained here")
    parser.add_argument("--results", type=Path, default=results, help="what was measured; another folder begins anew")
    return parser


def prepare() -> None:
    """One thread, quiet libraries, and the examples' packaged models on the path."""
    torch.set_num_threads(1)  # the batches are small: a second thread costs more than it brings
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.path.insert(0, str(ROOT / "examples"))


def renewed(page: str, measured: str) -> str:
    """A page with its measured part replaced."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{measured}\n{END}{rest.split(END)[1]}"
