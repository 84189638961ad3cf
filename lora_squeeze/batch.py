"""Many adapters squeezed in one go: the same policy for all, one folder of results, continued where it stopped.

    records = squeeze_batch(["a", "b"], Path("out"), policy="energy=0.9")

OUT holds a squeezed adapter for each source, under its name, and batch.json with a record of each. A source keeps the
name that it got, and its record, whatever is squeezed into OUT after it.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_squeeze.documents import parse_json, read_text
from lora_squeeze.errors import AdapterError, OutputError, SettingsError
from lora_squeeze.executors import Resources, execute, pool_of
from lora_squeeze.formats import FORMATS, open_adapter
from lora_squeeze.formats.folder import new_file
from lora_squeeze.identity import from_root, identity_now, identity_of, last_parts, place_of, told_apart
from lora_squeeze.parallel import ordered_map
from lora_squeeze.peft_names import CONFIG, PICKLED_WEIGHTS, WEIGHTS
from lora_squeeze.settings import Settings, SqueezeSettings
from lora_squeeze.squeezing import squeeze_as_set
from lora_squeeze.training.folder import only_one
from lora_squeeze.worker import Ending, Job

__all__ = ["BatchRecord", "batch_to_json", "listed", "named", "read_batch", "squeeze_batch", "squeeze_job"]

RECORDS = "batch.json"
LOGS = "logs"
# What the batch itself keeps in its folder.
_RESERVED = (RECORDS, LOGS, ".lock")
_FILE = ".safetensors"
SCHEMA = 1


@dataclass(frozen=True)
class BatchRecord:
    """What has become of one adapter.

    settings
        what it was squeezed by.
    bytes_before, bytes_after
        of the weight files.
    place, identity
        where the source lies, and what it was when it was squeezed (see `lora_squeeze.identity`); "" in old records.
    """

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
    place: str = ""
    identity: str = ""


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

    What was squeezed before, by the same settings, is not squeezed again unless the source has changed since; failed
    ones are tried again. Records of other sources, and what was made of these, stay as they are.
    sources
        adapters as open_adapter takes them; a local folder that holds none stands for those in it.
    workers, resources
        of `executor` "processes" or "ray", and of "ray".

    Raises SettingsError if no adapter is named, or one whose result would have a name that the batch needs itself;
    OutputError for an `out` that holds something else.
    """
    settings = {"policy": policy, "device": device, "dtype": dtype, "runtime": runtime}
    _check_folder(out)
    _names(sources, out)
    (out / LOGS).mkdir(parents=True, exist_ok=True)
    with only_one(out):
        found, known = _names(sources, out)
        again = [name for name in found if name in known]
        stays = dict(zip(again, ordered_map(lambda name: _stays(known[name], settings), again), strict=True))
        records = {
            name: replace(known[name], source=source)
            if stays.get(name)
            else BatchRecord(
                source, str(out / name), settings, place=known[name].place if name in known else place_of(source)
            )
            for name, source in found.items()
        }
        others = {name: record for name, record in known.items() if name not in records}
        _Batch(out, records, others, on_change).run(executor, workers, resources)
    return tuple(records.values())


def listed(sources: Sequence[str]) -> tuple[str, ...]:
    """The adapters that are meant, each once: a folder that is none stands for those right below it.

    Raises SettingsError for none, or an empty path.
    """
    if "" in sources:
        raise SettingsError("the path of an adapter is empty: is a variable of the shell not set?")
    flat = [one for source in sources for one in _inside(Path(source)) or [source]]
    if not flat:
        raise SettingsError("no adapter is named")
    by_place: dict[str, str] = {}
    for one in flat:
        by_place.setdefault(place_of(one), one)
    return tuple(by_place.values())


def named(sources: Sequence[str], *, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """A name for each adapter, different from all others: its own, or those of the folders that it lies in.

    known
        name → place of sources that have one already: they keep it, and no other gets it.

    Raises SettingsError for no adapter, or for a name that the batch needs itself.
    """
    flat, taken = listed(sources), known or {}
    own = {place: name for name, place in taken.items()}
    kept = {one: own[place] for one in flat if (place := _place_among(own, one)) in own}
    new = [one for one in flat if one not in kept]
    kept.update(zip(new, _fresh_names(new, {_stem(name) for name in taken}), strict=True))
    names = {kept[one]: one for one in flat}
    for name, source in names.items():
        if name.casefold() in _RESERVED:
            raise SettingsError(
                f"{source}: its result would be named '{name}', which is the batch's own in its folder; rename the "
                "adapter, or squeeze it by itself with lora-squeeze compress"
            )
    return names


def _fresh_names(sources: Sequence[str], taken: set[str]) -> list[str]:
    if names := told_apart(sources, _name, key=_stem, taken=taken):
        return names
    return [f"{_name(last_parts(one, 1))}-{hashlib.sha256(one.encode()).hexdigest()[:8]}" for one in sources]


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


def batch_to_json(records: Sequence[BatchRecord]) -> str:
    """Records as they stand in batch.json."""
    fields = {"record": "Batch", "schema": SCHEMA, "adapters": [asdict(one) for one in records]}
    return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"


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
        identity=identity_of(adapter),
    )
    with new_file(Path(result), overwrite=True) as file:
        file.write_text(json.dumps(asdict(record)), encoding="utf-8")


class _Batch:
    """One start of a batch: the records as they change, and those of others that lie in the same folder."""

    def __init__(
        self,
        out: Path,
        records: dict[str, BatchRecord],
        others: dict[str, BatchRecord],
        on_change: Callable[[Sequence[BatchRecord]], None] | None,
    ) -> None:
        self.out, self.records, self._others, self._on_change = out, records, others, on_change
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
            "result": str(here / LOGS / f"{name}.json"),
        }
        return Job(name, "lora_squeeze.batch.squeeze_job", arguments, str(here / LOGS / f"{name}.log"))

    def _ended(self, job: Job, ending: Ending) -> None:
        record = self.records[job.name]
        if ending.code == 0:
            made = BatchRecord(**parse_json(read_text(Path(job.arguments["result"]))))
            record = replace(made, place=record.place)
        else:
            record = replace(record, status="failed", error=ending.error)
        self.records[job.name] = record
        self._write()

    def _write(self) -> None:
        with new_file(self.out / RECORDS, overwrite=True) as file:
            file.write_text(batch_to_json([*self._others.values(), *self.records.values()]), encoding="utf-8")
        if self._on_change is not None:
            self._on_change(tuple(self.records.values()))


def _check_folder(out: Path) -> None:
    if not (out / RECORDS).exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists and is not the folder of a batch; choose another with --out")


def _names(sources: Sequence[str], out: Path) -> tuple[dict[str, str], dict[str, BatchRecord]]:
    """The names of these sources in a batch's folder, and its records by name; those whose result is gone left out.

    Raises SettingsError for names that cannot be, OutputError where something nobody knows of would be replaced.
    """
    recorded = {Path(one.output).name: one for one in (read_batch(out) if (out / RECORDS).exists() else ())}
    known = {
        name: replace(record, output=str(out / name), place=record.place or place_of(record.source))
        for name, record in recorded.items()
        if record.status != "finished" or (out / name).exists()
    }
    found = named(sources, known={name: one.place for name, one in known.items()})
    for name, source in found.items():
        for output in (out / name, out / f"{name}{_FILE}"):
            if name not in known and output.exists():
                raise OutputError(
                    f"{output}: is there already, and {RECORDS} does not say of what it was made; move it away, or "
                    f"choose another folder with --out, to squeeze {source}"
                )
    return found, known


def _stays(before: BatchRecord, settings: Mapping[str, Any]) -> bool:
    """Whether what was made of a source is what would be made of it now."""
    if (before.status, before.settings) != ("finished", settings) or not _is_whole(before):
        return False
    try:
        now = identity_now(before.place)
    except AdapterError:  # what is wrong with it is said when it is squeezed
        return False
    return now in ("", before.identity)


def _is_whole(record: BatchRecord) -> bool:
    """Whether the weights lie where they were written, and have their size."""
    output = Path(record.output)
    weights = output / WEIGHTS if output.is_dir() else output
    return weights.is_file() and weights.stat().st_size == record.bytes_after


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


def _place_among(known: Mapping[str, str], source: str) -> str:
    """Where a source lies; of one that is not there any more, where it was."""
    place, was = place_of(source), from_root(source)
    return was if place not in known and was in known else place


def _stem(name: str) -> str:
    """What two results may not share: one that is a file gets its ending only when the adapter has been opened."""
    return name.removesuffix(_FILE)


def _name(parts: list[str]) -> str:
    """The last parts of a path or address as one name; a file keeps its ending."""
    name = "-".join(parts) or "adapter"
    return "".join(one if one.isalnum() or one in ".+=,~_-" else "-" for one in name).lstrip(".") or "adapter"
