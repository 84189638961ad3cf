"""Runs → executors: begins a campaign, or goes on with one, and keeps its manifest up to date.

    folder = begin(read_campaign(Path("campaign.toml")), Path("logs/mine"))
    manifest = run_campaign(folder)

Layout of the folder: manifest.json, configs/NAME.toml, logs/NAME.log, runs/NAME/… (see training.folder).
"""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from lora_squeeze.campaign.autosqueeze import analyzed, squeeze_output, squeezed_too
from lora_squeeze.campaign.manifest import (
    MANIFEST,
    Manifest,
    RunEntry,
    new_manifest,
    now,
    read_manifest,
    refreshed,
    run_folder,
    with_run,
    write_manifest,
)
from lora_squeeze.campaign.spec import Campaign, PlannedRun
from lora_squeeze.errors import LoraSqueezeError, OutputError, TrainingError
from lora_squeeze.executors import Resources, execute, pool_of
from lora_squeeze.formats.folder import new_file
from lora_squeeze.records import Analysis
from lora_squeeze.report.wandb import log_squeeze
from lora_squeeze.sections import document_of, to_toml
from lora_squeeze.squeezing import check_ahead
from lora_squeeze.training.folder import only_one
from lora_squeeze.training.settings import RunSettings, check
from lora_squeeze.worker import Ending, Job

__all__ = ["begin", "campaign_folder", "check_begin", "run_campaign"]

OnChange = Callable[[Manifest], None]


def campaign_folder(campaign: Campaign) -> Path:
    """The default folder: campaign_TIME in `[logging] log_dir`, or in logs."""
    return Path(campaign.common.logging.log_dir or "logs") / f"campaign_{datetime.now():%Y%m%d_%H%M%S}"


def check_begin(campaign: Campaign, folder: Path, *, config_file: str = "campaign.toml") -> None:
    """Raise what `begin` would raise of the folder and of [squeeze], and make nothing."""
    if not _is_begun(campaign, folder):
        _check_squeeze(campaign, new_manifest(campaign, config_file), config_file)


def begin(campaign: Campaign, folder: Path, *, config_file: str = "campaign.toml") -> Path:
    """Make a campaign's folder with its manifest and the configuration of every run.

    A folder in which the same campaign was begun is left as it is. Raises OutputError if something
    else lies there or at [squeeze] output_path, TrainingError if it is another campaign's.
    """
    if _is_begun(campaign, folder):
        return folder
    manifest = new_manifest(campaign, config_file)
    _check_squeeze(campaign, manifest, config_file)
    try:
        for name in ("configs", "logs", "runs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error
    for run, entry in zip(campaign.runs, manifest.runs, strict=True):
        _write_config(run.settings, run, entry, folder)
    write_manifest(manifest, folder)  # last: with it, the campaign has begun
    return folder


def _is_begun(campaign: Campaign, folder: Path) -> bool:
    """Whether the folder holds this campaign; an error if it holds anything else."""
    if (folder / MANIFEST).exists():
        if read_manifest(folder).config != dict(campaign.document):
            raise TrainingError(
                f"{folder}: holds a campaign of another configuration; choose another folder with --out"
            )
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: exists and is not the folder of a campaign; choose another with --out")
    return False


def _check_squeeze(campaign: Campaign, manifest: Manifest, file: str) -> None:
    if campaign.common.squeeze is not None:
        for output in dict.fromkeys(squeeze_output(campaign, entry) for entry in manifest.runs):
            check_ahead(replace(campaign.common.squeeze, output_path=output), file)


def run_campaign(folder: Path, *, retry: Collection[str] = (), on_change: OnChange | None = None) -> Manifest:
    """Run whatever of a campaign has not finished, and return its manifest.

    retry
        names of failed runs that are to be tried once more.
    on_change
        called with the manifest whenever it has been written.

    A run that fails is recorded and does not stop the others. Raises TrainingError if another process
    runs this campaign, MissingExtra for what the executor needs.
    """
    with only_one(folder):
        return _Launch(folder, retry, on_change).run()


class _Launch:
    """One start of a campaign: the manifest as it changes, and the runs still to be started."""

    def __init__(self, folder: Path, retry: Collection[str], on_change: OnChange | None) -> None:
        self.folder = folder
        self.manifest = refreshed(read_manifest(folder), folder)
        self.campaign = self.manifest.campaign
        self.planned = {run.name: run for run in self.campaign.runs}
        self._on_change = on_change
        for name in retry:
            if self.manifest.run(name).status == "failed":
                self.manifest = with_run(self.manifest, name, status="pending", attempts=0)
        self.pending = deque(entry.name for entry in self.manifest.runs if entry.status == "pending")

    def run(self) -> Manifest:
        self._changed(self.manifest)
        for entry in self.manifest.runs:
            if entry.status == "finished":
                self._squeeze(entry)
        chosen, workers = self.campaign.settings, self.campaign.workers
        if self.pending:
            execute(
                self._take,
                pool_of(self.campaign.executor, workers=workers, resources=self._resources()),
                workers=workers,
                stagger_seconds=chosen.stagger_seconds,
                on_start=self._started,
                on_end=self._ended,
            )
        if chosen.summary_script:
            self._summarize()
        return self.manifest

    def _take(self) -> Job | None:
        """The next run; while the first one is to say at which rank, only that one."""
        one_first = self.campaign.settings.use_recommended_rank and self.manifest.squeeze.status == "pending"
        if not self.pending or (one_first and any(entry.status == "running" for entry in self.manifest.runs)):
            return None
        entry = self.manifest.run(self.pending.popleft())
        run = self.planned[entry.name]
        _write_config(self._settings_of(run, entry), run, entry, self.folder)
        here = self.folder.resolve()
        return Job(
            name=entry.name,
            function="lora_squeeze.training.job.train_job",
            arguments={"config": str(here / entry.config), "folder": str(here / entry.folder)},
            log=str(here / entry.log),
        )

    def _settings_of(self, run: PlannedRun, entry: RunEntry) -> RunSettings:
        """A run's own settings, at the recommended rank if that is wanted and its condition names none."""
        if not self.campaign.settings.use_recommended_rank or run.names_rank:
            return run.settings
        rank = run_folder(self.folder, entry).begun_at_rank()  # it can go on at no other
        if rank is None:
            rank = self.manifest.squeeze.recommended_rank
            if not rank or entry.name == self.manifest.squeeze.run:
                return run.settings
        at_rank = replace(run.settings, model=replace(run.settings.model, lora_rank=rank))
        try:
            check(at_rank, run.name)
        except LoraSqueezeError:
            return run.settings  # such as a schedule that begins at the higher rank
        return at_rank

    def _started(self, job: Job) -> None:
        entry = self.manifest.run(job.name)
        self._changed(
            with_run(
                self.manifest,
                job.name,
                status="running",
                attempts=entry.attempts + 1,
                started=now(),
                finished="",
                error="",
                exit_code=None,
            )
        )

    def _ended(self, job: Job, ending: Ending) -> None:
        entry = self.manifest.run(job.name)
        # Its record says all that there is to say, even if the process came to grief after it.
        done = refreshed(replace(self.manifest, runs=[entry]), self.folder).run(job.name)
        if done.status == "finished":
            self._changed(with_run(self.manifest, job.name, **vars(done)))
            self._squeeze(done)
            return
        again = entry.attempts <= self.campaign.settings.retries
        if again:
            self.pending.append(job.name)
        self._changed(
            with_run(
                self.manifest,
                job.name,
                status="pending" if again else "failed",
                exit_code=ending.code,
                error=ending.error or "it ended without a record",
                finished=now(),
            )
        )

    def _squeeze(self, entry: RunEntry) -> None:
        """After the first run that finishes: analyze. After each of the others, if wanted: compress."""
        squeeze = self.manifest.squeeze
        try:
            if squeeze.status == "pending":
                analysis, found = analyzed(self.campaign, self.manifest, entry, self.folder)
                self._changed(replace(self.manifest, squeeze=found))
                self._tell_wandb(analysis)
            elif squeeze.status == "finished" and self._wants_squeeze(entry):
                output = squeezed_too(self.campaign, self.manifest, entry, self.folder)
                outputs = {**squeeze.outputs, entry.name: output}
                self._changed(replace(self.manifest, squeeze=replace(squeeze, outputs=outputs)))
        except (LoraSqueezeError, RuntimeError, MemoryError, OSError) as error:
            first = squeeze.status == "pending"
            said = f"{entry.name}: {error}"
            failed = replace(squeeze, status="failed" if first else squeeze.status, error=said)
            self._changed(replace(self.manifest, squeeze=failed))

    def _wants_squeeze(self, entry: RunEntry) -> bool:
        wanted = self.campaign.settings.squeeze_every_run and squeeze_output(self.campaign, entry)
        return bool(wanted) and entry.name not in self.manifest.squeeze.outputs

    def _tell_wandb(self, analysis: Analysis) -> None:
        """The recommendation is in the manifest already: whatever W&B does, it stays there."""
        logs = self.campaign.common.logging
        if not logs.wandb_project:
            return
        group = logs.wandb_group or self.folder.name
        try:
            place = log_squeeze(
                analysis,
                project=logs.wandb_project,
                entity=logs.wandb_entity,
                group=group,
                directory=str(self.folder.resolve()),
            )
        except Exception as error:
            place = f"failed: {error}"
        self._changed(replace(self.manifest, squeeze=replace(self.manifest.squeeze, wandb=place)))

    def _summarize(self) -> None:
        chosen = self.campaign.settings
        command = [sys.executable, chosen.summary_script, str(self.folder), *chosen.summary_args]
        with (self.folder / "logs" / "summary.log").open("wb") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        said = "finished" if code == 0 else f"failed with exit code {code}; see logs/summary.log"
        self._changed(replace(self.manifest, summary=said))

    def _resources(self) -> Resources:
        chosen = self.campaign.settings
        return Resources(chosen.cpus_per_run, chosen.gpus_per_run, chosen.placement, chosen.ray_address)

    def _changed(self, manifest: Manifest) -> None:
        self.manifest = manifest
        write_manifest(manifest, self.folder)
        if self._on_change is not None:
            self._on_change(manifest)


def _write_config(settings: RunSettings, run: PlannedRun, entry: RunEntry, folder: Path) -> None:
    logs = settings.logging
    if logs.wandb_project:  # so that W&B shows the campaign's runs together, under their names
        tags = [*logs.wandb_tags, run.condition[:64]]
        group, name = logs.wandb_group or folder.name, logs.wandb_run_name or run.name
        logs = replace(logs, wandb_group=group, wandb_tags=tags, wandb_run_name=name)
    with new_file(folder / entry.config, overwrite=True) as file:
        file.write_text(to_toml(document_of(replace(settings, logging=logs))), encoding="utf-8")
