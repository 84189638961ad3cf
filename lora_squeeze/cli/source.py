"""Opening the adapter that a command was given, wherever it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_squeeze.cli.output import download_progress

if TYPE_CHECKING:
    from lora_squeeze import Adapter

__all__ = ["open_source"]


def open_source(path: str) -> Adapter:
    """`open_adapter`, with a bar while something is fetched."""
    from lora_squeeze import open_adapter

    with download_progress() as on_download:
        return open_adapter(path, on_download=on_download)
