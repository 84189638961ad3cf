"""Printing records and showing progress."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import TaskID

__all__ = ["download_progress", "print_record", "print_table", "printable", "progress", "progress_of"]


def print_record(record: Any, table: Callable[[Any], RenderableType], *, as_json: bool) -> None:
    """As JSON, or as the table that belongs to it."""
    if as_json:
        click.echo(record.to_json())
    else:
        print_table(table(record))


def print_table(table: RenderableType) -> None:
    """Fitted to the terminal; a file or a pipe has no width to wrap at."""
    from rich.console import Console
    from rich.segment import Segment, Segments

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    segments = (Segment(printable(one.text), one.style, one.control) for one in console.render(table))
    with console.capture() as printed:
        console.print(Segments(segments), end="")
    text = printed.get()
    if not console.is_terminal:
        text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    console.file.write(text)


def printable(text: str) -> str:
    """Without the control characters by which a name in a file could command the terminal."""
    return "".join(one if one.isprintable() or one in "\n\t" else repr(one)[1:-1] for one in text)


@contextmanager
def progress(what: str, total: int) -> Generator[Callable[[str], None], None, None]:
    """A bar on stderr, moved on by one at a time; only in a terminal, and gone when the work is done."""
    with progress_of(what, total) as advance:
        yield lambda _name: advance(1)


@contextmanager
def progress_of(what: str, total: int) -> Generator[Callable[[int], None], None, None]:
    """The same bar, moved on by any number at a time."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def download_progress() -> Generator[Callable[[str, int, int], None], None, None]:
    """A bar on stderr for what is fetched, from the first time it is called; only in a terminal, and gone at the end.

    It is called with what is being done, bytes so far, and of how many (0: not known).
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(what, total=None)
            bar.update(tasks[what], completed=done, total=total or None)

        yield show


@contextmanager
def waiting(what: str) -> Generator[None, None, None]:
    """A line on stderr while something takes its time; only in a terminal, and gone at the end."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
