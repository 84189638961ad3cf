"""The command line: parse, call, print. Nothing is computed here."""

from __future__ import annotations

from typing import Any

import click

from lora_squeeze.cli.analyze import analyze_command
from lora_squeeze.cli.check import check_command
from lora_squeeze.cli.compare import compare_command
from lora_squeeze.cli.compress import compress_command
from lora_squeeze.cli.convert import convert_command
from lora_squeeze.cli.merge import merge_command
from lora_squeeze.cli.plan import plan_command
from lora_squeeze.cli.run import run_command
from lora_squeeze.cli.show import show_command
from lora_squeeze.cli.verify import verify_command
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.version import __version__

__all__ = ["main"]


class _Group(click.Group):
    """Prints the project's own errors as one line; everything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LoraSqueezeError as error:
            raise click.ClickException(str(error)) from error


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
)
@click.version_option(__version__, prog_name="lora-squeeze")
def main() -> None:
    """Find the rank a LoRA adapter really needs, and make it that small."""


for command in (
    show_command,
    analyze_command,
    plan_command,
    compress_command,
    compare_command,
    check_command,
    convert_command,
    verify_command,
    merge_command,
    run_command,
):
    main.add_command(command)
