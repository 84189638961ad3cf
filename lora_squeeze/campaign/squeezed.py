"""Squeezed against direct: every run's adapter at the lower ranks that other runs were trained at, evaluated.

What was measured is kept in squeezed.json (run → rank → metrics) and not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from lora_squeeze.campaign.manifest import Manifest, RunEntry, run_folder
from lora_squeeze.campaign.results import family_of
from lora_squeeze.documents import parse_json, read_text
from lora_squeeze.errors import TrainingError
from lora_squeeze.formats.folder import new_file
from lora_squeeze.training.run import evaluate_adapter
from lora_squeeze.training.settings import read_run_settings
from lora_squeeze.verbs import compress_adapter

__all__ = ["measure_squeezed", "pairs_of", "read_squeezed"]

FILE = "squeezed.json"


def pairs_of(manifest: Manifest) -> list[tuple[RunEntry, int]]:
    """Each finished run with each lower rank that a run of the same kind and seed was trained at."""
    finished = [entry for entry in manifest.runs if entry.status == "finished"]
    return [
        (entry, other.rank)
        for entry in finished
        for other in finished
        if (family_of(entry), entry.seed) == (family_of(other), other.seed) and other.rank < entry.rank
    ]


def measure_squeezed(
    manifest: Manifest, folder: Path, *, on_pair: Callable[[str], None] | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Squeeze and evaluate every pair that has not been, and return all: run → rank → metrics.

    Raises DataError if the runs hold no data out.
    """
    known = read_squeezed(folder)
    for entry, rank in pairs_of(manifest):
        if str(rank) not in known.get(entry.name, {}):
            run = run_folder(folder, entry)
            with TemporaryDirectory(dir=folder) as scratch:
                small = Path(scratch) / "small"
                compress_adapter(run.final, small, rank)
                metrics = evaluate_adapter(read_run_settings(run.settings), small, scratch=scratch)
            known.setdefault(entry.name, {})[str(rank)] = metrics
            with new_file(folder / FILE, overwrite=True) as file:
                file.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if on_pair is not None:
            on_pair(entry.name)
    return known


def read_squeezed(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """What `measure_squeezed` has kept; empty if nothing yet. Raises TrainingError if the file is damaged."""
    try:
        return parse_json(read_text(folder / FILE))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder / FILE}: cannot be read: {error}; without it, all is measured anew") from error
