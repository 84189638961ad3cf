"""DoRA's magnitudes, fitted to squeezed directions when the base weights are at hand.

DoRA's weight is D = m · V / ‖V‖ with V = W + ΔW, row by row of the outputs (in some kohya files: of the
inputs). Keeping m while ΔW becomes ΔW' keeps every row's length, but turns it by an angle θ. Of all
multiples of the new direction u', the one closest to the old row m · u is its projection, so the best
magnitude is

    m' = m · ⟨u, u'⟩ = m · cos θ

which leaves m sin θ where keeping m leaves 2 m sin(θ/2). (Taking ‖W + ΔW'‖ anew, as an untrained DoRA
starts, would throw the trained magnitude away.) With E = ΔW − ΔW' and lower case for rows,

    sin²θ = (‖e‖² − ⟨v, e⟩² / ‖v‖²) / ‖v − e‖²

and all of it follows from ‖w‖², W · [A; A']ᵀ and the Gram matrix of [A; A']: W is read once, a block of
rows at a time, and no ΔW is formed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter, LayerSpec, LoraLayer, PassThrough, whole
from lora_squeeze.errors import AdapterError, SettingsError, UnsupportedAdapter
from lora_squeeze.formats.base_weights import BaseWeights, StoredWeight, open_base_weights
from lora_squeeze.formats.diffusers import component_of
from lora_squeeze.formats.dora import magnitudes_of
from lora_squeeze.formats.kohya import PARTS
from lora_squeeze.formats.tensors import DTYPES, memory_of
from lora_squeeze.provenance import restated
from lora_squeeze.records import DoraErrors

__all__ = ["fit_magnitudes"]


@dataclass(frozen=True)
class _Place:
    """Where one layer's magnitudes and base weight are, and how they lie.

    by_input
        the norms are those of inputs, all numbers of a kernel together, not of outputs.
    upright
        the rows of the stored weight are what the norms belong to.
    """

    tensor: PassThrough
    spec: LayerSpec
    weight: StoredWeight
    by_input: bool
    upright: bool


@dataclass(frozen=True)
class _Loss:
    """Squared Frobenius norms: D − D' as written, the same with m kept, and D − W."""

    lost: float
    lost_if_kept: float
    update: float


def fit_magnitudes(
    source: Adapter,
    squeezed: Adapter,
    *,
    base: str | os.PathLike[str],
    on_layer: Callable[[str], None] | None = None,
) -> tuple[Adapter, Callable[[], DoraErrors]]:
    """The squeezed adapter with the best magnitudes for its directions, computed as it is saved.

    base
        folder or safetensors file of the model that the adapter was trained on.
    on_layer
        called with the name of each layer whose magnitudes have been fitted.

    Also returns a function that tells, after saving, how far the weights have moved. Layers that are
    not truncated keep every bit.
    Raises SettingsError if there is nothing to fit, AdapterError if a weight is missing, quantised or of
    another shape, UnsupportedAdapter for a layer that is a part of a module.
    """
    magnitudes = magnitudes_of(source)
    if not magnitudes:
        raise SettingsError(
            f"{source.source}: has no DoRA magnitudes to fit, and base weights serve nothing else: leave them out"
        )
    weights = open_base_weights(Path(base).expanduser())
    places = {name: _place(source, name, tensor, weights) for name, tensor in magnitudes.items()}
    losses: dict[str, _Loss] = {}

    def chunks(name: str) -> Iterator[bytes]:
        place = places[name]
        values = _read(place.tensor)
        after = squeezed.load(name)
        kept = source.layers[name].rank == squeezed.layers[name].rank
        fitted, losses[name] = _fitted(values.double().flatten(), source.load(name), after, place, keep=kept)
        if on_layer is not None:
            on_layer(name)
        rounded = values if kept else fitted.to(values.dtype)
        yield bytes(memory_of(rounded.contiguous()))

    of_layer = {tensor.key: name for name, tensor in magnitudes.items()}
    fitted = replace(
        squeezed,
        pass_through=tuple(
            replace(tensor, chunks=partial(chunks, of_layer[tensor.key])) if tensor.key in of_layer else tensor
            for tensor in squeezed.pass_through
        ),
    )
    return restated(fitted, lambda made: replace(made, fitted=True)), lambda: _errors(losses)


def _place(source: Adapter, name: str, tensor: PassThrough, weights: BaseWeights) -> _Place:
    spec = source.layers[name]
    if whole(name) != name or spec.kind == "expert":
        raise UnsupportedAdapter(
            f"{source.source}: '{name}' is a part of a module; magnitudes are fitted for whole modules only: leave the "
            "base weights out, and they are kept"
        )
    weight = _find(source, name, weights)
    by_input = _is_by_input(tensor, spec, source)
    rows, columns = weight.spec.shape[0], math.prod(weight.spec.shape[1:])
    fits = {
        False: (rows, columns) == (spec.out_features, spec.in_features),
        True: (rows, columns) == (spec.in_features, spec.out_features) and not spec.kernel,
    }
    transposed = spec.kind == "embedding" or bool(source.config.get("fan_in_fan_out"))
    if not fits[transposed]:  # PEFT, too, corrects fan_in_fan_out where it does not fit
        transposed = not transposed
    if not fits[transposed] or (spec.kind == "embedding" and not transposed):
        raise AdapterError(
            f"{weight.file.path}: '{weight.spec.key}' has shape {list(weight.spec.shape)}, but layer '{name}' changes "
            f"a weight of {spec.out_features} outputs and {spec.in_features} inputs; give the base model that the "
            "adapter was trained on"
        )
    return _Place(tensor, spec, weight, by_input, upright=by_input == transposed)


def _find(source: Adapter, name: str, weights: BaseWeights) -> StoredWeight:
    if source.format == "kohya":
        prefix = next((prefix for prefix in PARTS if name.startswith(prefix)), "")
        own, part = name.removeprefix(prefix), PARTS.get(prefix, "")
        return weights.find(own, part=part, underscored="." not in own)
    if part := component_of(name):
        return weights.find(name.removeprefix(f"{part}."), part=part)
    return weights.find(_before_replication(name, source.config))


def _before_replication(name: str, config: Mapping[str, object]) -> str:
    """The base model's own name of a layer that layer_replication has copied."""
    ranges = config.get("layer_replication")
    if not isinstance(ranges, list):
        return name
    copied = [layer for start, end in ranges for layer in range(start, end)]
    words = name.split(".")
    place = next((place for place, word in enumerate(words) if word.isdecimal()), None)
    if place is not None and int(words[place]) < len(copied):
        words[place] = str(copied[int(words[place])])
    return ".".join(words)


def _is_by_input(tensor: PassThrough, spec: LayerSpec, source: Adapter) -> bool:
    count, channels = math.prod(tensor.shape), spec.in_features // math.prod(spec.kernel)
    first, second = (*tensor.shape, 1, 1)[:2]
    if tensor.key.endswith(".dora_scale") and (first, second) == (1, channels) == (1, count) and channels > 1:
        return True
    if count == spec.out_features and (first == count or second == count) and tensor.dtype in DTYPES:
        return False
    raise AdapterError(
        f"{source.source}: '{tensor.key}' has dtype {tensor.dtype} and shape {list(tensor.shape)}; one floating-point "
        f"number for each of {spec.out_features} outputs is expected"
    )


def _fitted(
    magnitude: Tensor, before: LoraLayer, after: LoraLayer, place: _Place, *, keep: bool
) -> tuple[Tensor, _Loss]:
    """The best magnitudes (n,) in float64, and what remains of the error once they are rounded as they are stored."""
    old = (before.up.T, before.down) if place.by_input else (before.down, before.up.T)
    new = (after.up.T, after.down) if place.by_input else (after.down, after.up.T)
    # Rows of ΔW are coefficients · basis, and so are those of E = ΔW − ΔW'.
    basis = torch.cat([old[0], new[0]]).double()  # (r + k, length of a row)
    change = torch.cat([before.scale * old[1].double(), torch.zeros_like(new[1], dtype=torch.float64)]).T  # (n, r + k)
    error = torch.cat([before.scale * old[1].double(), -after.scale * new[1].double()]).T
    gram = basis @ basis.T
    squares, products = _products(place, basis, rows=len(change))

    def summed(terms: Tensor) -> Tensor:
        return terms.reshape(len(magnitude), -1).sum(1)  # over the numbers of a kernel, where norms are by input

    ww, we, wd = summed(squares), summed((products * error).sum(1)), summed((products * change).sum(1))
    ee, dd = summed(((error @ gram) * error).sum(1)), summed(((change @ gram) * change).sum(1))
    ve = we + summed(((change @ gram) * error).sum(1))
    vv = ww + 2 * wd + dd
    after_norm = (vv - 2 * ve + ee).clamp(min=0)
    alive = (vv > 0) & (after_norm > 0)
    sine = torch.where(alive, ((ee - ve.square() / vv) / after_norm).clamp(0, 1), 0.0)  # squared
    cosine = torch.where(alive, (vv - ve) / (vv * after_norm).sqrt(), 1.0)
    best = magnitude * cosine
    stored = magnitude if keep else best.to(DTYPES[place.tensor.dtype]).double()
    gain = torch.where(vv > 0, magnitude / vv.sqrt(), 1.0)
    update = (gain - 1).square() * ww + 2 * gain * (gain - 1) * wd + gain.square() * dd
    remaining = magnitude.square() * sine
    turned = torch.where(cosine > 0, sine / (1 + cosine), 1 - cosine)  # 1 − cos θ, without cancellation
    return best, _Loss(
        lost=float((remaining + (stored - best).square()).sum()),
        lost_if_kept=float((2 * magnitude.square() * turned).sum()),
        update=float(update.sum()),
    )


def _products(place: _Place, basis: Tensor, *, rows: int) -> tuple[Tensor, Tensor]:
    """‖w‖² (n,) and W · basisᵀ (n, r + k) in float64, of the n rows of W in which norms are taken."""
    # Products of half-precision numbers are exact in float32, and sums of a row lose little there.
    wide = torch.float32 if place.weight.spec.dtype in ("F16", "BF16") else torch.float64
    vectors = basis.to(wide)
    squares = torch.zeros(rows, dtype=torch.float64)
    products = torch.zeros(rows, len(basis), dtype=torch.float64)
    for start, stored in place.weight.rows():
        block, here = stored.to(wide), slice(start, start + len(stored))
        if place.upright:
            squares[here] += block.square().sum(1)
            products[here] += block @ vectors.T
        else:
            squares += block.square().sum(0)
            products += block.T @ vectors[:, here].T
    return squares, products


def _read(tensor: PassThrough) -> Tensor:
    data = bytearray(b"".join(tensor.chunks()))
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).reshape(tensor.shape)


def _errors(losses: Mapping[str, _Loss]) -> DoraErrors:
    update = sum(loss.update for loss in losses.values())

    def relative(lost: float) -> float:
        return math.sqrt(lost / update) if update > 0 else 0.0

    return DoraErrors(
        layers=len(losses),
        relative_error=relative(sum(loss.lost for loss in losses.values())),
        relative_error_if_kept=relative(sum(loss.lost_if_kept for loss in losses.values())),
    )
