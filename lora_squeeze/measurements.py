"""Records of what was measured on data: frozen, JSON out, no tensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lora_squeeze.documents import parse_json
from lora_squeeze.errors import RankError
from lora_squeeze.records import Compression, Outcome

__all__ = [
    "CRITERIA",
    "Curve",
    "CurvePoint",
    "Estimate",
    "Evaluated",
    "Evaluation",
    "KeepStep",
    "Kept",
    "MomentsSummary",
    "evaluations_to_json",
]


CRITERIA = ("loss", "accuracy", "agreement")  # what can be kept


@dataclass(frozen=True)
class Estimate:
    """A measured number with the middle 95 % of its bootstrap draws, and its difference to the original's.

    low, high
        None where there is no interval, as of a single example.
    verdict
        "better", "worse", "within noise" or "same", of the difference, or "too few examples"; "" where there is none.
    """

    value: float
    low: float | None
    high: float | None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Evaluated:
    """What one adapter scored. metrics: name → number; rank and parameters are 0 for the model without any."""

    adapter: str
    rank: int
    parameters: int
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class Evaluation:
    """What adapters do to their model on data; the first is the one that the others are compared with.

    data
        what the examples were read from, or the name of an lm-eval task.
    tokens
        how many counted in the loss; 0 where that is not known.
    """

    base: str
    data: str
    examples: int
    tokens: int
    adapters: tuple[Evaluated, ...]
    notes: tuple[str, ...] = ()

    @property
    def original(self) -> Evaluated:
        """The first adapter."""
        return self.adapters[0]

    def to_json(self) -> str:
        """All fields."""
        return _to_json(self)


@dataclass(frozen=True)
class MomentsSummary:
    """What a file of moments holds: how many tokens of which data, seen by how many layers of which adapter.

    unreached
        layers that the data never got to.
    """

    path: str
    adapter_sha256: str
    base_model: str
    layers: int
    unreached: tuple[str, ...]
    tokens: int
    examples: int
    gradients: bool
    sources: tuple[str, ...]

    def to_json(self) -> str:
        """All fields."""
        return _to_json(self)


@dataclass(frozen=True)
class KeepStep:
    """One adapter on the way to the smallest that is good enough.

    value
        of the metric; confidence: the share of bootstrap draws in which it passes.
    """

    policy: str
    parameters: int
    value: float
    passes: bool
    confidence: float


@dataclass(frozen=True)
class Kept:
    """The smallest adapter that was found good enough, and the path that led to it.

    metric, keep, confident
        the criterion; original, limit: what the original scores, and what may just be reached.
    steps
        in the order in which they were measured; the last is the adapter as it was written.
    """

    metric: str
    keep: float
    confident: bool
    original: float
    limit: float
    examples: int
    steps: tuple[KeepStep, ...]
    compression: Compression

    @property
    def confirmed(self) -> KeepStep:
        """The last measurement: of what was written."""
        return self.steps[-1]

    def to_json(self) -> str:
        """All fields."""
        return _to_json(self)


@dataclass(frozen=True)
class CurvePoint:
    """What one policy keeps of the quality at one size.

    label
        in which metric it was truncated; "" for that of the weights.
    """

    policy: str
    label: str
    outcome: Outcome
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class Curve:
    """Quality against size: points of several policies, and the original.

    adapter_sha256
        of the original's weight file; "" in what earlier versions measured.
    """

    base: str
    data: str
    examples: int
    original: Evaluated
    points: tuple[CurvePoint, ...]
    adapter_sha256: str = ""

    def to_json(self) -> str:
        """All fields; `from_json` reads them back."""
        return _to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Curve:
        """Read what `to_json` wrote. Raises RankError if the text is something else."""
        try:
            fields = parse_json(text)
            if not isinstance(fields, dict) or fields.pop("record", None) != "Curve":
                raise RankError('not a Curve record: the field "record": "Curve" is missing')
            own: dict[str, Any] = {**fields["original"], "metrics": _estimates(fields["original"]["metrics"])}
            original = Evaluated(**own)
            points = [
                CurvePoint(
                    policy=str(point["policy"]),
                    label=str(point["label"]),
                    outcome=Outcome(**point["outcome"]),
                    metrics=_estimates(point["metrics"]),
                )
                for point in fields["points"]
            ]
            if any(point.metrics.keys() != original.metrics.keys() for point in points):
                raise ValueError("its points have not the metrics of the original")
            return cls(
                base=str(fields["base"]),
                data=str(fields["data"]),
                examples=int(fields["examples"]),
                original=original,
                points=tuple(points),
                adapter_sha256=str(fields.get("adapter_sha256", "")),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RankError(f"the curve is damaged: {error!r}") from error


def evaluations_to_json(evaluations: Iterable[Evaluation]) -> str:
    """A JSON list of these records."""
    return json.dumps([dataclasses.asdict(one) for one in evaluations], indent=1, ensure_ascii=False)


def _estimates(fields: dict[str, Any]) -> dict[str, Estimate]:
    return {name: Estimate(**estimate) for name, estimate in fields.items()}


def _to_json(record: Any) -> str:
    fields = {"record": type(record).__name__, **dataclasses.asdict(record)}
    return json.dumps(fields, indent=1, ensure_ascii=False)
