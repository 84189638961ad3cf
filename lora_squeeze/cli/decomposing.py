"""Pass 1 behind a progress bar, in the metric of the weights or of data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_squeeze.cli.output import progress

if TYPE_CHECKING:
    from lora_squeeze import Adapter, Decomposition

__all__ = ["decomposed"]


def decomposed(adapter: Adapter, *, method: str, device: str, calibration: Path | None = None) -> Decomposition:
    """Decompose every layer; `calibration` is a file of moments from lora-squeeze calibrate."""
    from lora_squeeze import decompose
    from lora_squeeze.moments import read_moments

    moments = read_moments(calibration) if calibration else None
    with progress("Analyzing", len(adapter.layers)) as advance:
        return decompose(adapter, method=method, device=device, moments=moments, on_layer=advance)
