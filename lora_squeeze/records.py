"""The numbers that flow between the stations: frozen records, JSON in and out, no tensors.

Energies are squared singular values of the *effective* update ΔW = scale · B · A. Retained
variance at rank k is V(k) = Σ_{i≤k} σ_i² / Σ σ_i² (LoRA-Squeeze, arXiv 2602.10993, appendix F),
a fraction between 0 and 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from lora_squeeze.documents import parse_json
from lora_squeeze.errors import RankError

__all__ = [
    "Analysis",
    "Check",
    "Compression",
    "DoraErrors",
    "LayerVariance",
    "Outcome",
    "Ranks",
    "Spectrum",
    "SqueezedLayer",
    "Verdict",
    "Verification",
    "error_over_all",
    "outcomes_to_json",
]

_BY_HAND = "edited by hand"
_DIGEST = "by_layer_sha256"


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one layer's effective update, largest first.

    `rank` is that of the stored factors; there are min(rank, out_features, in_features) values.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    singular_values: tuple[float, ...]

    @cached_property
    def cumulative_energy(self) -> tuple[float, ...]:
        """Σ_{i≤k} σ_i² for k = 0, 1, …, len(singular_values)."""
        return tuple(accumulate((value * value for value in self.singular_values), initial=0.0))

    @property
    def energy(self) -> float:
        """‖ΔW‖_F² = Σ σ_i²; exactly 0.0 for a layer that does nothing."""
        return self.cumulative_energy[-1]

    @cached_property
    def effective_rank(self) -> float:
        """exp(H(p)), p = σ/Σσ, H the entropy (Roy & Vetterli, 2007); 0.0 for a layer that does nothing."""
        total = sum(self.singular_values)
        if not total > 0:
            return 0.0
        shares = [value / total for value in self.singular_values if value > 0]
        return math.exp(-sum(share * math.log(share) for share in shares))

    @property
    def component_size(self) -> int:
        """The parameters that one rank-1 component costs: out_features + in_features."""
        return self.out_features + self.in_features

    def retained_energy(self, rank: int) -> float:
        """Σ_{i≤rank} σ_i²; ranks beyond the last singular value retain everything."""
        return self.cumulative_energy[min(max(rank, 0), len(self.singular_values))]

    def retained_variance(self, rank: int) -> float:
        """V(rank) in [0, 1]. A layer that is exactly zero loses nothing: 1.0."""
        return self.retained_energy(rank) / self.energy if self.energy > 0 else 1.0


@dataclass(frozen=True)
class LayerVariance:
    """One row of the per-layer table: what each candidate rank retains in this layer."""

    name: str
    source_rank: int
    singular_values: tuple[float, ...]
    variance_at_rank: dict[int, float]


@dataclass(frozen=True)
class Analysis:
    """What each candidate rank would retain of an adapter, and the rank that is recommended.

    mean_variance, min_variance, max_variance
        rank → V(rank) over the layers that are not exactly zero.
    energy_variance
        rank → Σ_layers Σ_{i≤rank} σ² / Σ_layers Σ σ²: each layer weighs what it contributes.
    by
        "mean" or "worst": which of the curves has to reach `min_variance_retention`.
    """

    source: str
    source_rank: int
    target_ranks: tuple[int, ...]
    min_variance_retention: float
    by: str
    recommended_rank: int
    mean_variance: dict[int, float]
    min_variance: dict[int, float]
    max_variance: dict[int, float]
    energy_variance: dict[int, float]
    spectra: tuple[Spectrum, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def layers(self) -> tuple[LayerVariance, ...]:
        """One entry per layer, in file order."""
        return tuple(
            LayerVariance(
                name=spectrum.name,
                source_rank=spectrum.rank,
                singular_values=spectrum.singular_values,
                variance_at_rank={rank: spectrum.retained_variance(rank) for rank in self.target_ranks},
            )
            for spectrum in self.spectra
        )

    def to_json(self) -> str:
        """All fields; `from_json` reads them back."""
        return _to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Analysis:
        """Read what `to_json` wrote. Raises RankError if the text is something else."""
        fields = _from_json(text, "Analysis")
        try:
            for curve in ("mean_variance", "min_variance", "max_variance", "energy_variance"):
                fields[curve] = {int(rank): float(value) for rank, value in fields[curve].items()}
            fields["spectra"] = tuple(_spectrum(one) for one in fields["spectra"])
            for name, kind in (("source_rank", int), ("recommended_rank", int), ("source", str), ("by", str)):
                _check_type(fields[name], kind, name)
            fields["target_ranks"] = tuple(_check_type(rank, int, "target_ranks") for rank in fields["target_ranks"])
            fields["notes"] = tuple(fields["notes"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RankError(f"the analysis is damaged: {error}") from error


@dataclass(frozen=True)
class Ranks:
    """A plan: layer name → rank, and the policy that chose it. Print it, edit it, apply it."""

    policy: str
    by_layer: dict[str, int]

    @property
    def largest(self) -> int:
        """The largest rank of any layer."""
        return max(self.by_layer.values(), default=0)

    def to_json(self) -> str:
        """All fields, and a digest of the ranks; `from_json` reads them back."""
        return _to_json(self, **{_DIGEST: _digest(self.by_layer)})

    @classmethod
    def from_json(cls, text: str) -> Ranks:
        """Read what `to_json` wrote. Raises RankError if the text is something else.

        Where the ranks are no more those of the digest, the policy says that they were edited by hand.
        """
        fields = _from_json(text, "Ranks")
        by_layer = fields.get("by_layer")
        if not isinstance(by_layer, dict) or not all(type(rank) is int for rank in by_layer.values()):
            raise RankError("'by_layer' must map layer names to whole numbers")
        policy = str(fields.get("policy", _BY_HAND))
        # Plans without a digest are older, or from a report's page: nobody can tell.
        edited = fields.get(_DIGEST) is not None and fields[_DIGEST] != _digest(by_layer)
        return cls(policy=f"{policy}, {_BY_HAND}" if edited and _BY_HAND not in policy else policy, by_layer=by_layer)


@dataclass(frozen=True)
class SqueezedLayer:
    """What was lost in one layer: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F, the rounding to the written dtype included."""

    spectrum: Spectrum
    rank: int
    relative_error: float


@dataclass(frozen=True)
class DoraErrors:
    """What squeezing did to the weights of DoRA's layers: ‖D − D'‖_F / ‖D − W‖_F over all of them.

    D and D' are the adapted weights before and after, W the base weights.
    relative_error
        with the magnitudes fitted, as they were written.
    relative_error_if_kept
        what keeping the source's magnitudes would have left.
    """

    layers: int
    relative_error: float
    relative_error_if_kept: float


@dataclass(frozen=True)
class Compression:
    """What a compression wrote and what it cost. Sizes are bytes of the adapter's weight file.

    dora
        for a DoRA adapter whose base weights were given.
    """

    source: str
    output: str
    policy: str
    layers: tuple[SqueezedLayer, ...]
    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int
    notes: tuple[str, ...] = ()
    dora: DoraErrors | None = None

    @property
    def spectra(self) -> tuple[Spectrum, ...]:
        """Of the source, before it was squeezed."""
        return tuple(layer.spectrum for layer in self.layers)

    @cached_property
    def relative_error(self) -> float:
        """‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all layers together."""
        return error_over_all(self.layers)

    @property
    def retained_variance(self) -> float:
        """1 − relative_error²: the share of Σσ² over all layers that is still there."""
        return 1.0 - self.relative_error**2

    @property
    def worst_layer(self) -> SqueezedLayer:
        """The layer with the largest relative error."""
        return max(self.layers, key=lambda layer: layer.relative_error)

    @property
    def rank(self) -> int:
        """The largest rank that was written."""
        return max(layer.rank for layer in self.layers)

    def to_json(self) -> str:
        """All fields, and the two that are derived from them."""
        return _to_json(self, relative_error=self.relative_error, retained_variance=self.retained_variance)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, whether it is as it should be, and what was found."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Verification:
    """Whether a file is what it says it is.

    loss
        measured anew from both files, if the source was given: the error that this file's update has.
    """

    output: str
    source: str
    checks: tuple[Check, ...]
    loss: Compression | None = None

    @property
    def passed(self) -> bool:
        """Whether all checks have passed."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> str:
        """All fields, and what is derived from them."""
        loss = self.loss
        figures = {"relative_error": loss.relative_error, "retained_variance": loss.retained_variance} if loss else {}
        return _to_json(self, passed=self.passed, **figures)


@dataclass(frozen=True)
class Outcome:
    """What a plan of ranks keeps and costs, known before anything is computed.

    fraction
        of the source's parameters that was allowed, if there was such a budget.
    energy_kept
        Σσ² kept over all layers, a fraction; worst_layer: the smallest V(k) of any layer.
    file_bytes
        of the weight file, header included.
    """

    policy: str
    fraction: float | None
    parameters: int
    source_parameters: int
    energy_kept: float
    worst_layer: float
    largest_rank: int
    layers_left_out: int
    file_bytes: int


def error_over_all(layers: Iterable[SqueezedLayer]) -> float:
    """‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all layers together."""
    layers = tuple(layers)
    energy = sum(layer.spectrum.energy for layer in layers)
    lost = sum(layer.spectrum.energy * layer.relative_error**2 for layer in layers)
    return (lost / energy) ** 0.5 if energy > 0 else 0.0


@dataclass(frozen=True)
class Verdict:
    """Whether a runtime would load what a plan of ranks makes, and what that takes.

    loads
        "as it is"; "fitted": with `needs`; "no": see `reasons`.
    needs
        what has to be said to lora-squeeze or to the server, as "--for sglang".
    padded_to
        the rank that all layers have in that runtime's file; 0 if they keep their own. Padding with
        zeros makes the file as large as that rank for all layers would.
    """

    runtime: str
    loads: str
    needs: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    padded_to: int = 0


def outcomes_to_json(outcomes: Iterable[Outcome]) -> str:
    """A JSON list of these records."""
    return json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1, ensure_ascii=False)


def _spectrum(fields: dict[str, Any]) -> Spectrum:
    for name, kind in (("name", str), ("out_features", int), ("in_features", int), ("rank", int)):
        _check_type(fields[name], kind, name)
    values = _check_type(fields["singular_values"], list, "singular_values")
    fields["singular_values"] = tuple(_check_type(value, float, "singular_values") for value in values)
    return Spectrum(**fields)


def _check_type(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:
        raise TypeError(f"'{name}' holds {value!r}")
    return value


def _digest(by_layer: Mapping[str, int]) -> str:
    """The same for the same ranks, however the file is laid out."""
    return hashlib.sha256(json.dumps(by_layer, sort_keys=True).encode()).hexdigest()


def _to_json(record: Any, **derived: Any) -> str:
    fields: Mapping[str, Any] = {"record": type(record).__name__, **dataclasses.asdict(record), **derived}
    return json.dumps(fields, indent=1, ensure_ascii=False)


def _from_json(text: str, kind: str) -> dict[str, Any]:
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise RankError(f"not valid JSON: {error}") from error
    if not isinstance(fields, dict) or fields.pop("record", None) != kind:
        raise RankError(f'not a {kind} record: the field "record": "{kind}" is missing')
    return fields
