"""lora-squeeze convert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_squeeze.cli.options import PLACE_AS_TEXT
from lora_squeeze.cli.output import printable
from lora_squeeze.cli.source import open_source

if TYPE_CHECKING:
    from lora_squeeze import Adapter

__all__ = ["convert_command"]


@click.command("convert", short_help="The same update as a kohya, diffusers or PEFT adapter.")
@click.argument("path")
@click.argument("output", type=PLACE_AS_TEXT)
@click.option("--to", required=True, type=click.Choice(("kohya", "diffusers", "peft")), help="The format of OUTPUT.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT if it exists.")
def convert_command(path: str, output: str, to: str, overwrite: bool) -> None:
    """Write the adapter at PATH to OUTPUT in another format: the same update under other names.

    To the format that it has, only what its own tools would stumble over, or what is fetched.
    kohya and diffusers adapters are .safetensors files, PEFT adapters are folders.
    """
    from lora_squeeze.formats import check_output_of, save_adapter
    from lora_squeeze.sizes import bytes_text

    adapter = _converted(open_source(path), to)
    check_output_of(adapter, Path(output), overwrite=overwrite)
    written = save_adapter(adapter, output, overwrite=overwrite)
    click.echo(f"{written.weights}: {len(adapter.layers)} layers as {to}, {bytes_text(written.nbytes)}")
    for note in adapter.notes:
        click.echo(printable(f"Note: {note}"))


def _converted(adapter: Adapter, to: str) -> Adapter:
    from lora_squeeze.conversion import convert, rewritten

    converted = convert(adapter, to)
    if converted is not adapter:
        return converted
    if not adapter.deviations and not adapter.origin:
        raise click.UsageError(
            f"{adapter.source} is a {to} adapter already, and nothing in it has to be put right: there is nothing to "
            "convert; copy it"
        )
    return rewritten(adapter)
