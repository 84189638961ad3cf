"""What a file says of its own making: the metadata entry `lora_squeeze` in its header.

Paths, times and names of machines are no part of it: the same input gives the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_squeeze.adapter import Adapter, LayerSpec
from lora_squeeze.documents import parse_json
from lora_squeeze.errors import AdapterError
from lora_squeeze.version import __version__

__all__ = ["ENTRY", "Provenance", "provenance_of", "restated", "stated"]

ENTRY = "lora_squeeze"

_NO_HASH = "0" * 64


@dataclass(frozen=True)
class Provenance:
    """Where a squeezed adapter comes from, what was done and what it consists of.

    policy
        how the ranks were chosen; "convert to FORMAT" for a converted adapter.
    ranks, scales
        one number, or layer → number where they differ. A layer of rank 0 was left out.
    source_sha256, tensors_sha256
        of the source's weight file, and of the tensors beside this (their `fingerprint`); 64 zeros as
        long as they are not known.
    relative_error
        ‖ΔW − ΔW'‖ / ‖ΔW‖ over all layers, rounding included; NaN if it was not measured.
    source
        the address it was fetched from, with its revision; "" if the source lay on a disk.
    ancestors
        `source_sha256` of the source's own provenance, and of its source's, if they were made so, too.
    fitted
        DoRA's magnitudes were fitted to the squeezed directions; otherwise they are the source's.
    """

    policy: str
    ranks: int | Mapping[str, int]
    scales: float | Mapping[str, float]
    source_sha256: str = _NO_HASH
    tensors_sha256: str = _NO_HASH
    relative_error: float = 0.0
    ancestors: tuple[str, ...] = ()
    source: str = ""
    fitted: bool = False
    version: str = __version__

    def to_json(self) -> str:
        """One line, whose length depends on no hash and no error."""
        return json.dumps(
            {
                "ancestors": list(self.ancestors),
                "policy": self.policy,
                "ranks": _common(self.ranks),
                "relative_error": _fixed_width(self.relative_error),
                "scales": _common(self.scales),
                **({"source": self.source} if self.source else {}),
                **({"fitted": True} if self.fitted else {}),
                "source_sha256": self.source_sha256 or _NO_HASH,
                "tensors_sha256": self.tensors_sha256,
                "version": self.version,
            },
            sort_keys=True,
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """Read what `to_json` wrote. Raises ValueError if it is something else."""
        try:
            fields: dict[str, Any] = parse_json(text)
            error = fields["relative_error"]
            found = cls(
                policy=str(fields["policy"]),
                ranks=_numbers(fields["ranks"], int),
                scales=_numbers(fields["scales"], float),
                source_sha256=_hash(fields["source_sha256"]),
                tensors_sha256=_hash(fields["tensors_sha256"]),
                relative_error=math.nan if error == "not measured" else float(error),
                ancestors=tuple(_hash(one) for one in fields["ancestors"]),
                source=str(fields.get("source", "")),
                fitted=bool(fields.get("fitted", False)),
                version=str(fields["version"]),
            )
        except KeyError as error:
            raise ValueError(f"{error} is missing") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error)) from error
        return found


def provenance_of(adapter: Adapter) -> Provenance | None:
    """What the adapter's file says of its making; None if it says nothing. Raises AdapterError if it is damaged."""
    text = adapter.metadata.get(ENTRY)
    if text is None:
        return None
    try:
        return Provenance.from_json(text)
    except ValueError as error:
        raise AdapterError(f"{adapter.source}: '{ENTRY}' in the header is damaged: {error}") from error


def stated(
    adapter: Adapter, policy: str, *, ranks: Mapping[str, int], layers: Mapping[str, LayerSpec], relative_error: float
) -> Provenance:
    """The provenance of what is made of this adapter, but for the hashes.

    ranks
        layer → rank of all of the source's layers; layers: those that are written.

    Where the adapter is itself being made and lies in no file, its source is the source, and what
    has been done to it is named first.
    """
    try:
        before = provenance_of(adapter)
    except AdapterError:  # written by another version, or by hand: it is replaced
        before = None
    made = Provenance(
        policy=policy,
        ranks=dict(ranks),
        scales={name: spec.scale for name, spec in layers.items()},
        relative_error=relative_error,
        source=adapter.origin,
    )
    if before is None:
        return made
    if adapter.late_metadata is None:
        return replace(made, ancestors=(before.source_sha256, *before.ancestors))
    # The error is relative to what lies in no file: nobody could measure it again.
    policy = f"{before.policy}; {policy}"
    return replace(made, policy=policy, ancestors=before.ancestors, fitted=before.fitted, relative_error=math.nan)


def restated(adapter: Adapter, change: Callable[[Provenance], Provenance]) -> Adapter:
    """An adapter that is being made, with another provenance, now and once it has been written."""
    late = adapter.late_metadata
    assert late is not None, "only what is being made can still say how"

    def changed(entries: Mapping[str, str]) -> dict[str, str]:
        return {**entries, ENTRY: change(Provenance.from_json(entries[ENTRY])).to_json()}

    def late_and_changed(fingerprint: str) -> dict[str, str]:
        return changed(late(fingerprint))

    return replace(adapter, metadata=changed(adapter.metadata), late_metadata=late_and_changed)


def _common(values: Any) -> Any:
    """The one value that all have, or what was given."""
    if not isinstance(values, Mapping):
        return values
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else dict(values)


def _fixed_width(error: float) -> str:
    """Twelve characters; an error below 1e-30 is none."""
    return "not measured" if math.isnan(error) else f"{error if error > 1e-30 else 0:.6e}"


def _numbers(value: Any, kind: type[Any]) -> Any:
    if isinstance(value, dict):
        return {str(name): _numbers(one, kind) for name, one in value.items()}
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a number")
    return kind(value)


def _hash(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 64:
        raise TypeError(f"{value!r} is not a SHA-256")
    return value
