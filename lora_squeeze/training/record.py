"""What a training run leaves behind as numbers: run.json, beside the adapter."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_squeeze.errors import TrainingError
from lora_squeeze.formats.folder import new_file

__all__ = ["RunRecord", "environment", "read_record", "write_record"]

SCHEMA = 1
PACKAGES = ("lora-squeeze", "torch", "transformers", "peft", "trl", "datasets", "accelerate")


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    adapter
        folder of the final adapter; source_rank: that it started with, rank: its largest now.
    metrics
        the last of each kind that was logged: train_loss, eval_loss, eval_accuracy, reward, …
    seconds
        of training, this start alone and without loading; started and finished are UTC.
    peak_memory
        bytes, of the device, or of the process on a processor.
    settings
        as the TOML file says them; environment: versions.
    """

    method: str
    model: str
    adapter: str
    source_rank: int
    rank: int
    steps: int
    examples: int
    held_out: int
    trained_parameters: int
    metrics: dict[str, float]
    seconds: float
    started: str
    finished: str
    peak_memory: int
    settings: dict[str, Any]
    environment: dict[str, str]
    notes: list[str] = field(default_factory=list[str])

    def to_json(self) -> str:
        """All fields; `read_record` reads them back."""
        return json.dumps({"record": "RunRecord", "schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False)


def write_record(record: RunRecord, file: Path) -> None:
    """Write run.json, whole or not at all. Raises OutputError."""
    with new_file(file, overwrite=True) as path:
        path.write_text(record.to_json() + "\n", encoding="utf-8")


def read_record(file: Path) -> RunRecord:
    """Read what `write_record` wrote. Raises TrainingError if it is something else."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if fields.pop("record") != "RunRecord" or fields.pop("schema") != SCHEMA:
            raise ValueError(f"not a RunRecord of schema {SCHEMA}")
        return RunRecord(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{file}: cannot be read as the record of a run: {error}") from error


def environment() -> dict[str, str]:
    """Versions of Python, of what trains, and the machine's kind."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
