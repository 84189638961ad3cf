"""How two adapters of one model compare, layer by layer: records of numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass

from lora_squeeze.records import Spectrum

__all__ = ["LayerLikeness", "Likeness"]


@dataclass(frozen=True)
class LayerLikeness:
    """One layer of both adapters.

    overlap_rank
        how many leading directions are compared.
    overlap_out, overlap_in
        ‖U_A^T U_B‖_F² / k and ‖V_A^T V_B‖_F² / k of the first k = overlap_rank left and right
        singular vectors, between 0 and 1: the subspace similarity of LoRA (arXiv 2106.09685, 7.2).
    chance_out, chance_in
        what random directions would have: k / out_features and k / in_features.
    inner
        ⟨ΔA, ΔB⟩ = Σ of the products of the updates' numbers.
    """

    a: Spectrum
    b: Spectrum
    overlap_rank: int
    overlap_out: float
    overlap_in: float
    chance_out: float
    chance_in: float
    inner: float

    @property
    def name(self) -> str:
        """Of the layer, the same in both."""
        return self.a.name

    @property
    def cosine(self) -> float:
        """⟨ΔA, ΔB⟩ / (‖ΔA‖ ‖ΔB‖); 0.0 if one of them does nothing."""
        return _cosine(self.inner, self.a.energy, self.b.energy)

    @property
    def distance(self) -> float:
        """‖ΔB − ΔA‖ / ‖ΔA‖; infinite if only A does nothing."""
        return _distance(self.inner, self.a.energy, self.b.energy)


@dataclass(frozen=True)
class Likeness:
    """Two adapters: the layers that both adapt, and the names of those that only one does.

    A layer that one does not adapt has an update of zero there, and so adds nothing to ⟨ΔA, ΔB⟩.

    energy_only_a, energy_only_b
        ‖ΔA‖² over the layers that only A adapts, and ‖ΔB‖² over those that only B does.
    """

    source_a: str
    source_b: str
    layers: tuple[LayerLikeness, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    energy_only_a: float
    energy_only_b: float
    parameters_a: int
    parameters_b: int

    @property
    def energy_a(self) -> float:
        """‖ΔA‖² over all of A's layers."""
        return sum(one.a.energy for one in self.layers) + self.energy_only_a

    @property
    def energy_b(self) -> float:
        """‖ΔB‖² over all of B's layers."""
        return sum(one.b.energy for one in self.layers) + self.energy_only_b

    @property
    def cosine(self) -> float:
        """Of both updates as one vector each, over the layers of either."""
        return _cosine(sum(one.inner for one in self.layers), self.energy_a, self.energy_b)

    @property
    def distance(self) -> float:
        """‖ΔB − ΔA‖ / ‖ΔA‖ over the layers of either."""
        return _distance(sum(one.inner for one in self.layers), self.energy_a, self.energy_b)

    def to_json(self) -> str:
        """All fields, and those derived from them."""
        layers = [
            {**dataclasses.asdict(one), "name": one.name, "cosine": one.cosine, "distance": one.distance}
            for one in self.layers
        ]
        derived = {name: getattr(self, name) for name in ("energy_a", "energy_b", "cosine", "distance")}
        fields = {**dataclasses.asdict(self), "layers": layers, **derived}
        return json.dumps({"record": "Likeness", **_finite(fields)}, indent=1, ensure_ascii=False)


def _cosine(inner: float, energy_a: float, energy_b: float) -> float:
    size = math.sqrt(energy_a) * math.sqrt(energy_b)
    return max(-1.0, min(1.0, inner / size)) if size > 0 else 0.0


def _distance(inner: float, energy_a: float, energy_b: float) -> float:
    between = math.sqrt(max(0.0, energy_a + energy_b - 2 * inner))
    return between / math.sqrt(energy_a) if energy_a > 0 else math.inf if energy_b > 0 else 0.0


def _finite(value: object) -> dict[str, object]:
    """Infinity has no spelling in JSON: null."""
    return json.loads(json.dumps(value), parse_constant=lambda _name: None)
