"""Sources → rows: files, folders, data sets of the Hub and built-in ones.

data.jsonl, data.json, data.csv, data.tsv, data.parquet    files; the first four also as .gz
shards/*.jsonl                                             several, in the order of their names
saved/ or saved:validation                                 what datasets' save_to_disk wrote
builtin:arithmetic:500                                     see `lora_squeeze.data.builtin`
openai/gsm8k:main:test                                     NAME[:CONFIG]:SPLIT for `datasets`
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from glob import glob, has_magic
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lora_squeeze.data.builtin import builtin_rows
from lora_squeeze.data.examples import Row
from lora_squeeze.data.images import Picture
from lora_squeeze.errors import DataError, LoraSqueezeError
from lora_squeeze.extras import require

__all__ = ["read_rows"]


def read_rows(sources: str | Iterable[str], *, limit: int = 0) -> Iterator[Row]:
    """The rows of one source or of several, one after the other.

    limit
        at most so many rows altogether; 0: all.

    Raises DataError, with file and line, for what cannot be read, MissingExtra if `datasets` is needed.
    """
    named = [sources] if isinstance(sources, str) else list(sources)
    if not named:
        raise DataError("no data are named; give a file, a folder, builtin:NAME or the name of a data set")
    rows = (row for source in named for row in _rows_of(source))
    return islice(rows, limit or None)


def _rows_of(source: str) -> Iterator[Row]:
    if source.startswith("builtin:"):
        return builtin_rows(source)
    if has_magic(source):
        paths = sorted(Path(path) for path in glob(source, recursive=True))  # noqa: PTH207
        if not paths:
            raise DataError(f"{source}: no file matches")
        return (row for path in paths for row in _file_rows(path))
    path = Path(source)
    if path.is_file():
        return _file_rows(path)
    folder, _, split = source.partition(":")
    if Path(folder).is_dir():
        return _saved_rows(Path(folder), split)
    if _suffix(path) in _READERS or path.is_absolute() or source.startswith("."):
        raise DataError(f"{source}: no such file")
    return _hub_rows(source)


def _suffix(path: Path) -> str:
    suffixes = [one.lower() for one in path.suffixes]
    return (suffixes[-2:-1] or [""])[0] if suffixes[-1:] == [".gz"] else (suffixes or [""])[-1]


def _file_rows(path: Path) -> Iterator[Row]:
    suffix = _suffix(path)
    if suffix not in _READERS:
        raise DataError(f"{path}: a file of data ends in {', '.join(_READERS)} (not '{path.suffix}')")
    try:
        for row in _READERS[suffix](path):
            yield replace(row, folder=path.parent)
    except LoraSqueezeError:
        raise
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


@contextmanager
def _opened(path: Path) -> Generator[IO[str], None, None]:
    """As UTF-8 text; newlines as they are, which csv needs."""
    packed = path.suffix.lower() == ".gz"
    with (
        gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        if packed
        else path.open(encoding="utf-8-sig", newline="") as file
    ):
        yield file


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                try:
                    yield _row(place, json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{place}: not valid JSON: {error.msg} at column {error.colno}") from error


def _json_rows(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        text = file.read()
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, under the wrong name
            yield from _jsonl_rows(path)
            return
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(found, list):
        found = (
            next((one for one in found.values() if isinstance(one, list)), None) if isinstance(found, dict) else None
        )
    if found is None:
        raise DataError(f"{path}: must hold a list of objects, or an object with one")
    for number, one in enumerate(found, start=1):
        yield _row(f"{path}, entry {number}", one)


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # a field may be a whole document
    with _opened(path) as file:
        reader = csv.DictReader(file, dialect="excel-tab" if _suffix(path) == ".tsv" else "excel", strict=True)
        try:
            for fields in reader:
                place = f"{path}, line {reader.line_num}"
                if None in fields or None in fields.values():
                    columns = len(reader.fieldnames or ())
                    raise DataError(f"{place}: does not have the {columns} fields that the first line names")
                yield Row(place, fields)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    parquet, arrow = require("pyarrow.parquet", "train"), require("pyarrow", "train")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", fields)
    except arrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from error


def _saved_rows(folder: Path, split: str) -> Iterator[Row]:
    datasets = require("datasets", "train")
    try:
        found = datasets.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{folder}: not a folder that datasets' save_to_disk wrote: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        chosen = split or ("train" if "train" in found else "")
        if chosen not in found:
            raise DataError(f"{folder}: has the splits {', '.join(found)}; choose one, as {folder}:{next(iter(found))}")
        found = found[chosen]
    elif split:
        raise DataError(f"{folder}: is one data set without splits; leave out ':{split}'")
    return (replace(row, folder=folder) for row in _dataset_rows(found, str(folder)))


def _hub_rows(source: str) -> Iterator[Row]:
    """`datasets.load_dataset`; one part after the name is the split, two are configuration and split."""
    datasets = require("datasets", "train")
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise DataError(f"{source}: a data set is spelled NAME:SPLIT or NAME:CONFIG:SPLIT")
    config = rest[0] if len(rest) == 2 else None
    try:
        found = datasets.load_dataset(name, config, split=rest[-1] if rest else "train")
    except Exception as error:  # whatever the Hub, the network or the builder raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{source}: neither a file nor a folder here, and datasets cannot load it: {reason[0]}"
        ) from error
    return _dataset_rows(found, source)


def _dataset_rows(dataset: Any, name: str) -> Iterator[Row]:
    """Class labels are given by name, as in files; images stay in the data set until they are opened."""
    classes = {key: one.int2str for key, one in dataset.features.items() if hasattr(one, "int2str")}
    pictures: list[str] = []
    for key, one in dataset.features.items():
        encoded = require("datasets", "train").Image(decode=False)
        if type(one).__name__ == "Image":
            pictures.append(key)
            dataset = dataset.cast_column(key, encoded)
        elif type(getattr(one, "feature", None)).__name__ == "Image":
            pictures.append(key)
            dataset = dataset.cast_column(key, type(one)(encoded))
    for number, fields in enumerate(dataset):
        named = {key: classes[key](fields[key]) for key in classes if fields[key] is not None and fields[key] >= 0}
        seen = {key: _kept_there(dataset, number, key, fields[key]) for key in pictures}
        yield Row(f"{name}, row {number + 1}", {**fields, **named, **seen})


def _kept_there(dataset: Any, number: int, key: str, found: Any) -> Any:
    """Images of a data set, which a list of examples would otherwise keep in memory."""
    if isinstance(found, list):
        return [_later(dataset, number, key, one, place) for place, one in enumerate(found)]
    return _later(dataset, number, key, found)


def _later(dataset: Any, number: int, key: str, found: Any, place: int | None = None) -> Any:
    if found is None or found.get("bytes") is None:
        return found
    name = sha256(found["bytes"]).hexdigest()
    return Picture(name, len(found["bytes"]), partial(_cell, dataset, number, key, place))


def _cell(dataset: Any, number: int, key: str, place: int | None) -> bytes:
    found = dataset[number][key]
    return (found if place is None else found[place])["bytes"]


def _row(place: str, fields: Any) -> Row:
    if not isinstance(fields, dict):
        raise DataError(f"{place}: must be an object with keys, not {json.dumps(fields)[:60]}")
    return Row(place, fields)


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
