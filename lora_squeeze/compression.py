"""Pass 2: an adapter and its ranks → the squeezed adapter, computed one layer at a time as it is saved."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch

from lora_squeeze.adapter import Adapter, LayerSpec, LoraLayer
from lora_squeeze.decomposition import Decomposition
from lora_squeeze.errors import RankError
from lora_squeeze.formats.tensors import DTYPES
from lora_squeeze.records import LayerError, Ranks
from lora_squeeze.spectrum import basis, relative_error, truncate
from lora_squeeze.version import __version__

__all__ = ["compress"]


def compress(
    source: Adapter | Decomposition,
    ranks: Ranks,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    on_layer: Callable[[LayerError], None] | None = None,
) -> Adapter:
    """Truncate every layer's effective update to its rank; lazily, when the result is saved.

    source
        an adapter (each layer is decomposed on the way) or its decomposition (that is used).
    ranks
        one for every layer, none above the layer's own; a layer that keeps its rank keeps its bits.
    dtype
        of the new factors, in safetensors' spelling; default: each as it was.
    on_layer
        called with each layer's error, rounding included, once it has been computed.

    All layers come out with one effective scale, the most common one of the source; where a layer
    had another, the difference goes into its factors. So a runtime that ignores rank_pattern and
    alpha_pattern still applies the right scale.
    Raises RankError if the plan does not fit the adapter.
    """
    adapter = source.adapter if isinstance(source, Decomposition) else source
    _check_plan(adapter, ranks)
    scale = _shared_scale(adapter)
    layers = {
        name: replace(
            spec,
            rank=ranks.by_layer[name],
            scale=scale,
            down_dtype=dtype or spec.down_dtype,
            up_dtype=dtype or spec.up_dtype,
        )
        for name, spec in adapter.layers.items()
    }

    def load(name: str) -> LoraLayer:
        before, after = adapter.layers[name], layers[name]
        layer = adapter.load(name)
        found = source.basis(name) if isinstance(source, Decomposition) else basis(layer, device=device)
        unchanged = before == after
        squeezed = layer if unchanged else _rounded(_rescaled(truncate(layer, found, after.rank), scale), after)
        if on_layer is not None:
            energy = float((found.singular_values * layer.scale).square().sum())
            error = 0.0 if unchanged else relative_error(layer, squeezed, energy=energy)
            on_layer(LayerError(name, before.rank, after.rank, energy, error))
        return squeezed

    sha256 = source.source_sha256 if isinstance(source, Decomposition) else ""
    return replace(
        adapter, layers=layers, load=load, metadata={**adapter.metadata, "lora_squeeze": _provenance(ranks, sha256)}
    )


def _check_plan(adapter: Adapter, ranks: Ranks) -> None:
    unknown = [name for name in ranks.by_layer if name not in adapter.layers]
    missing = [name for name in adapter.layers if name not in ranks.by_layer]
    if unknown or missing:
        first = f"'{unknown[0]}' is not in it" if unknown else f"'{missing[0]}' has no rank"
        raise RankError(f"these ranks are not for {adapter.source}: layer {first}; make a plan for this adapter")
    for name, rank in ranks.by_layer.items():
        if not 1 <= rank <= adapter.layers[name].rank:
            raise RankError(f"layer '{name}': rank {rank} is not between 1 and its own rank {adapter.layers[name].rank}")


def _shared_scale(adapter: Adapter) -> float:
    scales = Counter(spec.scale for spec in adapter.layers.values() if spec.scale != 0)
    return scales.most_common(1)[0][0] if scales else 0.0


def _rescaled(layer: LoraLayer, scale: float) -> LoraLayer:
    """The same update under another scale; both factors take half of the difference."""
    if layer.scale == scale:
        return layer
    ratio = layer.scale / scale
    half = abs(ratio) ** 0.5
    return LoraLayer(layer.name, layer.down * half, layer.up * (half if ratio >= 0 else -half), scale)


def _rounded(layer: LoraLayer, spec: LayerSpec) -> LoraLayer:
    """Round once, to the dtype that will be stored."""
    down = layer.down.to("cpu", DTYPES[spec.down_dtype])
    up = layer.up.to("cpu", DTYPES[spec.up_dtype])
    for name, factor, dtype in (("lora_A", down, spec.down_dtype), ("lora_B", up, spec.up_dtype)):
        if not bool(torch.isfinite(factor).all()):
            raise RankError(f"layer '{spec.name}': {name} overflows {dtype}; choose a wider dtype, as --dtype bf16")
    return LoraLayer(layer.name, down, up, layer.scale)


def _provenance(ranks: Ranks, sha256: str) -> str:
    chosen = set(ranks.by_layer.values())
    return json.dumps(
        {
            "version": __version__,
            "source_sha256": sha256,
            "policy": ranks.policy,
            "ranks": chosen.pop() if len(chosen) == 1 else ranks.by_layer,
        },
        sort_keys=True,
        ensure_ascii=False,
    )
