"""Many adapters squeezed in one go: the same policy for all, one folder of results, continued where it stopped.

    records = squeeze_batch(["a", "b"], Path("out"), policy="energy=0.9")

OUT holds a squeezed adapter for each source, under its name, and batch.json with a record of each.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_squeeze.documents import parse_json, read_text
from lora_squeeze.errors import OutputError, SettingsError
from lora_squeeze.executors import Resources, execute, pool_of
from lora_squeeze.formats import FORMATS, open_adapter
from lora_squeeze.formats.folder import new_file
from lora_squeeze.peft_names import CONFIG, PICKLED_WEIGHTS, WEIGHTS
from lora_squeeze.settings import Settings, SqueezeSettings
from lora_squeeze.squeezing import squeeze_as_set
from lora_squeeze.training.folder import only_one
from lora_squeeze.worker import Job, Outcome

__all__ = ["BatchRecord", "named", "read_batch", "squeeze_batch", "squeeze_job"]

RECORDS = "batch.json"
_FILE = ".safetensors"
SCHEMA = 1


@dataclass(frozen=True)
class BatchRecord:
    """What has become of one adapter. `settings` is what it was squeezed by; sizes are bytes of the weight files."""

    source: str
    output: str
    settings: dict[str, Any]
    status: str = "pending"  # pending, finished or failed
    error: str = ""
    source_rank: int = 0
    rank: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    retained_variance: float = 0.0
    relative_error: float = 0.0


def squeeze_batch(
    sources: Sequence[str],
    out: Path,
    *,
    policy: str = "variance=0.95",
    device: str = "cpu",
    dtype: str = "",
    runtime: str = "",
    executor: str = "inline",
    workers: int = 1,
    resources: Resources | None = None,
    on_change: Callable[[Sequence[BatchRecord]], None] | None = None,
) -> tuple[BatchRecord, ...]:
    """Squeeze adapters into `out`, and return a record for each; one that fails does not stop the others.

    What was squeezed before, by the same settings, is not squeezed again; failed ones are tried again.
    sources
        adapters as open_adapter takes them; a local folder that holds none stands for those in it.

    Raises SettingsError if no adapter is named, OutputError for an `out` that holds something else.
    """
    settings = {"policy": policy, "device": device, "dtype": dtype, "runtime": runtime}
    found = named(sources)
    known = {record.output: record for record in _begun(out)}
    records = {name: BatchRecord(source, str(out / name), settings) for name, source in found.items()}
    for name, record in records.items():
        before = known.get(record.output) or known.get(record.output + _FILE)
        same = before is not None and (before.source, before.settings) == (record.source, settings)
        if before is not None and same and before.status == "finished" and Path(before.output).exists():
            records[name] = before
    with only_one(out):
        _Batch(out, records, on_change).run(executor, workers, resources)
    return tuple(records.values())


def named(sources: Sequence[str]) -> dict[str, str]:
    """A name for each adapter, different from all others: its own, or those of the folders that it lies in.

    A folder that is no adapter stands for the adapters right below it. Raises SettingsError for none.
    """
    flat: list[str] = []
    for source in dict.fromkeys(sources):
        flat += _inside(Path(source)) or [source]
    if not flat:
        raise SettingsError("no adapter is named")
    for parts in range(1, 8):
        names = [_name(source, parts) for source in flat]
        if len(set(names)) == len(names):
            return dict(zip(names, flat, strict=True))
    return {f"{_name(one, 1)}-{hashlib.sha256(one.encode()).hexdigest()[:8]}": one for one in flat}


def read_batch(out: Path) -> tuple[BatchRecord, ...]:
    """What `squeeze_batch` has recorded. Raises OutputError if the file is damaged, or from another version."""
    file = out / RECORDS
    try:
        fields = parse_json(read_text(file))
        if fields["record"] != "Batch" or fields["schema"] != SCHEMA:
            raise ValueError(f"it is no batch of schema {SCHEMA}")
        return tuple(BatchRecord(**one) for one in fields["adapters"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{file}: cannot be read: {error}") from error


def squeeze_job(source: str, output: str, settings: dict[str, Any], result: str) -> None:
    """Squeeze one adapter, and write the record that `squeeze_batch` takes up to the file `result`."""
    chosen = SqueezeSettings(adapter_path=source, output_path=output, overwrite=True, **settings)
    adapter = open_adapter(source)
    if FORMATS[adapter.format].single_file and not output.endswith(_FILE):  # from the Hub, or a folder with one file
        output += _FILE
        chosen = replace(chosen, output_path=output)
    analysis, compression = squeeze_as_set(adapter, Settings(chosen))
    assert compression is not None, "there is an output_path"
    record = BatchRecord(
        source=source,
        output=output,
        settings=settings,
        status="finished",
        source_rank=analysis.source_rank,
        rank=compression.rank,
        bytes_before=compression.bytes_before,
        bytes_after=compression.bytes_after,
        retained_variance=compression.retained_variance,
        relative_error=compression.relative_error,
    )
    with new_file(Path(result), overwrite=True) as file:
        file.write_text(json.dumps(asdict(record)), encoding="utf-8")


class _Batch:
    """One start of a batch: the records as they change."""

    def __init__(
        self,
        out: Path,
        records: dict[str, BatchRecord],
        on_change: Callable[[Sequence[BatchRecord]], None] | None,
    ) -> None:
        self.out, self.records, self._on_change = out, records, on_change
        self.pending = deque(name for name, record in records.items() if record.status != "finished")

    def run(self, executor: str, workers: int, resources: Resources | None) -> None:
        self._write()
        if self.pending:
            execute(
                self._take,
                pool_of(executor, workers=workers, resources=resources),
                workers=1 if executor == "inline" else workers,
                on_start=lambda _job: None,
                on_end=self._ended,
            )

    def _take(self) -> Job | None:
        if not self.pending:
            return None
        name = self.pending.popleft()
        record, here = self.records[name], self.out.resolve()
        arguments = {
            "source": record.source,
            "output": record.output,
            "settings": record.settings,
            "result": str(here / "logs" / f"{name}.json"),
        }
        return Job(name, "lora_squeeze.batch.squeeze_job", arguments, str(here / "logs" / f"{name}.log"))

    def _ended(self, job: Job, outcome: Outcome) -> None:
        record = self.records[job.name]
        if outcome.code == 0:
            record = BatchRecord(**parse_json(read_text(Path(job.arguments["result"]))))
        else:
            record = replace(record, status="failed", error=outcome.error)
        self.records[job.name] = record
        self._write()

    def _write(self) -> None:
        fields = {"record": "Batch", "schema": SCHEMA, "adapters": [asdict(one) for one in self.records.values()]}
        with new_file(self.out / RECORDS, overwrite=True) as file:
            file.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if self._on_change is not None:
            self._on_change(tuple(self.records.values()))


def _begun(out: Path) -> tuple[BatchRecord, ...]:
    if (out / RECORDS).exists():
        return read_batch(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists and is not the folder of a batch; choose another with --out")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    return ()


def _inside(folder: Path) -> list[str]:
    """The adapters right below a folder that is none itself."""
    if not folder.is_dir() or _is_adapter(folder):
        return []
    return [str(path) for path in sorted(folder.iterdir()) if _is_adapter(path)]


def _is_adapter(path: Path) -> bool:
    """By its looks alone: whether it is sound shows when it is squeezed."""
    if path.is_dir():
        return any((path / name).exists() for name in (CONFIG, WEIGHTS, PICKLED_WEIGHTS))
    return path.name.endswith(".safetensors")


def _name(source: str, parts: int) -> str:
    """The last so many parts of a path or address, as one name; a file keeps its ending."""
    kept = [part for part in source.replace("\\", "/").split("/") if part not in ("", ".", "..")][-parts:]
    name = "-".join(kept) or "adapter"
    return "".join(one if one.isalnum() or one in ".+=,~_-" else "-" for one in name).lstrip(".") or "adapter"
