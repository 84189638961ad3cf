"""The same update, written another way: rsLoRA as plain LoRA, ranks padded, the scale in the factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from lora_squeeze.adapter import Adapter, LoraLayer, PassThrough
from lora_squeeze.errors import AdapterError
from lora_squeeze.formats.tensors import DTYPES, memory_of
from lora_squeeze.peft_names import BIAS

__all__ = ["as_plain_lora", "padded", "scale_in_factors", "states_scales"]


def as_plain_lora(adapter: Adapter) -> Adapter:
    """rsLoRA written as plain LoRA: lora_alpha changes, the effective scales do not."""
    return replace(adapter, config={**adapter.config, "use_rslora": False})


def padded(adapter: Adapter) -> Adapter:
    """All layers with the largest rank: the missing rows and columns are zeros and change nothing."""
    rank = adapter.rank
    if all(spec.rank == rank for spec in adapter.layers.values()):
        return adapter

    def padded_layer(name: str, read: Callable[[str], LoraLayer]) -> LoraLayer:
        layer = read(name)
        missing = rank - layer.down.shape[0]
        down = torch.cat([layer.down, layer.down.new_zeros(missing, layer.down.shape[1])])
        up = torch.cat([layer.up, layer.up.new_zeros(layer.up.shape[0], missing)], dim=1)
        return replace(layer, down=down, up=up)

    return replace(
        adapter,
        layers={name: replace(spec, rank=rank) for name, spec in adapter.layers.items()},
        load=partial(padded_layer, read=adapter.load),
        borrow=partial(padded_layer, read=adapter.borrow),
    )


def states_scales(adapter: Adapter) -> bool:
    """Whether a layer has a scale other than 1, or an alpha tensor."""
    return any(spec.scale != 1 or spec.alpha_dtype for spec in adapter.layers.values())


def scale_in_factors(adapter: Adapter) -> Adapter:
    """The scale in the factor `up` and its bias, so that alpha is the rank and need not be written.

    An adapter whose scales are 1 and that has no alpha tensors comes back as it is. Raises AdapterError, when a layer
    is loaded, where its factors overflow.
    """
    if not states_scales(adapter):
        return adapter
    layers = {name: replace(spec, scale=1.0, alpha_dtype="") for name, spec in adapter.layers.items()}

    def times_scale(values: torch.Tensor, name: str, dtype: str) -> torch.Tensor:
        scale = adapter.layers[name].scale
        product = (values.double() * scale).to(DTYPES[dtype])
        if not torch.isfinite(product).all():
            raise AdapterError(
                f"{adapter.source}: layer '{name}': with its scale {scale:g} in the factors they overflow "
                f"{dtype}; squeeze it with --dtype bf16 or f32 first"
            )
        return product

    def scaled(name: str, read: Callable[[str], LoraLayer]) -> LoraLayer:
        layer = read(name)
        if layer.scale == 1:
            return layer
        return replace(layer, up=times_scale(layer.up, name, layers[name].up_dtype), scale=1.0)

    def scaled_bias(bias: PassThrough) -> PassThrough:
        name = bias.key.removesuffix(BIAS)
        if name == bias.key or name not in adapter.layers or adapter.layers[name].scale == 1:
            return bias
        if bias.dtype not in DTYPES:
            raise AdapterError(
                f"{adapter.source}: '{bias.key}' has dtype {bias.dtype}, so the layer's scale cannot go into it; "
                "convert it to a floating dtype first"
            )

        def chunks() -> Iterator[bytes]:
            stored = torch.frombuffer(bytearray(b"".join(bias.chunks())), dtype=DTYPES[bias.dtype])
            product = times_scale(stored, name, bias.dtype)  # named, so that it outlives the view of its memory
            yield bytes(memory_of(product))

        return replace(bias, chunks=chunks)

    scales = sorted({spec.scale for spec in adapter.layers.values()} - {1.0})
    notes = (f"the scale ({scales[0]:g}{', …' if len(scales) > 1 else ''}) goes into the factors",) if scales else ()
    config = {key: value for key, value in adapter.config.items() if not key.endswith(".use_rslora")}
    return replace(
        adapter,
        layers=layers,
        config=config,
        load=partial(scaled, read=adapter.load),
        borrow=partial(scaled, read=adapter.borrow),
        pass_through=tuple(map(scaled_bias, adapter.pass_through)),
        notes=(*adapter.notes, *notes),
    )
