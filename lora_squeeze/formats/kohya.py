"""kohya / ComfyUI / LyCORIS-LoCon files: one safetensors file of lora_down, lora_up and alpha tensors.

The update of a module is alpha / rank · lora_up · lora_down; without an alpha tensor the scale is 1.
A convolution in CP form has a lora_mid between 1×1 factors (lycoris/functional/general.py,
rebuild_tucker): W[o, c, …] = Σ_ij up[o, i] · mid[i, j, …] · down[j, c]. Folded into `down`, that is
a plain pair of the same rank.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

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
from lora_squeeze.formats.tensors import SafetensorsFile, read_safetensors
from lora_squeeze.formats.writing import Block, safetensors_size, write_safetensors

__all__ = ["PARTS", "is_kohya", "kohya_size", "open_kohya", "write_kohya"]

# What the tools put before the names of modules → the part of a pipeline that these belong to.
PARTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
    "lycoris_": "",
}

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>down|up|mid)\.weight")
# LyCORIS and sd-scripts name modules of these; what they hold besides LoRA is refused by its method's name.
_OTHER = re.compile(r".+\.(hada_w|lokr_w|oft_blocks|oft_diag|on_input).*")

# Hashes of the tensors, as sd-scripts takes them (library/train_util.py, precalculate_safetensors_hashes).
_HASHES = {"sshs_model_hash": "", "modelspec.hash_sha256": "0x"}
_LEGACY_HASH = "sshs_legacy_hash"


def is_kohya(file: SafetensorsFile) -> bool:
    """Whether these are the tensors of a kohya file, or of a LyCORIS file of another method."""
    return any(_FACTOR.fullmatch(key) or _OTHER.fullmatch(key) for key in file.tensors)


def open_kohya(path: Path) -> Adapter:
    """Read names, shapes and alphas; no factor is loaded.

    Raises AdapterError if the file is damaged or a module incomplete, UnsupportedAdapter if its
    method is not LoRA.
    """
    file = read_safetensors(path)
    refuse_other_methods(file)
    modules = _modules(file)
    others = find_alphas(file, modules)
    layers = {name: _layer_spec(name, keys, file) for name, keys in modules.items()}
    notes = _notes(layers, file.metadata)
    adapter = adapter_of(file, modules, layers, form="kohya", others=others, config={}, notes=notes)
    folded = next((spec.name for spec in layers.values() if spec.folded), None)
    cp_form = f"convolution '{folded}' is in CP form, with a lora_mid between its factors"
    return adapter if folded is None else replace(adapter, deviations={"cp form": cp_form})


def write_kohya(adapter: Adapter, path: Path) -> Path:
    """Write a new file; return its path. Hashes of the tensors are taken anew."""
    blocks, metadata = _blocks(adapter), _metadata(adapter)
    data_bytes = sum(spec.nbytes for block in blocks for spec in block.specs)
    data_start = kohya_size(adapter) - data_bytes

    def late(fingerprint: str) -> Mapping[str, str]:
        found = dict(adapter.late_metadata(fingerprint)) if adapter.late_metadata else {}
        hashes = [key for key in _HASHES if key in metadata]
        if hashes:
            digest = _sha256_from(path, data_start)
            found.update({key: _HASHES[key] + digest for key in hashes})
        return found

    write_safetensors(path, blocks, metadata, expect=adapter.expect, late_metadata=late)
    return path


def kohya_size(adapter: Adapter) -> int:
    """The exact size in bytes of the file that `write_kohya` would write; computes no tensor."""
    return safetensors_size(_blocks(adapter), _metadata(adapter))


def _modules(file: SafetensorsFile) -> Factors:
    modules: Factors = {}
    for key in file.tensors:
        if match := _FACTOR.fullmatch(key):
            modules.setdefault(match["module"], {})[match["factor"]] = key
    for name, keys in modules.items():
        missing = next((factor for factor in ("down", "up") if factor not in keys), None)
        if missing:
            present = next(iter(keys.values()))
            raise AdapterError(
                f"{file.path}: '{present}' has no '{name}.lora_{missing}.weight' beside it; the file is incomplete"
            )
    return modules


def _layer_spec(name: str, keys: Mapping[str, str], file: SafetensorsFile) -> LayerSpec:
    spec = read_pair(file, name, keys["down"], keys["up"], middle_key=keys.get("mid", ""))
    if "alpha" not in keys:
        return spec
    alpha = read_alpha(file, keys["alpha"])
    return replace(spec, scale=alpha / spec.rank, alpha_dtype=file.tensors[keys["alpha"]].dtype)


def _notes(layers: Mapping[str, LayerSpec], metadata: Mapping[str, str]) -> Iterator[str]:
    folded = [spec.name for spec in layers.values() if spec.folded]
    if folded:
        yield (
            f"{len(folded)} convolutions in CP form (lora_mid) are written as plain lora_down / lora_up pairs of the "
            f"same update, which can take more bytes at the same rank (first: {folded[0]})"
        )
    if _LEGACY_HASH in metadata:
        yield f"{_LEGACY_HASH} is left out: it hashes 64 KiB of the file as it was before squeezing"


def _blocks(adapter: Adapter) -> list[Block]:
    alphas = {
        spec.name: pick_alpha_dtype(spec) for spec in adapter.layers.values() if spec.alpha_dtype or spec.scale != 1
    }
    return blocks_of(adapter, _keys, alphas=alphas)


def _keys(spec: LayerSpec) -> tuple[str, ...]:
    return spec.keys or (f"{spec.name}.lora_down.weight", f"{spec.name}.lora_up.weight")


def _metadata(adapter: Adapter) -> dict[str, str]:
    """The file's metadata with the ranks and alphas that are written, and hashes yet to be filled in."""
    metadata = {key: value for key, value in adapter.metadata.items() if key != _LEGACY_HASH}
    metadata.update({key: prefix + "0" * 64 for key, prefix in _HASHES.items() if key in metadata})
    spatial = [spec for spec in adapter.layers.values() if any(size > 1 for size in spec.kernel)]
    others = [spec for spec in adapter.layers.values() if all(size == 1 for size in spec.kernel)]
    arguments = _network_arguments(metadata)
    if spatial and "conv_dim" in arguments:
        arguments["conv_dim"] = _one_of(str(spec.rank) for spec in spatial)
        if "conv_alpha" in arguments:
            arguments["conv_alpha"] = _one_of(f"{spec.scale * spec.rank:g}" for spec in spatial)
        metadata["ss_network_args"] = json.dumps(arguments)
        described = others
    else:
        described = [*others, *spatial]
    if described and "ss_network_dim" in metadata:
        metadata["ss_network_dim"] = _one_of(str(spec.rank) for spec in described)
    if described and "ss_network_alpha" in metadata:
        metadata["ss_network_alpha"] = _one_of(str(float(spec.scale * spec.rank)) for spec in described)
    return metadata


def _network_arguments(metadata: Mapping[str, str]) -> dict[str, object]:
    try:
        arguments = parse_json(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _one_of(values: Iterator[str]) -> str:
    """The value that all have, or "Dynamic", as sd-scripts' networks/resize_lora.py says it."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "Dynamic"


def _sha256_from(path: Path, start: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
