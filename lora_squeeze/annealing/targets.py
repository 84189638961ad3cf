"""Which rank each layer gets at a stage: one for all, or a policy's choice under the stage's budget.

A stage of rank k allows as many parameters as rank k in every layer would have: Σ k · (out + in). Pure
functions of numbers, no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from lora_squeeze.adapter import LayerSpec
from lora_squeeze.errors import RankError
from lora_squeeze.limits import Limits
from lora_squeeze.policies import fixed, params, parse_policy
from lora_squeeze.records import Ranks, Spectrum

__all__ = ["Targets", "parse_targets", "within"]

# (spectra, the stage's rank) → ranks
Targets = Callable[[Sequence[Spectrum], int], Ranks]

_LIVE = Limits(min_rank=1)  # a module of a model in training cannot be left out


def parse_targets(policy: str) -> Targets:
    """Read "uniform", "params" (the most energy within the stage's budget) or any policy's spelling.

    Any other policy chooses freely, and what it chooses beyond the stage's budget is cut to it, by
    energy per parameter. Raises RankError for what is no policy, or cannot choose during training.
    """
    if policy == "uniform":
        return lambda spectra, rank: fixed(spectra, rank, limits=_LIVE)
    if policy == "params":
        return lambda spectra, rank: params(spectra, _budget(spectra, rank), limits=_LIVE)
    chosen = parse_policy(policy)
    if chosen.name in ("size", "fixed"):
        raise RankError(
            f"policy '{policy}' says nothing at a switch: the schedule's ranks are the budget; use 'params'"
        )

    def targets(spectra: Sequence[Spectrum], rank: int) -> Ranks:
        wanted = chosen.choose(spectra, limits=_LIVE).by_layer
        cut = [
            replace(one, rank=wanted[one.name], singular_values=one.singular_values[: wanted[one.name]])
            for one in spectra
        ]
        ranks = params(cut, max(_budget(spectra, rank), 2), limits=_LIVE)
        return replace(ranks, policy=policy)

    return targets


def within(layers: Iterable[LayerSpec], rank: int, *, uniform: bool) -> bool:
    """Whether an adapter already is what a stage of this rank asks for, or less."""
    layers = list(layers)
    if uniform:
        return all(layer.rank <= rank for layer in layers)
    size = [layer.out_features + layer.in_features for layer in layers]
    return sum(layer.parameters for layer in layers) <= rank * sum(size)


def _budget(spectra: Sequence[Spectrum], rank: int) -> int:
    return rank * sum(spectrum.component_size for spectrum in spectra)
