"""DoRA's magnitudes: which tensors they are in each format, and what squeezing does to them."""

from __future__ import annotations

import re

from lora_squeeze.adapter import Adapter, PassThrough
from lora_squeeze.peft_names import PREFIX

__all__ = ["FITTED_NOTE", "KEPT_NOTE", "dora_note", "magnitude_module", "magnitudes_of"]

KEPT_NOTE = (
    "DoRA: an approximation: the low-rank direction is squeezed and the magnitudes are kept, while the norm that they "
    "are divided by, ‖W + ΔW‖ of each output, changes with the truncated ΔW; the error reported is that of ΔW, not of "
    "the normalised weight. With the base model's weights (--base) the magnitudes are fitted and the weight's own "
    "error is reported"
)
FITTED_NOTE = "DoRA: the low-rank direction is squeezed, and the magnitudes are fitted to it with the base weights"

_MAGNITUDE = re.compile(r"(?P<module>.+)\.(lora_magnitude_vector(\.weight)?|dora_scale)")


def magnitude_module(key: str) -> str:
    """The module whose magnitudes are stored under this key; "" if it is another tensor."""
    match = _MAGNITUDE.fullmatch(key)
    return match["module"] if match else ""


def magnitudes_of(adapter: Adapter) -> dict[str, PassThrough]:
    """Layer → the tensor of its magnitudes, for the layers that have them."""
    modules = {magnitude_module(tensor.key): tensor for tensor in adapter.pass_through}
    found = {name: modules.get(name) or modules.get(f"{PREFIX}{name}") for name in adapter.layers}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def dora_note(keys: list[str]) -> tuple[str, ...]:
    """What to say of a file that has these tensors beside its pairs."""
    return (KEPT_NOTE,) if any(map(magnitude_module, keys)) else ()
