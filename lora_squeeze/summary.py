"""What an adapter is, from its header alone: no factor is read."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lora_squeeze.adapter import Adapter

__all__ = ["Summary", "base_model_of", "show"]


@dataclass(frozen=True)
class Summary:
    """Format, size and make-up of an adapter.

    layers, ranks, scales, dtypes
        kind, rank, effective scale or dtype → how many layers have it.
    passes_through
        tensors that are no factors of a LoRA pair and are kept as they are, with their shapes.
    """

    source: str
    format: str
    base_model: str
    layers: dict[str, int]
    ranks: dict[int, int]
    scales: dict[float, int]
    dtypes: dict[str, int]
    parameters: int
    nbytes: int
    passes_through: dict[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """All fields."""
        return json.dumps({"record": "Summary", **dataclasses.asdict(self)}, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Summary:
        """Read what `to_json` wrote. Raises ValueError or TypeError if the text is something else."""
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.pop("record", None) != "Summary":
            raise ValueError("not a Summary record")
        found = cls(**fields)
        return dataclasses.replace(
            found,
            ranks={int(rank): count for rank, count in found.ranks.items()},
            scales={float(scale): count for scale, count in found.scales.items()},
            passes_through={key: tuple(shape) for key, shape in found.passes_through.items()},
            notes=tuple(found.notes),
        )


def show(adapter: Adapter) -> Summary:
    """Say what an adapter is: format, base model, layers by kind, ranks, scales, dtypes, bytes."""
    specs = adapter.layers.values()
    return Summary(
        source=adapter.source,
        format=adapter.format,
        base_model=base_model_of(adapter),
        layers=_counts(_kind(spec.kind, spec.kernel) for spec in specs),
        ranks=dict(sorted(Counter(spec.rank for spec in specs).items())),
        scales=dict(sorted(Counter(float(f"{spec.scale:.6g}") for spec in specs).items())),
        dtypes=_counts("/".join(dict.fromkeys((spec.down_dtype, spec.up_dtype))) for spec in specs),
        parameters=adapter.parameters,
        nbytes=adapter.weights.stat().st_size if adapter.weights else 0,
        passes_through={tensor.key: tensor.shape for tensor in adapter.pass_through},
        notes=adapter.notes,
    )


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _kind(kind: str, kernel: tuple[int, ...]) -> str:
    return f"{kind} {'×'.join(map(str, kernel))}" if kernel else kind


def base_model_of(adapter: Adapter) -> str:
    """What an adapter calls its base model; "" if it says nothing."""
    named = adapter.config.get("base_model_name_or_path")
    own = [value for key, value in adapter.config.items() if key.endswith(".base_model_name_or_path")]
    from_metadata = (
        adapter.metadata.get(key) for key in ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
    )
    words = [str(word) for word in (named, *own, *from_metadata) if word and word != "None"]
    return ", ".join(dict.fromkeys(words))
