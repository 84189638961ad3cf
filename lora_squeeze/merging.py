"""Weighted sums of adapters: Σ_j w_j ΔW_j is a LoRA with stacked factors, to be squeezed like any other.

With up = [w_1 c_1 B_1 | … | w_J c_J B_J] and down = [A_1; …; A_J] (c_j the scales) the product
up @ down is the sum, exactly, for any ranks and scales; no matrix of the model's size is formed. A
module that some of the adapters do not adapt has an update of zero there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from lora_squeeze.adapter import Adapter, LayerSpec, LoraLayer, PassThrough, whole
from lora_squeeze.conversion import convert
from lora_squeeze.documents import parse_json
from lora_squeeze.errors import AdapterError, SettingsError, UnsupportedAdapter
from lora_squeeze.peft_names import BIAS
from lora_squeeze.provenance import ENTRY
from lora_squeeze.summary import base_model_of

__all__ = ["Merged", "merge", "merged_in"]

_TOKENS = "trainable_token_indices"
PROVENANCE = "lora_squeeze_merge"  # the metadata entry with the hashes and weights of what was merged


@dataclass(frozen=True)
class Merged:
    """What a file says of the sum that it was made of.

    sha256
        of this statement, which is what the sum's own provenance has for its source.
    weights
        SHA-256 of each source's weight file → the weights it had: several if it was added more than once.
    """

    sha256: str
    weights: Mapping[str, tuple[float, ...]]


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    allow_other_base: bool = False,
    keep_first: bool = False,
) -> Adapter:
    """The weighted sum of adapters as one lazy adapter, whose ranks are the sums of theirs.

    weights
        one number for each adapter; default: 1/J each, their average.
    allow_other_base
        merge adapters that name different base models.
    keep_first
        where adapters differ in a tensor that is no LoRA factor (a trained head), keep the first's.

    Ranks, scales, dtypes, modules and formats may differ; the result has the format, the configuration
    and the files of the first. Squeeze it as any adapter; at full rank it is the sum itself.
    Raises SettingsError for weights that make no sense, AdapterError for adapters that do not belong
    together, UnsupportedAdapter for what has no sum (DoRA, trained biases), always by name.
    """
    if not adapters:
        raise SettingsError("there is no adapter to merge")
    shares = _checked_weights(adapters, weights)
    first = adapters[0]
    _check_bases(adapters, allowed=allow_other_base)
    # One that has the format is added up as it is: a conversion may round.
    same_format = [one if one.format == first.format else convert(one, first.format) for one in adapters]
    for adapter in same_format:
        _refuse_what_has_no_sum(adapter)
        _refuse_another_meaning(same_format[0], adapter)
    _refuse_other_tokens(same_format)
    specs = _specs(same_format)
    kept = _kept(same_format, keep_first=keep_first)
    read = partial(_stacked, adapters=same_format, weights=shares, specs=specs)
    sources = partial(_sources, adapters, shares)
    return Adapter(
        source=" + ".join(f"{weight:g}·{adapter.source}" for weight, adapter in zip(shares, adapters, strict=True)),
        format=first.format,
        layers=specs,
        load=read,
        borrow=read,
        pass_through=tuple(kept),
        config=_config(same_format, specs),
        metadata={**_without_provenance(first), PROVENANCE: sources(hashed=False)},
        files=first.files,
        late_metadata=lambda _fingerprint: {PROVENANCE: sources(hashed=True)},
        sha256=cache(lambda: hashlib.sha256(sources(hashed=True).encode()).hexdigest()),
        hash_along=partial(_hash_along, adapters),
        notes=_notes(same_format, specs, kept),
    )


def merged_in(adapter: Adapter) -> Merged | None:
    """What the adapter's file says of a merge; None if it says nothing. Raises AdapterError if it is damaged."""
    text = adapter.metadata.get(PROVENANCE)
    if text is None:
        return None
    weights: dict[str, tuple[float, ...]] = {}
    try:
        for part in parse_json(text):
            digest = str(part["sha256"])
            weights[digest] = (*weights.get(digest, ()), float(part["weight"]))
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{adapter.source}: '{PROVENANCE}' in the header is damaged: {error!r}") from error
    return Merged(hashlib.sha256(text.encode()).hexdigest(), weights)


def _checked_weights(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> tuple[float, ...]:
    shares = tuple(weights) if weights is not None else (1 / len(adapters),) * len(adapters)
    if len(shares) != len(adapters):
        raise SettingsError(f"{len(adapters)} adapters need as many weights, not {len(shares)}")
    if not all(math.isfinite(weight) for weight in shares) or not any(shares):
        raise SettingsError(f"the weights {', '.join(f'{weight:g}' for weight in shares)} make no adapter")
    return shares


def _check_bases(adapters: Sequence[Adapter], *, allowed: bool) -> None:
    """Adapters are differences to their base model: with another base below, a sum of them means nothing."""
    named = [(adapter, base_model_of(adapter)) for adapter in adapters if base_model_of(adapter)]
    for adapter, base in named[1:]:
        if base != named[0][1] and not allowed:
            raise AdapterError(
                f"{adapter.source} is for the base model '{base}', {named[0][0].source} for '{named[0][1]}'; a sum of "
                "updates makes sense on one base model only: if these are two names of one, use --allow-other-base"
            )


def _refuse_what_has_no_sum(adapter: Adapter) -> None:
    for tensor in adapter.pass_through:
        if ".lora_magnitude_vector" in tensor.key or tensor.key.endswith("dora_scale"):
            raise UnsupportedAdapter(
                f"{adapter.source}: '{tensor.key}': DoRA normalises each weight, so its updates cannot be added; merge "
                "it into the base model and extract a LoRA from the difference first"
            )
        if tensor.key.endswith(BIAS):
            raise UnsupportedAdapter(
                f"{adapter.source}: '{tensor.key}' is a trained bias of a LoRA layer (lora_bias); it cannot be merged"
            )


def _refuse_another_meaning(first: Adapter, other: Adapter) -> None:
    for field in ("layer_replication", "alora_invocation_tokens"):
        if (first.config.get(field) or None) != (other.config.get(field) or None):
            raise UnsupportedAdapter(
                f"'{field}' differs between {first.source} and {other.source}: their updates apply to different "
                "layers or tokens and cannot be added"
            )


def _refuse_other_tokens(adapters: Sequence[Adapter]) -> None:
    """Rows of embeddings that were trained for other tokens have no common place, even under one key."""
    training = [adapter for adapter in adapters if adapter.config.get(_TOKENS)]
    for adapter in training[1:]:
        if adapter.config[_TOKENS] != training[0].config[_TOKENS]:
            raise UnsupportedAdapter(
                f"'{_TOKENS}' differs between {training[0].source} and {adapter.source}: they have trained the "
                "embeddings of different tokens, which cannot be added; leave one of these adapters out"
            )


def _specs(adapters: Sequence[Adapter]) -> dict[str, LayerSpec]:
    """Every layer of any adapter, the first's first; as in the first that has it, ranks added up."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter.layers)
    return {name: _spec([adapter for adapter in adapters if name in adapter.layers], name, adapters) for name in names}


def _spec(holders: Sequence[Adapter], name: str, adapters: Sequence[Adapter]) -> LayerSpec:
    own = [adapter.layers[name] for adapter in holders]
    first = own[0]
    for adapter, spec in zip(holders, own, strict=True):
        same = (spec.out_features, spec.in_features, spec.kind, spec.kernel)
        if same != (first.out_features, first.in_features, first.kind, first.kernel):
            raise AdapterError(
                f"layer '{name}' is {_shape(first)} in {holders[0].source} and {_shape(spec)} in {adapter.source}; "
                "these adapters are for different models"
            )
    if first.kind == "expert" and len(holders) < len(adapters):
        missing = next(adapter.source for adapter in adapters if name not in adapter.layers)
        raise UnsupportedAdapter(
            f"layer '{name}': {missing} does not adapt '{whole(name)}'; parameters of experts can only be merged where "
            "all adapters have them"
        )
    return replace(first, rank=sum(spec.rank for spec in own), scale=first.scale or 1.0, folded=True)


def _shape(spec: LayerSpec) -> str:
    kernel = f", kernel {'×'.join(map(str, spec.kernel))}" if spec.kernel else ""
    return f"{spec.kind} {spec.out_features}×{spec.in_features}{kernel}"


def _stacked(
    name: str, *, adapters: Sequence[Adapter], weights: Sequence[float], specs: Mapping[str, LayerSpec]
) -> LoraLayer:
    """The stacked factors of one layer, in float32 where all factors are of 16 bits, else in float64.

    Half of each adapter's weight and scale goes into either factor, so that neither overflows.
    """
    parts = [
        (weight, adapter.load(name))
        for weight, adapter in zip(weights, adapters, strict=True)
        if name in adapter.layers
    ]
    halves = all(factor.element_size() <= 2 for _, layer in parts for factor in (layer.up, layer.down))
    exact = torch.float32 if halves else torch.float64
    scale = specs[name].scale
    downs: list[torch.Tensor] = []
    ups: list[torch.Tensor] = []
    for weight, layer in parts:
        share = weight * layer.scale / scale
        root = math.sqrt(abs(share))
        downs.append(layer.down.to(exact) * root)
        ups.append(layer.up.to(exact) * math.copysign(root, share))
    return LoraLayer(name=name, down=torch.cat(downs), up=torch.cat(ups, dim=1), scale=scale)


def _kept(adapters: Sequence[Adapter], *, keep_first: bool) -> list[PassThrough]:
    """Tensors that are no LoRA factors: those that all their holders agree on."""
    kept: dict[str, tuple[Adapter, PassThrough]] = {}
    for adapter in adapters:
        for tensor in adapter.pass_through:
            holder, known = kept.setdefault(tensor.key, (adapter, tensor))
            if not keep_first and known is not tensor and not _same_bytes(known, tensor):
                raise AdapterError(
                    f"'{tensor.key}' is no LoRA factor and differs between {holder.source} and {adapter.source}; such "
                    f"tensors (trained heads, embeddings) are not added up: --keep-first takes that of {holder.source}"
                )
    return [tensor for _, tensor in kept.values()]


def _same_bytes(one: PassThrough, other: PassThrough) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(first == second for first, second in zip(one.chunks(), other.chunks(), strict=True))


def _config(adapters: Sequence[Adapter], specs: Mapping[str, LayerSpec]) -> dict[str, Any]:
    """The first's; where others adapt more modules, these are listed one by one."""
    config = dict(adapters[0].config)
    if adapters[0].format != "peft":
        return config
    if len(specs) > len(adapters[0].layers):
        modules = [whole(name) for name, spec in specs.items() if spec.kind != "expert"]
        config["target_modules"] = sorted(set(modules))
        config |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    # What says that there are tensors besides the factors has to say so of those of all adapters.
    saved = [name for adapter in adapters for name in adapter.config.get("modules_to_save") or ()]
    if saved:
        config["modules_to_save"] = list(dict.fromkeys(saved))
    if tokens := next((adapter.config[_TOKENS] for adapter in adapters if adapter.config.get(_TOKENS)), None):
        config[_TOKENS] = tokens
    biases = [adapter.config.get("bias") for adapter in adapters]
    if trained := next((which for which in ("all", "lora_only") if which in biases), None):
        config["bias"] = trained
    return config


def _without_provenance(adapter: Adapter) -> dict[str, str]:
    return {key: text for key, text in adapter.metadata.items() if key not in (ENTRY, PROVENANCE)}


def _hash_along(adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        adapter.hash_along()


def _sources(adapters: Sequence[Adapter], weights: Sequence[float], *, hashed: bool) -> str:
    """What a merge is made of, as JSON; of the same length with and without the hashes."""
    entries = [
        {"sha256": (adapter.sha256() if hashed else "") or "0" * 64, "weight": weight}
        for weight, adapter in zip(weights, adapters, strict=True)
    ]
    return json.dumps(entries)


def _notes(adapters: Sequence[Adapter], specs: Mapping[str, LayerSpec], kept: Iterable[PassThrough]) -> tuple[str, ...]:
    notes = list(dict.fromkeys(note for adapter in adapters for note in adapter.notes))
    for adapter in adapters:
        if absent := [name for name in specs if name not in adapter.layers]:
            notes.append(
                f"{adapter.source} does not adapt {len(absent)} of the {len(specs)} layers (first: {absent[0]}); "
                "its update counts as zero there"
            )
    own = {tensor.key for tensor in adapters[0].pass_through}
    if others := [tensor.key for tensor in kept if tensor.key not in own]:
        notes.append(f"{len(others)} tensors that only other adapters have are kept as they are (first: {others[0]})")
    return tuple(notes)
