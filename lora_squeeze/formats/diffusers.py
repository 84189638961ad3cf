"""diffusers files: one safetensors file whose keys begin with the part of the pipeline they belong to.

Where the scale of a module stands (read off diffusers 0.42, utils/peft_utils.py:_create_lora_config):

- in the header under `lora_adapter_metadata`: the fields of a LoraConfig for each part, such as
  "unet.r". All pipelines read it, and one that finds it takes ranks and scales from nowhere else.
- in a tensor NAME.alpha: alpha / rank. Flux and Qwen-Image read it; Stable Diffusion (1, 2, XL, 3)
  refuses files with such tensors, and Flux refuses files with both.
- nowhere: the scale is 1. Older versions got that wrong where ranks differ.

So a file is written in the way its scales were found, and where ranks come to differ in a file
that says nothing, it gets the header.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_squeeze.adapter import Adapter, LayerSpec
from lora_squeeze.documents import parse_json
from lora_squeeze.errors import AdapterError
from lora_squeeze.formats.pairs import (
    Factors,
    adapter_of,
    blocks_of,
    find_alphas,
    pick_alpha_dtype,
    read_alpha,
    read_pair,
    refuse_other_methods,
)
from lora_squeeze.formats.peft_config import Rules, alpha_of
from lora_squeeze.formats.peft_patterns import grouped
from lora_squeeze.formats.tensors import SafetensorsFile, read_safetensors
from lora_squeeze.formats.writing import Block, safetensors_size, write_safetensors
from lora_squeeze.peft_names import BIAS

__all__ = ["CONFIG_KEY", "component_of", "diffusers_size", "is_diffusers", "open_diffusers", "write_diffusers"]

CONFIG_KEY = "lora_adapter_metadata"

# Parts of a pipeline that take adapters; "diffusion_model" is ComfyUI's name for the denoiser.
_COMPONENT = re.compile(r"(unet|transformer|text_encoder|controlnet|prior|diffusion_model|connectors)(_\d+)?")
_FACTOR = re.compile(
    r"(?P<module>.+?)(?P<link>\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)"
    r"(?P<factor>A|B|down|up)(?:\.default)?\.weight"
)
_TEXT_MODEL = "text_model."
_SIDE = {"A": "down", "down": "down", "B": "up", "up": "up"}


def is_diffusers(file: SafetensorsFile) -> bool:
    """Whether there is a LoRA pair, or one of another method, that belongs to a part of a pipeline."""
    return any(component_of(key) and (".lora" in key or "_lora." in key or ".lokr_" in key) for key in file.tensors)


def component_of(name: str) -> str:
    """The part of a pipeline that a key or a layer belongs to; "" if its first word is none."""
    first = name.partition(".")[0]
    return first if _COMPONENT.fullmatch(first) else ""


def open_diffusers(path: Path) -> Adapter:
    """Read names, shapes and scales; no factor is loaded.

    Raises AdapterError if the file is damaged, a pair incomplete or a scale contradictory,
    UnsupportedAdapter if its method is not LoRA.
    """
    file = read_safetensors(path)
    refuse_other_methods(file)
    config = _read_config(file)
    modules = _modules(file)
    others = find_alphas(file, modules)
    rules = _rules(config, file)
    layers = {name: _layer_spec(name, keys, file, rules) for name, keys in modules.items()}
    return adapter_of(file, modules, layers, form="diffusers", others=others, config=config)


def write_diffusers(adapter: Adapter, path: Path) -> Path:
    """Write a new file; return its path."""
    write_safetensors(
        path, _blocks(adapter), _metadata(adapter), expect=adapter.expect, late_metadata=adapter.late_metadata
    )
    return path


def diffusers_size(adapter: Adapter) -> int:
    """The exact size in bytes of the file that `write_diffusers` would write; computes no tensor."""
    return safetensors_size(_blocks(adapter), _metadata(adapter))


def _read_config(file: SafetensorsFile) -> dict[str, Any]:
    text = file.metadata.get(CONFIG_KEY)
    if text is None:
        return {}
    try:
        config = parse_json(text)
    except ValueError as error:
        raise AdapterError(f"{file.path}: '{CONFIG_KEY}' in the header is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file.path}: '{CONFIG_KEY}' in the header must be a JSON object")
    return config


def _modules(file: SafetensorsFile) -> Factors:
    modules: Factors = {}
    for key in file.tensors:
        if match := _FACTOR.fullmatch(key):
            if not component_of(key):
                raise AdapterError(
                    f"{file.path}: '{key}' begins with no part of a pipeline (unet., transformer., text_encoder., …), "
                    "so it is not known what it belongs to; save it with diffusers' save_lora_weights"
                )
            keys = modules.setdefault(match["module"], {})
            if keys.setdefault(_SIDE[match["factor"]], key) != key:
                raise AdapterError(f"{file.path}: '{key}' and '{keys[_SIDE[match['factor']]]}' are the same factor")
    for keys in modules.values():
        if len(keys) < 2:
            (present,) = keys.values()
            raise AdapterError(f"{file.path}: '{present}' has no other factor beside it; the file is incomplete")
    return modules


def _rules(config: Mapping[str, Any], file: SafetensorsFile) -> dict[str, Rules]:
    """What the header declares, as PEFT reads it: part of the pipeline → rule of ranks and scales."""
    parts = [key.removesuffix(".r") for key in config if key.endswith(".r")]
    return {part: Rules({f"{part}.lora_alpha": 8, **config}, file.path, prefix=f"{part}.") for part in parts}


def _layer_spec(name: str, keys: Mapping[str, str], file: SafetensorsFile, rules: Mapping[str, Rules]) -> LayerSpec:
    spec = read_pair(file, name, keys["down"], keys["up"])
    declared = _declared_scale(spec, rules, file)
    if "alpha" in keys:
        scale = read_alpha(file, keys["alpha"]) / spec.rank
        if declared is not None and not math.isclose(scale, declared, rel_tol=1e-6):
            raise AdapterError(
                f"{file.path}: '{keys['alpha']}' gives the scale {scale:g}, '{CONFIG_KEY}' in the header {declared:g}; "
                "remove the one that is wrong"
            )
        return replace(spec, scale=scale, alpha_dtype=file.tensors[keys["alpha"]].dtype)
    return spec if declared is None else replace(spec, scale=declared)


def _declared_scale(spec: LayerSpec, rules: Mapping[str, Rules], file: SafetensorsFile) -> float | None:
    """The scale that the header gives a layer; None if it says nothing."""
    component = component_of(spec.name)
    if component not in rules:
        return None
    name = spec.name.removeprefix(f"{component}.")
    rank = rules[component].declared_rank(name)
    if rank != spec.rank:
        raise AdapterError(
            f"{file.path}: '{CONFIG_KEY}' in the header declares rank {rank} for '{spec.name}', but its factors have "
            f"{spec.rank}; save the adapter again"
        )
    return rules[component].scale(name, rank)


def _blocks(adapter: Adapter) -> list[Block]:
    with_alpha = any(spec.alpha_dtype for spec in adapter.layers.values())
    alphas = {spec.name: pick_alpha_dtype(spec) for spec in adapter.layers.values()} if with_alpha else {}
    return blocks_of(adapter, _keys, alphas=alphas)


def _keys(spec: LayerSpec) -> tuple[str, ...]:
    return spec.keys or (f"{spec.name}.lora_A.weight", f"{spec.name}.lora_B.weight")


def _metadata(adapter: Adapter) -> dict[str, str]:
    metadata = {**adapter.metadata, "format": "pt"}
    if config := _config_for(adapter):
        metadata[CONFIG_KEY] = json.dumps(config, indent=2, sort_keys=True)
    return metadata


def _config_for(adapter: Adapter) -> dict[str, Any]:
    """The LoraConfig fields of every part, if the source had them or if nothing else would give the scales."""
    layers = adapter.layers.values()
    with_alpha = any(spec.alpha_dtype for spec in layers)
    plain = all(spec.scale == 1 for spec in layers) and len({spec.rank for spec in layers}) == 1
    if not adapter.config and (with_alpha or plain):
        return {}
    config = dict(adapter.config)
    for component in dict.fromkeys(component_of(spec.name) for spec in layers):
        own = [spec for spec in layers if component_of(spec.name) == component]
        config.update(_component_config(component, own, adapter))
    return config


def _component_config(component: str, layers: list[LayerSpec], adapter: Adapter) -> dict[str, Any]:
    rank = max(spec.rank for spec in layers)
    scales = [spec.scale for spec in layers]
    scale = Counter(scales).most_common(1)[0][0]
    root = bool(adapter.config.get(f"{component}.use_rslora", False))
    differing = [spec for spec in layers if spec.rank != rank or spec.scale != scale]
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha_of(scale, rank, root=root),
        "rank_pattern": _patterns({spec.name: spec.rank for spec in differing if spec.rank != rank}, component),
        "alpha_pattern": _patterns(
            {spec.name: alpha_of(spec.scale, spec.rank, root=root) for spec in differing}, component
        ),
    }
    left_out = any(component_of(name) == component for name in adapter.left_out)
    if left_out or f"{component}.target_modules" not in adapter.config:
        config["target_modules"] = sorted(spec.name.removeprefix(f"{component}.") for spec in layers)
    keys = [tensor.key for tensor in adapter.pass_through if component_of(tensor.key) == component]
    if not adapter.config:
        config["use_dora"] = any("lora_magnitude_vector" in key for key in keys)
        config["lora_bias"] = any(key.endswith(BIAS) for key in keys)
    return {f"{component}.{field}": value for field, value in config.items()}


def _patterns(values: Mapping[str, float], component: str) -> dict[str, float]:
    """Patterns that give exactly these layers these values."""
    own = {name.removeprefix(f"{component}."): value for name, value in values.items()}
    # Text encoders lose the first word of their names in newer transformers.
    texts = {name.removeprefix(_TEXT_MODEL): value for name, value in own.items() if name.startswith(_TEXT_MODEL)}
    others = {name: value for name, value in own.items() if not name.startswith(_TEXT_MODEL)}
    optional = {f"^({re.escape(_TEXT_MODEL)})?{key[1:]}": value for key, value in grouped(texts).items()}
    return {**grouped(others), **optional}
