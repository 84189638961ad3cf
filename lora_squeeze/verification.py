"""Whether a squeezed adapter is what its file says it is, and what it lost."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from lora_squeeze.adapter import Adapter, LayerSpec, LoraLayer, PassThrough
from lora_squeeze.conversion import convert
from lora_squeeze.decomposition import spectrum_of
from lora_squeeze.errors import AdapterError
from lora_squeeze.formats import open_adapter
from lora_squeeze.formats.dora import magnitude_module
from lora_squeeze.formats.peft_config import config_for
from lora_squeeze.formats.remote import OnDownload
from lora_squeeze.formats.tensors import read_safetensors
from lora_squeeze.merging import Merged, merged_in
from lora_squeeze.parallel import ordered_map
from lora_squeeze.provenance import Provenance, provenance_of
from lora_squeeze.records import Check, Compression, SqueezedLayer, Verification
from lora_squeeze.rewriting import scale_in_factors, states_scales
from lora_squeeze.spectrum import basis, singular_values

__all__ = ["verify"]

# What squeezing changes in a PEFT configuration: these fields are checked as ranks and scales.
_CHANGED_FIELDS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}


def verify(
    output: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    on_layer: Callable[[str], None] | None = None,
    on_download: OnDownload | None = None,
) -> Verification:
    """Check an adapter against the provenance in its header, and against its source.

    source
        what it was made from. If it is given, its hash is checked, everything that is no factor has
        to be the same bit by bit, and the loss is measured from both files, layer by layer. Of a merge it
        may be one of the adapters that were added up; only whether it is one of them is checked then.
    on_layer
        called with each layer's name when its loss has been measured.
    on_download
        see `open_adapter`.

    Raises AdapterError if a file cannot be read as an adapter at all. Everything else is a check
    that has passed or not.
    """
    written = open_adapter(output, on_download=on_download)
    checks = [Check("opens", True, f"{written.format}, {len(written.layers)} layers"), _finite(written)]
    try:
        made = provenance_of(written)
    except AdapterError as error:
        made = None
        checks.append(Check("provenance", False, str(error)))
    else:
        checks.append(_has_provenance(made))
    if made is not None:
        checks += [_tensors(written, made), _ranks(written, made), _scales(written, made)]
    loss = None
    if source is not None:
        original = open_adapter(source, on_download=on_download)
        parts = None if made is None else _parts(written, made, original)
        if parts is not None:
            checks.append(_part(original, parts))
        else:
            checks += [] if made is None else [_source(original, made)]
            compared, loss = _compared(original, written, made, whole=checks[1].passed, on_layer=on_layer)
            checks += compared
    return Verification(output=str(output), source=str(source or ""), checks=tuple(checks), loss=loss)


def _compared(
    original: Adapter,
    written: Adapter,
    made: Provenance | None,
    *,
    whole: bool,
    on_layer: Callable[[str], None] | None,
) -> tuple[list[Check], Compression | None]:
    """Everything that the file should have of its source, and what it lost if both are whole and of one shape."""
    if original.format != written.format:
        original = convert(original, written.format)
    # Trained biases go the way of the scales; a loss is measured against the factors that were not rounded.
    folded = written.format == "diffusers" and not states_scales(written)
    carried = scale_in_factors(original) if folded else original
    layers = _layers(original, written, made)
    checks = [
        layers,
        _carried_over(carried, written, fitted=made is not None and made.fitted),
        _configuration(original, written),
    ]
    if not (whole and layers.passed):
        return checks, None
    loss = _loss(original, written, policy=made.policy if made else "unknown", on_layer=on_layer)
    return [*checks, *([_error(loss, original, made)] if made else [])], loss


def _finite(adapter: Adapter) -> Check:
    def is_finite(name: str) -> bool:
        layer = adapter.borrow(name)
        return bool(torch.isfinite(layer.down).all()) and bool(torch.isfinite(layer.up).all())

    bad = [name for name, good in zip(adapter.layers, ordered_map(is_finite, adapter.layers), strict=True) if not good]
    return Check("finite", not bad, f"NaN or infinity in {_some(bad)}" if bad else "no NaN, no infinity in any factor")


def _has_provenance(made: Provenance | None) -> Check:
    if made is None:
        return Check("provenance", False, "the header has none: not written by lora-squeeze, or saved again since")
    return Check("provenance", True, f"{made.policy}, by lora-squeeze {made.version}")


def _tensors(written: Adapter, made: Provenance) -> Check:
    assert written.weights is not None
    intact = read_safetensors(written.weights).fingerprint() == made.tensors_sha256
    return Check("tensors", intact, "as they were written" if intact else "not those that were written")


def _ranks(written: Adapter, made: Provenance) -> Check:
    stated = _by_layer(made.ranks, written)
    for name, rank in stated.items():
        if (rank > 0) != (name in written.layers):
            return Check("ranks", False, f"'{name}' has rank {rank} in the header, and is {_there(name, written)}")
    for name, spec in written.layers.items():
        if spec.rank != stated.get(name) and not _is_padded(written.load(name), stated.get(name, 0)):
            return Check("ranks", False, f"'{name}' has rank {spec.rank}, the header says {stated.get(name, 0)}")
    return Check("ranks", True, f"as the header says, the largest {written.rank}")


def _is_padded(layer: LoraLayer, rank: float) -> bool:
    """Whether all beyond this rank is zero, as runtimes want it that take one rank only."""
    return 0 < rank < len(layer.down) and not layer.down[int(rank) :].any() and not layer.up[:, int(rank) :].any()


def _scales(written: Adapter, made: Provenance) -> Check:
    stated = _by_layer(made.scales, written)
    for name, spec in written.layers.items():
        if not math.isclose(spec.scale, stated.get(name, math.nan), rel_tol=1e-6):
            return Check(
                "scales", False, f"'{name}' gets {spec.scale:g}, the header says {stated.get(name, math.nan):g}"
            )
    return Check("scales", True, "as the header says")


def _source(original: Adapter, made: Provenance) -> Check:
    found = original.sha256()
    if found == made.source_sha256:
        return Check("source", True, "the one that the header names")
    if found in made.ancestors:
        return Check("source", True, "one from which the source was made in turn")
    return Check("source", False, f"its SHA-256 is {found[:12]}…, the header names {made.source_sha256[:12]}…")


def _parts(written: Adapter, made: Provenance, original: Adapter) -> Merged | None:
    """What was added up, if this was made of a sum, and not of this source alone."""
    try:
        parts = merged_in(written)
    except AdapterError:  # nor has it the hash by which the provenance knows it: the source is none that is named
        return None
    line = (made.source_sha256, *made.ancestors)
    return parts if parts is not None and parts.sha256 in line and original.sha256() not in line else None


def _part(original: Adapter, parts: Merged) -> Check:
    """Whether the source is in a sum. Layers, tensors and loss are those of the sum, of which it is a part only."""
    found = original.sha256()
    if found not in parts.weights:
        named = ", ".join(f"{digest[:12]}…" for digest in parts.weights)
        return Check("source", False, f"its SHA-256 is {found[:12]}…, and this is a merge of {named}")
    weights = " and ".join(f"{weight:g}" for weight in parts.weights[found])
    count = sum(map(len, parts.weights.values()))
    said = (
        f"one of {count} that were merged, with weight {weights}; all else is of their sum, and not compared with one"
    )
    return Check("source", True, said)


def _layers(original: Adapter, written: Adapter, made: Provenance | None) -> Check:
    stated = _by_layer(made.ranks, original) if made else {}
    for name, spec in written.layers.items():
        before = original.layers.get(name)
        if before is None:
            return Check("layers", False, f"'{name}' is not in the source")
        if _size(spec) != _size(before):
            return Check("layers", False, f"'{name}' is {_size(spec)}, in the source {_size(before)}")
    for name in original.layers:
        if name not in written.layers and stated.get(name, 0) > 0:
            return Check("layers", False, f"'{name}' of the source is missing")
    left_out = len(original.layers) - len(written.layers)
    return Check("layers", True, "those of the source" + (f", {left_out} left out" if left_out else ""))


def _carried_over(original: Adapter, written: Adapter, *, fitted: bool) -> Check:
    """Bit by bit, but for magnitudes that were fitted: of those only the base model could tell more than their size."""
    before, after = (
        {tensor.key: _content(tensor, heeded=not (fitted and magnitude_module(tensor.key))) for tensor in adapter}
        for adapter in (original.pass_through, written.pass_through)
    )
    differing = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if differing:
        return Check("carried over", False, f"not as in the source: {_some(differing)}")
    anew = sum(1 for key in before if fitted and magnitude_module(key))
    said = f"; {anew} magnitudes fitted to the base weights" if anew else ""
    return Check(
        "carried over", True, f"{len(before) - anew} tensors besides the factors, bit by bit as in the source{said}"
    )


def _content(tensor: PassThrough, *, heeded: bool) -> tuple[str, tuple[int, ...], bytes]:
    digest = hashlib.sha256()
    for chunk in tensor.chunks() if heeded else ():
        digest.update(chunk)
    return tensor.dtype, tensor.shape, digest.digest()


def _configuration(original: Adapter, written: Adapter) -> Check:
    """Of a PEFT adapter: all fields that squeezing has no reason to change."""
    if original.format != "peft" or written.format != "peft":
        return Check("configuration", True, "none beside the tensors")
    left_out = (*original.left_out, *(name for name in original.layers if name not in written.layers))
    kept = {name: spec for name, spec in original.layers.items() if name in written.layers}
    if not kept:
        return Check("configuration", False, "of other layers")
    planned = config_for(replace(original, layers=kept, left_out=left_out))
    fields = (planned.keys() | written.config.keys()) - _CHANGED_FIELDS
    differing = sorted(field for field in fields if planned.get(field) != written.config.get(field))
    if differing:
        return Check("configuration", False, f"not as in the source: {_some(differing)}")
    return Check("configuration", True, "all other fields as in the source")


def _loss(original: Adapter, written: Adapter, *, policy: str, on_layer: Callable[[str], None] | None) -> Compression:
    layers: list[SqueezedLayer] = []
    for layer in ordered_map(lambda name: _layer_loss(original, written, name), original.layers):
        layers.append(layer)
        if on_layer is not None:
            on_layer(layer.spectrum.name)
    return Compression(
        source=original.source,
        output=written.source,
        policy=policy,
        layers=tuple(layers),
        bytes_before=original.weights.stat().st_size if original.weights else 0,
        bytes_after=written.weights.stat().st_size if written.weights else 0,
        parameters_before=original.parameters,
        parameters_after=written.parameters,
    )


def _layer_loss(original: Adapter, written: Adapter, name: str) -> SqueezedLayer:
    """ΔW − ΔW' has the factors of both stacked, so its norm needs neither of the two updates."""
    before, spec = original.load(name), original.layers[name]
    spectrum = spectrum_of(spec, before, basis(before))
    if name not in written.layers:
        return SqueezedLayer(spectrum, 0, 1.0 if spectrum.energy > 0 else 0.0)
    after = written.load(name)
    difference = LoraLayer(
        name=name,
        down=torch.cat([before.down.double(), after.down.double()]),
        up=torch.cat([before.up.double() * before.scale, after.up.double() * -after.scale], dim=1),
        scale=1.0,
    )
    lost = math.hypot(*singular_values(difference, basis(difference, method="qr")))
    error = lost / math.sqrt(spectrum.energy) if spectrum.energy > 0 else (math.inf if lost > 0 else 0.0)
    return SqueezedLayer(spectrum, written.layers[name].rank, error)


def _error(loss: Compression, original: Adapter, made: Provenance) -> Check:
    if math.isnan(made.relative_error):
        return Check("error", True, f"{loss.relative_error:.3e}; the header states none")
    if original.sha256() != made.source_sha256:
        return Check("error", True, f"{loss.relative_error:.3e}; the header's is relative to another source")
    # Where factors have 16 bits, the products that are rounded to them have float32's digits, and so what the
    # rounding cost is known to two.
    agrees = math.isclose(loss.relative_error, made.relative_error, rel_tol=1e-2, abs_tol=1e-6)
    return Check("error", agrees, f"{loss.relative_error:.3e}, in the header {made.relative_error:.3e}")


def _by_layer(values: float | Mapping[str, float], adapter: Adapter) -> Mapping[str, float]:
    return values if isinstance(values, Mapping) else dict.fromkeys(adapter.layers, values)


def _size(spec: LayerSpec) -> str:
    return f"{spec.out_features} × {spec.in_features}"


def _there(name: str, adapter: Adapter) -> str:
    return "there" if name in adapter.layers else "not there"


def _some(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
