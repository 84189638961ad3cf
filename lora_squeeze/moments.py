"""Second moments of what a LoRA's inner r-space carries on data, as a file of r×r matrices.

For each layer, over the rows x that its module was given on calibration data (padding left out):

    down = Σ (A x)(A x)^T        up = Σ (B^T g)(B^T g)^T, g the gradient of the loss at the module's output

Sums, not means, with the number of rows beside them: so files from several processes add up exactly,
and the order of batches does not matter. Without the scale: ΔW x = scale · B · (A x).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_squeeze.adapter import Adapter
from lora_squeeze.documents import parse_json
from lora_squeeze.errors import AdapterError, DataError
from lora_squeeze.formats.folder import check_output, new_file
from lora_squeeze.formats.hashing import sha256_of_file
from lora_squeeze.formats.tensors import TensorSpec, read_safetensors
from lora_squeeze.formats.writing import Block, write_safetensors
from lora_squeeze.measurements import MomentsSummary
from lora_squeeze.version import __version__

__all__ = ["LayerMoments", "Moments", "Seen", "check_moments", "merge_moments", "read_moments", "save_moments"]

ENTRY = "lora_squeeze_moments"


@dataclass(frozen=True)
class LayerMoments:
    """Sums over the rows that one layer was given.

    down
        Σ (A x)(A x)^T, (r, r) float64.
    up
        Σ (B^T g)(B^T g)^T, (r, r) float64, or None if no gradients were taken.
    rows
        how many there were; 0 for a layer that the data never reach.
    """

    down: Tensor
    up: Tensor | None
    rows: int


@dataclass(frozen=True)
class Seen:
    """Data that went into moments: what they were called, the SHA-256 of the examples, and how many there were."""

    source: str
    sha256: str
    examples: int


@dataclass(frozen=True)
class Moments:
    """The second moments of an adapter's layers on data.

    tokens
        how many positions the data have, padding left out: the common measure for all layers.
    adapter_sha256
        of the weight file of the adapter that they are of.
    identity
        the SHA-256 of the file they were read from; "" if they were not.
    """

    layers: Mapping[str, LayerMoments]
    tokens: int
    adapter_sha256: str
    base_model: str
    seen: tuple[Seen, ...]
    identity: str = ""

    @property
    def gradients(self) -> bool:
        """Whether the output side was measured, too."""
        return any(layer.up is not None for layer in self.layers.values())

    @property
    def examples(self) -> int:
        """How many examples went into them."""
        return sum(one.examples for one in self.seen)

    def summary(self, path: str) -> MomentsSummary:
        """The numbers to show."""
        return MomentsSummary(
            path=path,
            adapter_sha256=self.adapter_sha256,
            base_model=self.base_model,
            layers=len(self.layers),
            unreached=tuple(name for name, layer in self.layers.items() if not layer.rows),
            tokens=self.tokens,
            examples=self.examples,
            gradients=self.gradients,
            sources=tuple(one.source for one in self.seen),
        )

    def means(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A layer's mean moments: `down` per position of the data, `up` per row of the layer.

        Both kinds of energy are then shares of one loss: a layer that only a hundredth of the
        positions reach weighs a hundredth.
        """
        layer = self.layers[name]
        up = None if layer.up is None else layer.up / max(layer.rows, 1)
        return layer.down / max(self.tokens, 1), up


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """The moments of all the data together. Raises DataError if they do not belong together."""
    if not parts:
        raise DataError("there are no moments to merge")
    first = parts[0]
    for part in parts[1:]:
        if part.adapter_sha256 != first.adapter_sha256 or part.layers.keys() != first.layers.keys():
            raise DataError(
                f"moments of different adapters cannot be merged: {first.adapter_sha256[:12]}… and "
                f"{part.adapter_sha256[:12]}…"
            )
        if part.base_model != first.base_model:
            raise DataError(
                f"moments on different base models cannot be merged: '{first.base_model}' and '{part.base_model}'"
            )
        if part.gradients != first.gradients:
            raise DataError("some of these moments were taken with gradients and some without; take all alike")
    seen = tuple(one for part in parts for one in part.seen)
    for number, one in enumerate(seen):
        if twice := next((other for other in seen[:number] if other.sha256 == one.sha256), None):
            raise DataError(f"the same {one.examples} examples would count twice: '{twice.source}' and '{one.source}'")
    layers = {name: _added([part.layers[name] for part in parts]) for name in first.layers}
    return replace(first, layers=layers, tokens=sum(part.tokens for part in parts), seen=seen, identity="")


def check_moments(moments: Moments, adapter: Adapter) -> None:
    """Raise AdapterError if these moments are not of this adapter."""
    digest = adapter.sha256()
    if digest and moments.adapter_sha256 and digest != moments.adapter_sha256:
        raise AdapterError(
            f"{adapter.source}: the moments are of another adapter (SHA-256 {moments.adapter_sha256[:12]}…, this is "
            f"{digest[:12]}…); calibrate this one: lora-squeeze calibrate {adapter.source} --data …"
        )
    for name, spec in adapter.layers.items():
        found = moments.layers.get(name)
        if found is None or tuple(found.down.shape) != (spec.rank, spec.rank):
            what = "there are none" if found is None else f"they are {list(found.down.shape)}"
            raise AdapterError(
                f"{adapter.source}: layer '{name}' of rank {spec.rank} needs moments of its own, and {what}; calibrate "
                "this adapter"
            )


def save_moments(moments: Moments, path: Path, *, overwrite: bool = False) -> None:
    """Write moments to a .safetensors file, which appears whole or not at all. Raises OutputError."""
    check_output(path, source=None, overwrite=overwrite, single_file=True)
    stated = {
        "version": __version__,
        "adapter_sha256": moments.adapter_sha256,
        "base_model": moments.base_model,
        "tokens": moments.tokens,
        "rows": {name: layer.rows for name, layer in moments.layers.items()},
        "seen": [asdict(one) for one in moments.seen],
    }
    blocks = [block for name, layer in moments.layers.items() for block in _blocks(name, layer)]
    with new_file(path, overwrite=overwrite) as file:
        write_safetensors(file, blocks, {ENTRY: json.dumps(stated, ensure_ascii=False)})


def read_moments(path: Path) -> Moments:
    """Read what `save_moments` wrote. Raises AdapterError if it is something else, or damaged."""
    file = read_safetensors(path)
    if ENTRY not in file.metadata:
        raise AdapterError(f"{path}: holds no moments; make them with lora-squeeze calibrate")
    try:
        stated = parse_json(file.metadata[ENTRY])
        layers = {
            name: LayerMoments(
                down=file.read(f"{name}.down").double(),
                up=file.read(f"{name}.up").double() if f"{name}.up" in file.tensors else None,
                rows=_count(rows),
            )
            for name, rows in stated["rows"].items()
        }
        moments = Moments(
            layers=layers,
            tokens=_count(stated["tokens"]),
            adapter_sha256=str(stated["adapter_sha256"]),
            base_model=str(stated["base_model"]),
            seen=tuple(Seen(**one) for one in stated["seen"]),
            identity=sha256_of_file(path),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{path}: its moments are damaged: {error}") from error
    _check_sound(moments.layers, path)
    return moments


def _check_sound(layers: Mapping[str, LayerMoments], path: Path) -> None:
    for name, layer in layers.items():
        for moment in (layer.down, layer.up):
            if moment is not None and not (moment.ndim == 2 and moment.shape[0] == moment.shape[1] and _sums(moment)):
                raise AdapterError(
                    f"{path}: the moments of layer '{name}' are no square matrix of finite sums with squares on its "
                    "diagonal; calibrate again"
                )


def _sums(moment: Tensor) -> bool:
    return math.isfinite(float(moment.abs().sum())) and bool((moment.diagonal() >= 0).all())


def _count(value: Any) -> int:
    count = int(value)
    if count < 0:
        raise ValueError(f"{count} is no count")
    return count


def _added(parts: Iterable[LayerMoments]) -> LayerMoments:
    first, *rest = parts
    down, up, rows = first.down.clone(), None if first.up is None else first.up.clone(), first.rows
    for part in rest:
        if part.down.shape != down.shape:
            raise DataError(f"moments of ranks {len(down)} and {len(part.down)} cannot be merged")
        down += part.down
        if up is not None and part.up is not None:
            up += part.up
        rows += part.rows
    return LayerMoments(down, up, rows)


def _blocks(name: str, layer: LayerMoments) -> list[Block]:
    found = {"down": layer.down, **({} if layer.up is None else {"up": layer.up})}
    return [
        Block(
            (TensorSpec(f"{name}.{key}", "F64", tuple(moment.shape), moment.numel() * 8),),
            lambda moment=moment: [moment.double().contiguous()],
        )
        for key, moment in found.items()
    ]
