"""The command line: parse, call, print. Nothing is computed here."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import click

from lora_squeeze.cli.analyze import analyze_command
from lora_squeeze.cli.batch import batch_command
from lora_squeeze.cli.calibrate import calibrate_command
from lora_squeeze.cli.campaign import campaign_command
from lora_squeeze.cli.check import check_command
from lora_squeeze.cli.compare import compare_command
from lora_squeeze.cli.compress import compress_command
from lora_squeeze.cli.convert import convert_command
from lora_squeeze.cli.curve import curve_command
from lora_squeeze.cli.evaluate import evaluate_command
from lora_squeeze.cli.merge import merge_command
from lora_squeeze.cli.output import printable
from lora_squeeze.cli.plan import plan_command
from lora_squeeze.cli.report import report_command
from lora_squeeze.cli.run import run_command
from lora_squeeze.cli.show import show_command
from lora_squeeze.cli.train import continue_command, train_command
from lora_squeeze.cli.verify import verify_command
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.version import __version__

__all__ = ["main"]

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


_SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Look at an adapter": (show_command, analyze_command, compare_command, report_command),
    "Squeeze it": (compress_command, plan_command, batch_command, merge_command, run_command),
    "Check and convert": (verify_command, check_command, convert_command),
    "Measure on data": (evaluate_command, curve_command, calibrate_command),
    "Train": (train_command, continue_command, campaign_command),
}


class _Group(click.Group):
    """Prints the project's own errors and those of the machine as one line; what is left is a bug.

    SIGTERM and SIGHUP end a command as Ctrl-C does: what it has begun is cleared away.
    """

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """In the order in which they are needed, under headings."""
        for heading, commands in _SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{command.name:<9}", command.get_short_help_str(70)) for command in commands])

    def invoke(self, ctx: click.Context) -> Any:
        with _ended_by_signals():
            try:
                return super().invoke(ctx)
            except LoraSqueezeError as error:
                raise click.ClickException(printable(str(error))) from error
            except OSError as error:
                if error.errno == errno.EPIPE:  # whoever read the output has seen enough
                    raise
                place = f"{error.filename}: " if error.filename else ""
                raise click.ClickException(printable(f"{place}{error.strerror or error}")) from error
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "allocate" not in str(error):
                    raise
                raise click.ClickException(f"there is not enough memory for this: {error}") from error


@contextmanager
def _ended_by_signals() -> Generator[None, None, None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        if before[number] is signal.SIG_DFL:  # under nohup, SIGHUP is to be ignored
            signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _end:
                signal.signal(number, handler)


def _end(number: int, _frame: Any) -> None:
    raise SystemExit(128 + number)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
)
@click.version_option(__version__, prog_name="lora-squeeze")
def main() -> None:
    """Find the rank a LoRA adapter really needs, and make it that small."""


for command in (command for commands in _SECTIONS.values() for command in commands):
    main.add_command(command)
