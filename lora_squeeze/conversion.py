"""One format's adapter as another's, wherever names map without the model.

Dots separate modules in PEFT's and diffusers' names; kohya's names have underscores in their place,
so going back needs to know the words. Those of diffusers' UNet2DConditionModel and of CLIP's text
encoders are known; names of other models (and the input_blocks / output_blocks of Stable
Diffusion's first implementation, whose numbers depend on the UNet's configuration) do not map.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lora_squeeze.adapter import Adapter, LayerSpec, LoraLayer, PassThrough, whole
from lora_squeeze.errors import UnsupportedAdapter
from lora_squeeze.formats.diffusers import CONFIG_KEY, component_of
from lora_squeeze.formats.dora import KEPT_NOTE, magnitude_module
from lora_squeeze.formats.kohya import PARTS
from lora_squeeze.peft_names import BIAS, PREFIX
from lora_squeeze.provenance import ENTRY, stated
from lora_squeeze.rewriting import scale_in_factors, states_scales

__all__ = ["convert", "rewritten"]

# What the words of kohya's names are, longest first: "to_out" is one word, "attn1_to" are two.
_UNET_WORDS = (
    "down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers transformer_blocks attn1 attn2 "
    "to_q to_k to_v to_out ff net proj_in proj_out proj conv_shortcut conv_in conv_out conv1 conv2 conv "
    "time_emb_proj time_embedding add_embedding linear_1 linear_2"
)
_CLIP_WORDS = "text_model text_projection encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2"
# The part of a pipeline → the words of its names.
_WORDS = {"unet": _UNET_WORDS, "text_encoder": _CLIP_WORDS, "text_encoder_2": _CLIP_WORDS}

# Metadata that describes a kohya file's own tensors: it would be wrong of another.
_KOHYA_ONLY = re.compile(r"sshs_.*|modelspec\.hash_sha256|ss_network_(dim|alpha|args|module)")

# The first words of a PEFT adapter's names → the part of a pipeline that has such modules.
_FIRST_WORDS = {
    "unet": ("down_blocks", "up_blocks", "mid_block", "time_embedding", "add_embedding"),
    "transformer": ("transformer_blocks", "single_transformer_blocks", "context_embedder", "x_embedder"),
    "text_encoder": ("text_model",),
}


def convert(adapter: Adapter, to: str) -> Adapter:
    """The same update in another format; lazily, when it is saved.

    to
        "peft", "kohya" or "diffusers". kohya files get an alpha tensor for every module. In diffusers
        files the scale goes into the factors, so that it is right for programs that read no header
        and for those that refuse alpha tensors. An adapter that has the format already stays as it is.

    Raises UnsupportedAdapter if names do not map without the model or a tensor has no place there.
    """
    if adapter.format == to and not (to == "diffusers" and states_scales(adapter)):
        return adapter
    via_diffusers = adapter if adapter.format == "diffusers" else _to_diffusers(adapter)
    converted = {"diffusers": scale_in_factors, "kohya": _to_kohya, "peft": _to_peft}[to](via_diffusers)
    left_behind = ", ".join(adapter.files)
    notes = (f"a {to} adapter is one file, so these stay behind: {left_behind}",) if left_behind else ()
    return _told(replace(converted, format=to, files={}, notes=(*converted.notes, *notes)), adapter)


def rewritten(adapter: Adapter) -> Adapter:
    """An adapter in the format that it has, as one that is made of the file: with what reading it put right."""
    return _told(adapter, adapter)


def _told(converted: Adapter, adapter: Adapter) -> Adapter:
    """What is made of an adapter, with the provenance that says so."""
    ranks = {name: spec.rank for name, spec in converted.layers.items()}
    policy = f"convert to {converted.format}"
    made = stated(adapter, policy, ranks=ranks, layers=converted.layers, relative_error=math.nan)

    def late_metadata(fingerprint: str) -> dict[str, str]:
        inherited = adapter.late_metadata(fingerprint) if adapter.late_metadata else {}
        final = replace(made, source_sha256=adapter.sha256(), tensors_sha256=fingerprint)
        return {**inherited, ENTRY: final.to_json()}

    return replace(
        converted,
        metadata={**converted.metadata, ENTRY: made.to_json()},
        late_metadata=late_metadata,
        deviations={},
        notes=tuple(note for note in converted.notes if note != KEPT_NOTE),  # nothing is squeezed here
    )


def _to_diffusers(adapter: Adapter) -> Adapter:
    """Names and configuration as diffusers has them; the scales stay."""
    if adapter.format == "kohya":
        metadata = {key: value for key, value in adapter.metadata.items() if not _KOHYA_ONLY.fullmatch(key)}
        return replace(_renamed(adapter, _diffusers_name, "diffusers"), metadata=metadata)
    component = _component_of_peft(adapter)
    config = {f"{component}.{field}": value for field, value in adapter.config.items() if not field.startswith("_")}
    return replace(_renamed(adapter, lambda name: f"{component}.{name}", "diffusers"), config=config)


def _to_kohya(adapter: Adapter) -> Adapter:
    two_encoders = any(component_of(name) == "text_encoder_2" for name in adapter.layers)
    prefixes = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_" if two_encoders else "lora_te_",
        "text_encoder_2": "lora_te2_",
        "transformer": "lora_transformer_",
    }

    def name_of(name: str) -> str:
        component = component_of(name)
        if component not in prefixes:
            raise UnsupportedAdapter(
                f"{adapter.source}: kohya's format has no name for the part '{component}' of layer '{name}'; "
                "ComfyUI reads the file as it is"
            )
        own = _plain_name(name).removeprefix(f"{component}.")
        return prefixes[component] + own.replace(".", "_")

    converted = _renamed(adapter, name_of, "kohya")
    layers = {
        name: replace(spec, keys=(), alpha_dtype=spec.alpha_dtype or "F32") for name, spec in converted.layers.items()
    }
    metadata = {key: value for key, value in adapter.metadata.items() if key != CONFIG_KEY}
    note = "lora_transformer_ names are OneTrainer's: ComfyUI reads them, sd-scripts has other names for these models"
    notes = (note,) if any(name.startswith("lora_transformer_") for name in layers) else ()
    return replace(converted, layers=layers, metadata=metadata, notes=(*converted.notes, *notes))


def _to_peft(adapter: Adapter) -> Adapter:
    components = list(dict.fromkeys(component_of(name) for name in adapter.layers))
    if len(components) > 1:
        raise UnsupportedAdapter(
            f"{adapter.source}: a PEFT adapter is for one model, and this has layers of {' and '.join(components)}; "
            "it can stay one file as diffusers or kohya"
        )
    prefix = f"{components[0]}."
    own = {key.removeprefix(prefix): value for key, value in adapter.config.items() if key.startswith(prefix)}
    converted = _renamed(adapter, lambda name: _plain_name(name).removeprefix(prefix), "peft")
    keys = [tensor.key for tensor in converted.pass_through]
    config: dict[str, Any] = {
        "target_modules": sorted(converted.layers),
        "use_dora": any(map(magnitude_module, keys)),
        "lora_bias": any(key.endswith(BIAS) for key in keys),
        "base_model_name_or_path": None,
        "inference_mode": True,
        **own,
        "peft_type": "LORA",
    }
    metadata = {key: value for key, value in adapter.metadata.items() if key != CONFIG_KEY}
    return replace(converted, config=config, metadata=metadata, single_file=adapter.single_file)


def _renamed(adapter: Adapter, name_of: Callable[[str], str], to: str) -> Adapter:
    """The adapter with other names for layers and for what belongs to them, and without a configuration."""
    names = {old: name_of(old) for old in adapter.layers}
    doubled = [name for name, count in Counter(names.values()).items() if count > 1]
    if doubled:
        raise UnsupportedAdapter(f"{adapter.source}: two layers would both be named '{doubled[0]}'")
    for spec in adapter.layers.values():
        if spec.kind not in ("linear", "conv") or whole(spec.name) != spec.name:
            what = "an embedding" if spec.kind == "embedding" else "a part of a module"
            raise UnsupportedAdapter(f"{adapter.source}: layer '{spec.name}' is {what}; only PEFT's format has those")
    old_names = {new: old for old, new in names.items()}

    def read(name: str, original: Callable[[str], LoraLayer]) -> LoraLayer:
        return replace(original(old_names[name]), name=name)

    return replace(
        adapter,
        format="diffusers",
        layers={names[old]: _renamed_spec(spec, names[old]) for old, spec in adapter.layers.items()},
        load=partial(read, original=adapter.load),
        borrow=partial(read, original=adapter.borrow),
        pass_through=tuple(_carried(tensor, adapter, names, to) for tensor in adapter.pass_through),
        config={},
    )


def _renamed_spec(spec: LayerSpec, name: str) -> LayerSpec:
    return replace(spec, name=name, keys=(), stored_as="")


def _carried(tensor: PassThrough, adapter: Adapter, names: Mapping[str, str], to: str) -> PassThrough:
    """A layer's own tensor under its name in the other format. Raises UnsupportedAdapter for all other tensors."""
    module = magnitude_module(tensor.key)
    layer = (module or tensor.key.removesuffix(BIAS)).removeprefix(PREFIX)
    prefix = PREFIX if to == "peft" else ""
    if layer in names and module:
        shape = _magnitude_shape(tensor, adapter, adapter.layers[layer], to)
        suffix = ".dora_scale" if to == "kohya" else ".lora_magnitude_vector"
        return replace(tensor, key=f"{prefix}{names[layer]}{suffix}", shape=shape, layer=names[layer])
    if layer in names and to != "kohya":
        return replace(tensor, key=f"{prefix}{names[layer]}{BIAS}", layer="")
    raise UnsupportedAdapter(
        f"{adapter.source}: tensor '{tensor.key}' is no factor of a LoRA pair, and it is not known what it is "
        "called in the other format; keep the format"
    )


def _magnitude_shape(tensor: PassThrough, adapter: Adapter, spec: LayerSpec, to: str) -> tuple[int, ...]:
    """How the other format lays out a magnitude for each output. Raises UnsupportedAdapter for those of inputs."""
    outputs, ones = spec.out_features, (1,) * len(spec.kernel)
    of_outputs = {(outputs, 1, *ones)} if tensor.key.endswith(".dora_scale") else {(outputs,), (1, outputs, *ones)}
    if tensor.shape not in of_outputs:
        raise UnsupportedAdapter(
            f"{adapter.source}: '{tensor.key}' has shape {list(tensor.shape)} and not one number for each of {outputs} "
            "outputs; norms of inputs are known to kohya's format alone: keep the format"
        )
    if to == "kohya":
        return (outputs, 1, *ones)
    return (1, outputs, *ones) if spec.kernel else (outputs,)


def _plain_name(name: str) -> str:
    """diffusers' old spelling of attention modules, which had a processor between, as the model names them."""
    plain = name.replace(".processor.", ".")
    if plain != name and plain.endswith(".to_out"):
        plain += ".0"
    return plain


def _component_of_peft(adapter: Adapter) -> str:
    first_words = {name.partition(".")[0] for name in adapter.layers}
    for component, words in _FIRST_WORDS.items():
        if first_words <= set(words):
            return component
    name = next(iter(adapter.layers))
    raise UnsupportedAdapter(
        f"{adapter.source}: layer '{name}' belongs to no part of a diffusers pipeline that is known by its names; "
        "load it with PEFT and save it with the pipeline's save_lora_weights"
    )


def _diffusers_name(name: str) -> str:
    """A kohya name with its dots. Raises UnsupportedAdapter where only the model could tell."""
    if component_of(name):
        return name  # dots and all: musubi-tuner and others write these
    for prefix, component in PARTS.items():
        words = _WORDS.get(component, "")
        if name.startswith(prefix) and words and (parts := _split(name.removeprefix(prefix), words)):
            return ".".join((component, *parts))
    raise UnsupportedAdapter(
        f"layer '{name}': kohya's names have underscores for dots, and without the model only those of a diffusers "
        "UNet and of CLIP's text encoders can be told apart; ComfyUI and diffusers load the kohya file as it is"
    )


def _split(name: str, words: str) -> list[str]:
    """The name's words; empty if it has others."""
    one = r"\d+|" + "|".join(sorted(words.split(), key=len, reverse=True))
    if not re.fullmatch(rf"({one})(_({one}))*", name):
        return []
    return re.findall(rf"(?:^|(?<=_))({one})(?=_|$)", name)
