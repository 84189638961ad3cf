"""Figures into a folder: all of them or an error before the first, each file whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import click

from lora_squeeze.cli.output import progress
from lora_squeeze.errors import OutputError

__all__ = ["check_plots", "write_plots"]


def check_plots(folder: Path, names: Iterable[str], *, overwrite: bool) -> None:
    """Raise MissingExtra without matplotlib, or OutputError if these figures cannot be written there."""
    from lora_squeeze.extras import require
    from lora_squeeze.formats.folder import check_folder_of

    require("matplotlib", "plots")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file, and figures are written to a folder; choose another")
    for file in _files(folder, names):
        if file.exists() and not overwrite:
            raise OutputError(f"{file}: already exists; use --overwrite to replace it, or choose another folder")
        check_folder_of(file)


def write_plots(folder: Path, figures: Mapping[str, Callable[[Path], None]], *, overwrite: bool) -> None:
    """Have each figure (its name → what draws it into a file) drawn as PNG and as SVG."""
    from lora_squeeze.formats.folder import new_file

    files = _files(folder, figures)
    with progress("Drawing", len(files)) as advance:
        for file in files:
            with new_file(file, overwrite=overwrite) as made:
                figures[file.stem](made)
            advance(file.name)
    click.echo(f"{folder}: {len(files)} files: {', '.join(figures)}")


def _files(folder: Path, names: Iterable[str]) -> list[Path]:
    from lora_squeeze.report.plots import FORMATS

    return [folder / f"{name}.{form}" for name in names for form in FORMATS]
