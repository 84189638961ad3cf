"""The folder of a run: what lies where, and whether it has begun, can be continued or has finished.

settings.toml     what it was started with
metrics.jsonl     a line for each logging step
checkpoints/      checkpoint-STEP: adapter, optimizer, scheduler, random states
final/            the adapter, as PEFT reads it, with its tokenizer
run.json          the record of the finished run
wandb.txt         the id by which W&B knows it, if it reports there
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from lora_squeeze.errors import OutputError, SettingsError, TrainingError
from lora_squeeze.formats.folder import new_file
from lora_squeeze.sections import build, document_of, read_toml, to_toml
from lora_squeeze.training.record import RunRecord, read_record
from lora_squeeze.training.settings import RunSettings, read_run_settings

__all__ = ["STATE", "RunFolder", "only_one"]

# What may change between two starts of one run: where it reports to, how it is squeezed afterwards.
_FREE = ("logging", "squeeze", "resume")

_LOCK = ".lock"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# The last of what a checkpoint consists of: where it can be read, the rest is there.
STATE = "trainer_state.json"


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    path: Path

    @property
    def settings(self) -> Path:
        """What it was started with."""
        return self.path / "settings.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, with its step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One folder for each."""
        return self.path / "checkpoints"

    @property
    def squeezed(self) -> Path:
        """The adapter that it starts from, at the rank that it starts at."""
        return self.path / "squeezed"

    @property
    def final(self) -> Path:
        """The trained adapter."""
        return self.path / "final"

    @property
    def record(self) -> Path:
        """The record of the finished run."""
        return self.path / "run.json"

    @property
    def wandb(self) -> Path:
        """The id of its W&B run."""
        return self.path / "wandb.txt"

    def finished(self) -> RunRecord | None:
        """The record, if the run has finished."""
        return read_record(self.record) if self.record.exists() and self.final.exists() else None

    def make(self) -> None:
        """Make the folder, unless it is there. Raises OutputError if something else than a run lies there."""
        if self.path.exists() and not self._is_a_run():
            raise OutputError(f"{self.path}: exists and is not the folder of a run; choose another with --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error

    def begin(self, settings: RunSettings, *, overwrite: bool = False) -> None:
        """Write down the settings, or accept what the same settings began; while no other process works on the folder.

        overwrite
            remove what an earlier run wrote, and nothing else that lies there.

        Raises TrainingError if the settings are others, OutputError if they need what would be removed.
        """
        if overwrite:
            self._clear(settings)
        document = document_of(settings)
        if self.settings.exists() and self._holds_work():
            self._check_same(document)
        with new_file(self.settings, overwrite=True) as file:
            file.write_text(to_toml(document), encoding="utf-8")

    def begun_at_rank(self) -> int | None:
        """`[model] lora_rank` of what there is of a run; None if nothing was made, or it cannot be told."""
        if not self.settings.exists() or not self._holds_work():
            return None
        try:
            return read_run_settings(self.settings).model.lora_rank
        except SettingsError:
            return None  # `begin` says what is wrong with the file

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        complete = {step: path for step, path in self._found().items() if _is_complete(path, step)}
        return complete[max(complete)] if complete else None

    def clear_incomplete(self) -> None:
        """Remove what a killed run has left half written; not while another process may be writing it."""
        for step, path in self._found().items():
            if not _is_complete(path, step):
                shutil.rmtree(path, ignore_errors=True)

    def forget_metrics_after(self, step: int) -> None:
        """Drop the logged lines beyond the step that training goes on from."""
        kept = [json.dumps(entry) + "\n" for entry in self.read_metrics() if entry["step"] <= step]
        with new_file(self.metrics, overwrite=True) as file:
            file.write_text("".join(kept), encoding="utf-8")

    def read_metrics(self) -> list[dict[str, Any]]:
        """What was logged, in order; a line that a kill has cut off is left out."""
        if not self.metrics.exists():
            return []
        entries: list[dict[str, Any]] = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return entries

    def _is_a_run(self) -> bool:
        """Whether the folder is empty or a run's; files of this name are many programs' settings."""
        if not self.path.is_dir():
            return False
        if not any(one.name != _LOCK for one in self.path.iterdir()):
            return True
        if not self.settings.is_file():
            return False
        try:
            return bool(build(RunSettings, read_toml(self.settings), self.settings).data.source)
        except SettingsError:  # damaged, or of another version
            return (self.path / _LOCK).exists() or self.record.exists()

    def _clear(self, settings: RunSettings) -> None:
        # The settings stay, until others take their place: if this is interrupted, it is a run's folder still.
        made = (self.record, self.wandb, self.metrics, self.final, self.squeezed, self.checkpoints)
        removed = {one.resolve() for one in made}
        for key, place in _read_by(settings):
            origin = place.resolve()
            if origin == self.path.resolve() or not removed.isdisjoint((origin, *origin.parents)):
                raise OutputError(
                    f"{self.path}: --overwrite would remove {place}, which {key} names; "
                    "choose another folder with --out"
                )
        for one in made:
            if one.is_dir() and not one.is_symlink():
                shutil.rmtree(one)
            else:
                one.unlink(missing_ok=True)

    def _holds_work(self) -> bool:
        """Whether anything was made with the settings that lie there; not if the data or the model failed at once."""
        return any(path.exists() for path in (self.metrics, self.checkpoints, self.squeezed, self.final))

    def _found(self) -> dict[int, Path]:
        folders = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return {int(match[1]): path for path in folders if (match := _CHECKPOINT.fullmatch(path.name))}

    def _check_same(self, document: dict[str, Any]) -> None:
        try:
            before = read_toml(self.settings)
        except SettingsError as error:
            raise TrainingError(f"{error}; --overwrite begins anew") from error
        for section in dict.fromkeys([*before, *document]):
            old, new = before.get(section, {}), document.get(section, {})
            for key in dict.fromkeys([*old, *new]):
                if section not in _FREE and old.get(key) != new.get(key):
                    raise TrainingError(
                        f"{self.path}: was begun with [{section}] {key} = {_said(old, key)}, and now it is "
                        f"{_said(new, key)}; choose another folder with --out, or --overwrite to begin anew"
                    )


@contextmanager
def only_one(folder: Path, *, patience: float = 0.0) -> Generator[None, None, None]:
    """Let one process at a time work on a folder; the lock goes with the process, however that ends.

    patience
        seconds to wait for one that is just ending.

    Raises TrainingError if another process is at work.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    if not folder.is_dir():
        raise TrainingError(f"{folder}: no such folder")
    until = time.monotonic() + patience
    with (folder / _LOCK).open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise TrainingError(f"{folder}: another process is at work on it") from None
                time.sleep(0.1)
        yield


def _read_by(settings: RunSettings) -> Iterator[tuple[str, Path]]:
    """The files and folders on this disk that a run with these settings reads, with the keys that name them."""
    named = [
        ("[model] model", settings.model.model),
        ("[model] adapter", settings.model.adapter),
        ("[resume] from", settings.resume.from_),
        *(("[data] source", source) for source in settings.data.source),
        *(("[data] eval_source", source) for source in settings.data.eval_source),
    ]
    for key, source in named:
        # A source may be a pattern, or a saved data set with the name of its split behind a colon.
        places = (source, source.partition(":")[0], *glob(source))  # noqa: PTH207
        yield from ((key, Path(place)) for place in places if place and Path(place).exists())


def _said(section: dict[str, Any], key: str) -> str:
    return repr(section[key]) if key in section else "the default"


def _is_complete(folder: Path, step: int) -> bool:
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8"))["global_step"] == step
    except (OSError, ValueError, KeyError, TypeError):
        return False
