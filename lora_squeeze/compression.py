"""Pass 2: an adapter and its ranks → the squeezed adapter, computed one layer at a time as it is saved."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from lora_squeeze.adapter import Adapter, LayerSpec, LoraLayer, whole
from lora_squeeze.decomposition import Decomposition, borrow_together, naming, spectrum_of, together
from lora_squeeze.errors import RankError, SettingsError
from lora_squeeze.formats import weights_size
from lora_squeeze.formats.tensors import DTYPES, dtype_spelling
from lora_squeeze.peft_names import BIAS, PREFIX
from lora_squeeze.policies import Cost
from lora_squeeze.provenance import ENTRY, stated
from lora_squeeze.records import Ranks, SqueezedLayer, error_over_all
from lora_squeeze.rewriting import scale_in_factors
from lora_squeeze.serving import fit, needs_one_alpha, needs_scale_in_factors
from lora_squeeze.spectrum import Basis, bases, check_device
from lora_squeeze.truncation import Cut, Truncation, truncate_together
from lora_squeeze.whitening import truncate_on_data

__all__ = ["compress", "compress_for", "file_cost"]

# Beyond the size of its matrix, a layer's rank costs r×r numbers and buys nothing: up to here it may.
_LARGEST_IDLE_RANK = 2048


def compress(
    source: Adapter | Decomposition,
    ranks: Ranks,
    *,
    dtype: str | None = None,
    method: str = "gram",
    device: str = "cpu",
    one_alpha: bool = False,
    scale_one: bool = False,
    on_layer: Callable[[SqueezedLayer], None] | None = None,
) -> Adapter:
    """Truncate every layer's effective update to its rank; lazily, when the result is saved.

    source
        an adapter (each layer is decomposed on the way) or its decomposition (that is used).
    ranks
        one for every layer, none above the layer's own; a layer that keeps its rank keeps its bits,
        and a layer of rank 0 is left out.
    dtype
        of the new factors, as "bf16" or "bfloat16"; default: each as it was.
    method, device
        of the decomposition on the way; one that is given has its own, and another is an error.
    one_alpha
        give all layers one alpha instead of one scale, for runtimes that misread differing alphas.
    scale_one
        give all layers the scale 1, biases included, and no alpha tensor, for runtimes that find no other.
    on_layer
        called with each layer's spectrum and error, rounding included, once it has been computed.

    All layers come out with one effective scale, the most common one of the source; where a layer
    had another, the difference goes into its factors. So a runtime that ignores rank_pattern and
    alpha_pattern still applies the right scale. A layer with a trained bias (lora_bias) keeps its own:
    the scale holds for the bias, too.
    Raises RankError if the plan does not fit the adapter, SettingsError for a method or device that cannot be heeded.
    """
    if isinstance(source, Decomposition):
        _refuse_unheeded("method", method, made=source.method, default="gram")
        _refuse_unheeded("device", _indexed(device), made=_indexed(source.device), default="cpu")
    adapter = source.adapter if isinstance(source, Decomposition) else source
    check_device(device)
    dtype = dtype_spelling(dtype) if dtype else None
    _check_plan(adapter, ranks)
    target = scale_in_factors(adapter) if scale_one else adapter
    scale = _shared_scale(target)
    biased = {_module_of(tensor.key) for tensor in adapter.pass_through if tensor.key.endswith(BIAS)}
    layers = {
        name: replace(
            spec,
            rank=ranks.by_layer[name],
            scale=spec.scale
            if whole(name) in biased
            else scale * (ranks.largest / ranks.by_layer[name] if one_alpha else 1),
            down_dtype=dtype or spec.down_dtype,
            up_dtype=dtype or spec.up_dtype,
            folded=False,
        )
        for name, spec in target.layers.items()
        if ranks.by_layer[name] > 0
    }
    # An alpha tensor is beside the factors: one that goes or comes changes no bit of them.
    changed = {
        name
        for name, spec in layers.items()
        if replace(spec, alpha_dtype="") != replace(adapter.layers[name], alpha_dtype="")
    }
    for name, spec in layers.items():
        sizes = spec.out_features, spec.in_features
        if name in changed and spec.rank > max(*sizes, _LARGEST_IDLE_RANK):
            raise RankError(
                f"layer '{name}': a matrix of {sizes[0]} × {sizes[1]} can use a rank of {min(sizes)} at most, "
                f"not {spec.rank}; choose a lower one"
            )
    calibration = source.calibration if isinstance(source, Decomposition) else ""
    cut = truncate_on_data if calibration else truncate_together
    errors: dict[str, SqueezedLayer] = {}

    def decomposed(names: Sequence[str], loaded: Sequence[LoraLayer]) -> list[Basis]:
        if isinstance(source, Decomposition):
            return [source.basis(name) for name in names]
        with naming(adapter):
            return bases(loaded, method=method, device=device)

    def squeezed(names: Sequence[str], loaded: Sequence[LoraLayer], *, borrow: bool) -> list[LoraLayer]:
        found = decomposed(names, loaded)
        with naming(adapter):
            spectra = [
                spectrum_of(adapter.layers[name], layer, own)
                for name, layer, own in zip(names, loaded, found, strict=True)
            ]
        results = {name: Truncation(layer, 0.0) for name, layer in zip(names, loaded, strict=True)}
        cuts = [
            _cut(layer, own, layers[name])
            for name, layer, own in zip(names, loaded, found, strict=True)
            if name in changed
        ]
        results.update((result.layer.name, result) for result in cut(cuts, borrow=borrow))
        for name, spectrum in zip(names, spectra, strict=True):
            _check_finite(results[name], layers[name])
            errors[name] = SqueezedLayer(spectrum, layers[name].rank, results[name].relative_error)
            if on_layer is not None:
                on_layer(errors[name])
        return [results[name].layer for name in names]

    def load(name: str) -> LoraLayer:
        return squeezed([name], [adapter.load(name)], borrow=False)[0]

    def borrow(names: Sequence[str]) -> list[LoraLayer]:
        return squeezed(names, borrow_together(adapter, names), borrow=True)

    ahead = _Ahead(adapter, alone=load, together=borrow)

    def late_metadata(fingerprint: str) -> dict[str, str]:
        for name in adapter.layers.keys() - layers.keys():
            layer = adapter.load(name)
            spectrum = spectrum_of(adapter.layers[name], layer, *decomposed([name], [layer]))
            errors[name] = SqueezedLayer(spectrum, 0, 1.0 if spectrum.energy > 0 else 0.0)
        of_file = not math.isnan(planned.relative_error)
        made = replace(
            planned,
            relative_error=error_over_all(errors[name] for name in adapter.layers) if of_file else math.nan,
            source_sha256=adapter.sha256(),
            tensors_sha256=fingerprint,
        )
        return {**(adapter.late_metadata(fingerprint) if adapter.late_metadata else {}), ENTRY: made.to_json()}

    policy = f"{ranks.policy}, calibrated by {calibration}" if calibration else ranks.policy
    # On data it is of the outputs: nobody could measure it again from the files.
    error = math.nan if calibration else 0.0
    planned = stated(adapter, policy, ranks=ranks.by_layer, layers=layers, relative_error=error)
    return replace(
        target,
        layers=layers,
        load=load,
        borrow=ahead.borrow,
        expect=ahead.expect,
        metadata={**adapter.metadata, ENTRY: planned.to_json()},
        late_metadata=late_metadata,
        left_out=(*adapter.left_out, *(name for name in adapter.layers if name not in layers)),
    )


def compress_for(
    source: Adapter | Decomposition,
    ranks: Ranks,
    *,
    runtime: str,
    dtype: str | None = None,
    method: str = "gram",
    device: str = "cpu",
    on_layer: Callable[[SqueezedLayer], None] | None = None,
) -> Adapter:
    """`compress`, written as this runtime wants it; "" is whatever reads the adapter's format."""
    adapter = source.adapter if isinstance(source, Decomposition) else source
    squeezed = compress(
        source,
        ranks,
        dtype=dtype,
        method=method,
        device=device,
        one_alpha=needs_one_alpha(adapter, runtime),
        scale_one=needs_scale_in_factors(adapter, runtime),
        on_layer=on_layer,
    )
    return fit(squeezed, runtime)


class _Ahead(threading.local):
    """Layers that a thread has announced are computed together when the first of them is asked for.

    Only those are borrowed: a thread that asks for another may be at work on layers of its own, in the
    same memory.
    """

    def __init__(
        self,
        source: Adapter,
        *,
        alone: Callable[[str], LoraLayer],
        together: Callable[[Sequence[str]], list[LoraLayer]],
    ) -> None:
        self._source, self._alone, self._together = source, alone, together
        self._runs: dict[str, list[str]] = {}
        self._ready: dict[str, LoraLayer] = {}

    def expect(self, names: Sequence[str]) -> None:
        specs = [self._source.layers[name] for name in names if name in self._source.layers]
        self._runs = {name: run for run in together(specs) for name in run}
        self._ready = {}

    def borrow(self, name: str) -> LoraLayer:
        if name not in self._runs:
            return self._alone(name)
        if name not in self._ready:
            run = self._runs[name]
            self._ready = dict(zip(run, self._together(run), strict=True))
        return self._ready.pop(name)


def file_cost(adapter: Adapter, *, dtype: str | None = None, runtime: str = "") -> Cost:
    """What files made of this adapter cost, for `policies.size`: nothing is computed for it."""
    dtype = dtype_spelling(dtype) if dtype else None

    def component_bytes(spec: LayerSpec) -> int:
        down, up = DTYPES[dtype or spec.down_dtype], DTYPES[dtype or spec.up_dtype]
        return spec.in_features * down.itemsize + spec.out_features * up.itemsize

    def file_size(ranks: Ranks) -> int:
        # Where layers are padded to one rank, a plan may ask one for more than its own.
        own = {name: min(rank, adapter.layers[name].rank) for name, rank in ranks.by_layer.items()}
        return weights_size(compress_for(adapter, replace(ranks, by_layer=own), runtime=runtime, dtype=dtype))

    return Cost({name: component_bytes(spec) for name, spec in adapter.layers.items()}, file_size)


def _refuse_unheeded(what: str, given: str, *, made: str, default: str) -> None:
    """A decomposition is what it is: to ask for another route or device, and silently not get it, helps nobody."""
    if given not in (made, default):
        raise SettingsError(
            f"{what} '{given}' cannot be heeded: the decomposition that is given was made with {what} '{made}'; "
            f"leave it out, or make another by decompose(…, {what}='{given}')"
        )


def _indexed(device: str) -> str:
    return f"{device}:0" if device == "cuda" else device


def _check_plan(adapter: Adapter, ranks: Ranks) -> None:
    unknown = [name for name in ranks.by_layer if name not in adapter.layers]
    missing = [name for name in adapter.layers if name not in ranks.by_layer]
    if unknown or missing:
        first = f"'{unknown[0]}' is not in it" if unknown else f"'{missing[0]}' has no rank"
        raise RankError(f"these ranks are not for {adapter.source}: layer {first}; make a plan for this adapter")
    companions = {
        tensor.layer or _module_of(tensor.key): tensor.key
        for tensor in adapter.pass_through
        if tensor.layer or ".lora_" in tensor.key
    }
    for name, rank in ranks.by_layer.items():
        own = adapter.layers[name].rank
        if not 0 <= rank <= own:
            raise RankError(f"layer '{name}': rank {rank} is not between 0 and its own rank {own}")
        if rank == 0 and name in companions:
            raise RankError(
                f"layer '{name}' cannot be left out, as '{companions[name]}' would be lost; set a min_rank of 1"
            )
    modules: dict[str, int] = {}
    for name, rank in ranks.by_layer.items():
        if name != whole(name) and (rank == 0 or modules.setdefault(whole(name), rank) != rank):
            raise RankError(
                f"layer '{name}': rank {rank} is not possible: it is stored together with all of '{whole(name)}', "
                "and these have one rank of at least 1"
            )
    if not any(ranks.by_layer.values()):
        raise RankError("every layer has rank 0: that would leave nothing of the adapter")


def _module_of(key: str) -> str:
    return key.rpartition(".lora_")[0].removeprefix(PREFIX)


def _shared_scale(adapter: Adapter) -> float:
    scales = Counter(spec.scale for spec in adapter.layers.values() if spec.scale != 0)
    return scales.most_common(1)[0][0] if scales else 0.0


def _cut(layer: LoraLayer, found: Basis, spec: LayerSpec) -> Cut:
    """What makes of a layer what is specified."""
    return Cut(
        layer,
        found,
        spec.rank,
        scale=spec.scale,
        down_dtype=DTYPES[spec.down_dtype],
        up_dtype=DTYPES[spec.up_dtype],
    )


def _check_finite(result: Truncation, spec: LayerSpec) -> None:
    if not math.isfinite(result.relative_error):
        raise RankError(
            f"layer '{spec.name}': its new factors overflow {spec.down_dtype}; choose a wider dtype, as --dtype bf16"
        )
