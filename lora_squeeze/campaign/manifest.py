"""manifest.json: what a campaign was told, and what has become of each of its runs.

Written anew, whole or not at all, at every change. The schema is documented in docs/campaigns.md; `schema`
grows when it changes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lora_squeeze.campaign.spec import Campaign, PlannedRun, campaign_of
from lora_squeeze.documents import parse_json, read_text
from lora_squeeze.errors import TrainingError
from lora_squeeze.formats.folder import new_file
from lora_squeeze.training.folder import RunFolder
from lora_squeeze.training.record import environment

__all__ = [
    "MANIFEST",
    "STATUSES",
    "Manifest",
    "RunEntry",
    "SqueezeEntry",
    "new_manifest",
    "read_manifest",
    "refreshed",
    "run_folder",
    "with_run",
    "write_manifest",
]

MANIFEST = "manifest.json"
SCHEMA = 1
STATUSES = ("pending", "running", "finished", "failed")


@dataclass(frozen=True)
class RunEntry:
    """One run. `config`, `log` and `adapter` are relative to the campaign's folder; so is `folder`."""

    name: str
    condition: str
    seed: int
    folder: str
    config: str
    log: str
    status: str = "pending"
    attempts: int = 0
    exit_code: int | None = None
    error: str = ""
    started: str = ""
    finished: str = ""
    seconds: float = 0.0
    steps: int = 0
    rank: int = 0
    source_rank: int = 0  # at which it began: in a condition, not all do where the recommended rank is used
    adapter: str = ""
    metrics: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class SqueezeEntry:
    """The squeeze after the first run that finished. `table` has the columns of the `squeeze` document.

    status
        none (no [squeeze]), pending, finished or failed.
    outputs
        run → folder of its squeezed adapter.
    wandb
        folder or address of the run `squeeze-analysis`, or why there is none.
    """

    status: str = "none"
    run: str = ""
    source_rank: int = 0
    recommended_rank: int = 0
    min_variance_retention: float = 0.0
    num_layers: int = 0
    table: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    outputs: dict[str, str] = field(default_factory=dict[str, str])
    error: str = ""
    wandb: str = ""


@dataclass(frozen=True)
class Manifest:
    """A campaign. `config` is its TOML file as a table, `config_file` where that lay."""

    timestamp: str
    config_file: str
    config: dict[str, Any]
    environment: dict[str, str]
    executor: str
    conditions: list[str]
    seeds: list[int]
    max_steps: int
    num_runs: int
    runs: list[RunEntry]
    squeeze: SqueezeEntry = field(default_factory=SqueezeEntry)
    summary: str = ""  # how the summary_script ended

    @property
    def campaign(self) -> Campaign:
        """The runs that its configuration describes."""
        return campaign_of(self.config, self.config_file)

    def run(self, name: str) -> RunEntry:
        """The entry of a run. Raises TrainingError if there is none of this name."""
        for entry in self.runs:
            if entry.name == name:
                return entry
        raise TrainingError(f"there is no run '{name}'; there are {', '.join(entry.name for entry in self.runs)}")

    def to_json(self) -> str:
        """All fields; `read_manifest` reads them back."""
        return json.dumps({"record": "Campaign", "schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False)


def new_manifest(campaign: Campaign, config_file: str) -> Manifest:
    """Of a campaign that is about to begin."""
    steps = campaign.settings.max_steps or campaign.common.steps
    return Manifest(
        timestamp=now(),
        config_file=config_file,
        config=dict(campaign.document),
        environment=environment(),
        executor=campaign.executor,
        conditions=list(dict.fromkeys(run.condition for run in campaign.runs)),
        seeds=list(campaign.settings.seeds),
        max_steps=steps,
        num_runs=len(campaign.runs),
        runs=[_entry(run) for run in campaign.runs],
        squeeze=SqueezeEntry(status="none" if campaign.common.squeeze is None else "pending"),
    )


def read_manifest(folder: Path) -> Manifest:
    """Read a campaign's manifest. Raises TrainingError if there is none, or one of another schema."""
    file = folder / MANIFEST
    try:
        fields = parse_json(read_text(file))
        if not isinstance(fields, dict) or fields.pop("record", None) != "Campaign":
            raise ValueError("it is not the manifest of a campaign")
        if (schema := fields.pop("schema", None)) != SCHEMA:
            raise ValueError(f"its schema is {schema}, and this version reads {SCHEMA}")
        fields["runs"] = [RunEntry(**entry) for entry in fields["runs"]]
        fields["squeeze"] = SqueezeEntry(**fields["squeeze"])
        return Manifest(**fields)
    except FileNotFoundError as error:
        raise TrainingError(f"{folder}: is not the folder of a campaign: it has no {MANIFEST}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrainingError(f"{file}: cannot be read: {error}") from error


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write manifest.json, whole or not at all. Raises OutputError."""
    with new_file(folder / MANIFEST, overwrite=True) as file:
        file.write_text(manifest.to_json() + "\n", encoding="utf-8")


def with_run(manifest: Manifest, name: str, /, **changes: Any) -> Manifest:
    """The same manifest with one run's entry changed."""
    return replace(
        manifest, runs=[replace(entry, **changes) if entry.name == name else entry for entry in manifest.runs]
    )


def refreshed(manifest: Manifest, folder: Path) -> Manifest:
    """What the runs' own folders say: a run is finished if its record is there; one that runs no more is pending."""
    for entry in manifest.runs:
        record = run_folder(folder, entry).finished()
        if record is not None:
            manifest = with_run(
                manifest,
                entry.name,
                status="finished",
                error="",
                exit_code=0,
                started=entry.started or record.started,
                finished=record.finished,
                seconds=record.seconds,
                steps=record.steps,
                rank=record.rank,
                source_rank=record.source_rank,
                adapter=f"{entry.folder}/final",
                metrics=record.metrics,
            )
        elif entry.status in ("running", "finished"):
            manifest = with_run(manifest, entry.name, status="pending")
    return manifest


def run_folder(folder: Path, entry: RunEntry) -> RunFolder:
    """Where a run lies."""
    return RunFolder(folder / entry.folder)


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _entry(run: PlannedRun) -> RunEntry:
    place = f"runs/{run.folder}"
    return RunEntry(
        name=run.name,
        condition=run.condition,
        seed=run.seed,
        folder=place,
        config=f"configs/{run.folder}.toml",
        log=f"logs/{run.folder}.log",
    )
