"""PEFT adapters: a folder with adapter_config.json and adapter_model.safetensors (or .bin).

Which rank and scale a module has follows PEFT's own rule: the first key of rank_pattern (and of
alpha_pattern) for which re.match(rf"(.*\\.)?({key})$", name) holds, on names without the prefix
`base_model.model.`; otherwise r and lora_alpha. scale = alpha / rank, rsLoRA alpha / √rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lora_squeeze.adapter import Adapter, LayerSpec, LoraLayer, PassThrough
from lora_squeeze.errors import AdapterError, UnsupportedAdapter
from lora_squeeze.formats.tensors import (
    DTYPES,
    Block,
    SafetensorsFile,
    TensorSpec,
    dtype_name,
    memory_of,
    read_safetensors,
    safetensors_size,
    sha256_of_file,
    write_safetensors,
)

__all__ = ["open_peft", "peft_size", "sniff_peft", "write_peft"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>A|B)\.weight|(?P<embedding>.+)\.lora_embedding_(?P<side>A|B)")

# What a training run leaves beside a checkpoint: it belongs to the source's rank, not to the adapter.
_TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|scaler)\.(pt|bin)|rng_state.*\.pth|trainer_state\.json|training_args\.bin"
    r"|pytorch_model_fsdp.*|checkpoint-\d+|global_step\d+|runs|\..*"
)

# Initialisations that change the base weights: the update is relative to a base nobody has.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Fields that change what the two factors mean.
_NOT_PLAIN = {
    "kasa_config": "KaSA puts a trained diagonal between the factors",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "use_qalora": "QA-LoRA's lora_A works on pooled inputs",
    "target_parameters": "it targets parameters of experts, whose factors are stored interleaved",
}


def sniff_peft(path: Path) -> bool:
    """Whether this folder looks like a PEFT adapter."""
    return path.is_dir() and any((path / name).exists() for name in (CONFIG, WEIGHTS, PICKLED_WEIGHTS))


def open_peft(path: Path) -> Adapter:
    """Read the configuration and the tensors' names and shapes; no tensor is loaded.

    Raises AdapterError if a file is missing or damaged or the tensors contradict the
    configuration, UnsupportedAdapter if the factors are not a plain low-rank update.
    """
    config = _read_config(path / CONFIG)
    tensors = _open_tensors(path)
    pairs, other = _pair(tensors, path)
    if not pairs:
        raise AdapterError(f"{tensors.path}: holds no lora_A / lora_B pair; is this a LoRA adapter?")
    rules = _Rules(config, path / CONFIG)
    layers = {name: _layer_spec(name, pair, tensors, rules) for name, pair in pairs.items()}

    def read(name: str, down_as: str = "", up_as: str = "") -> LoraLayer:
        spec, pair = layers[name], pairs[name]
        return LoraLayer(
            name=name,
            down=tensors.read(pair["A"], borrow_as=down_as).reshape(spec.rank, spec.in_features),
            up=tensors.read(pair["B"], borrow_as=up_as).reshape(spec.out_features, spec.rank),
            scale=spec.scale,
        )

    files, left_behind = _other_files(path)
    return Adapter(
        source=str(path),
        format="peft",
        layers=layers,
        load=read,
        borrow=partial(read, down_as="down", up_as="up"),
        pass_through=tuple(_pass_through(key, tensors) for key in other),
        config=config,
        metadata=tensors.metadata,
        files=files,
        weights=tensors.path,
        sha256=cache(lambda: sha256_of_file(tensors.path)),
        notes=tuple(_notes(config, tensors.path, left_behind)),
    )


def write_peft(adapter: Adapter, folder: Path) -> Path:
    """Write configuration and tensors into an empty folder; return the file of the weights."""
    config = _config_for(adapter)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    blocks, metadata = _blocks(adapter), _metadata(adapter)
    write_safetensors(folder / WEIGHTS, blocks, metadata, late_metadata=adapter.late_metadata)
    return folder / WEIGHTS


def peft_size(adapter: Adapter) -> int:
    """The exact size in bytes of the weights that `write_peft` would write; computes no tensor."""
    return safetensors_size(_blocks(adapter), _metadata(adapter))


def _blocks(adapter: Adapter) -> list[Block]:
    layers = [_layer_block(spec, adapter.borrow) for spec in adapter.layers.values()]
    return layers + [_pass_through_block(tensor) for tensor in adapter.pass_through]


def _metadata(adapter: Adapter) -> dict[str, str]:
    return {**adapter.metadata, "format": "pt"}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{path}: no such file; a PEFT adapter is a folder with {CONFIG} and {WEIGHTS}") from error
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise AdapterError(f"{path}: not valid JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object with the fields of a LoraConfig")
    _refuse_what_is_not_plain_lora(config, path)
    return config


def _refuse_what_is_not_plain_lora(config: Mapping[str, Any], path: Path) -> None:
    method = config.get("peft_type", "LORA")
    if method != "LORA":
        raise UnsupportedAdapter(
            f"{path}: peft_type is {method}, not LORA; convert it with PEFT's convert_to_lora, then squeeze the result"
        )
    for field, meaning in _NOT_PLAIN.items():
        if config.get(field):
            raise UnsupportedAdapter(f"{path}: {field} is set; {meaning}, which cannot be squeezed")
    initialisation = config.get("init_lora_weights", True)
    if isinstance(initialisation, str) and initialisation.lower().startswith(_CHANGED_BASE):
        raise UnsupportedAdapter(
            f"{path}: init_lora_weights is '{initialisation}', which changed the base weights, so these factors are "
            "not an update of the published model; convert the adapter when saving it: "
            "model.save_pretrained(path, path_initial_model_for_weight_conversion=…), then squeeze the result"
        )


class _Rules:
    """The rank and the scale that a configuration declares for each module."""

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self.path = path
        self.rank = _number(config, "r", path, whole=True)
        self.alpha = _number(config, "lora_alpha", path)
        self.root = bool(config.get("use_rslora", False))
        self.ranks = _patterns(config, "rank_pattern", path, whole=True)
        self.alphas = _patterns(config, "alpha_pattern", path)

    def declared_rank(self, name: str) -> int:
        return int(_first_match(self.ranks, name, self.rank))

    def scale(self, name: str, rank: int) -> float:
        return _first_match(self.alphas, name, self.alpha) / (math.sqrt(rank) if self.root else rank)


def _number(config: Mapping[str, Any], field: str, path: Path, *, whole: bool = False) -> float:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{path}: '{field}' must be a number, not {json.dumps(value)}")
    if whole and (value != int(value) or value < 1):
        raise AdapterError(f"{path}: '{field}' must be a whole number of at least 1, not {value}")
    return value


def _patterns(
    config: Mapping[str, Any], field: str, path: Path, *, whole: bool = False
) -> list[tuple[re.Pattern[str], float]]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{path}: '{field}' must map module patterns to numbers")
    compiled: list[tuple[re.Pattern[str], float]] = []
    for key in patterns:
        value = _number(patterns, key, path, whole=whole)
        try:
            compiled.append((re.compile(rf"(.*\.)?({key})$"), value))
        except re.error as error:
            raise AdapterError(f"{path}: '{field}' key '{key}' is not a regular expression: {error}") from error
    return compiled


def _first_match(patterns: list[tuple[re.Pattern[str], float]], name: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(name)), default)


def _open_tensors(path: Path) -> SafetensorsFile | _PickledFile:
    if (path / WEIGHTS).exists():
        return read_safetensors(path / WEIGHTS)
    if (path / PICKLED_WEIGHTS).exists():
        return _PickledFile(path / PICKLED_WEIGHTS)
    raise AdapterError(f"{path / WEIGHTS}: no such file, and no {PICKLED_WEIGHTS} either")


class _PickledFile:
    """A torch.save file, memory-mapped and unpickled with weights_only=True: no code is run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        try:
            state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch.load raises half a dozen types for a damaged file
            raise AdapterError(f"{path}: cannot be read as a plain state dict: {error}") from error
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise AdapterError(f"{path}: expected a dict of tensors")
        self._state: dict[str, torch.Tensor] = state
        self.tensors = {
            key: TensorSpec(key, _spelling(tensor), tuple(tensor.shape), tensor.numel() * tensor.element_size())
            for key, tensor in state.items()
        }

    def read(self, key: str, *, borrow_as: str = "") -> torch.Tensor:
        return self._state[key]  # mapped from the file: there is nothing to borrow

    def chunks(self, key: str) -> Iterator[bytes]:
        tensor = self._state[key].contiguous()
        yield bytes(memory_of(tensor))


def _spelling(tensor: torch.Tensor) -> str:
    others = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
    others[torch.bool] = "BOOL"
    return others[tensor.dtype] if tensor.dtype in others else dtype_name(tensor.dtype)


def _pair(tensors: SafetensorsFile | _PickledFile, path: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module name → its keys {"A": …, "B": …}, and the keys that belong to no pair."""
    pairs: dict[str, dict[str, str]] = {}
    other: list[str] = []
    for key in tensors.tensors:
        match = _FACTOR.fullmatch(key)
        if match is None:
            other.append(key)
            continue
        name = (match["module"] or match["embedding"]).removeprefix(PREFIX)
        pairs.setdefault(name, {})[match["factor"] or match["side"]] = key
    for pair in pairs.values():
        if len(pair) < 2:
            (present,) = pair.values()
            absent = "lora_B" if "A" in pair else "lora_A"
            raise AdapterError(f"{tensors.path}: '{present}' has no {absent} beside it; the file is incomplete")
    return pairs, other


def _layer_spec(
    name: str, pair: Mapping[str, str], tensors: SafetensorsFile | _PickledFile, rules: _Rules
) -> LayerSpec:
    down, up = tensors.tensors[pair["A"]], tensors.tensors[pair["B"]]
    for spec in (down, up):
        if spec.dtype not in DTYPES:
            raise AdapterError(
                f"{tensors.path}: '{spec.key}' has dtype {spec.dtype}; LoRA factors of "
                f"{', '.join(DTYPES)} can be squeezed: convert the adapter first"
            )
        if len(spec.shape) < 2 or 0 in spec.shape:
            raise AdapterError(f"{tensors.path}: '{spec.key}' has shape {list(spec.shape)}; a matrix was expected")
    rank = down.shape[0]
    if up.shape[1] != rank or math.prod(up.shape[2:]) != 1 or len(up.shape) != len(down.shape):
        raise AdapterError(
            f"{tensors.path}: layer '{name}': lora_A {list(down.shape)} and lora_B {list(up.shape)} do not fit "
            "together; the rank must be the first dimension of A and the second of B"
        )
    declared = rules.declared_rank(name)
    if declared != rank:
        raise AdapterError(
            f"{rules.path}: declares rank {declared} for layer '{name}', but its lora_A has {rank} rows; "
            "correct r or rank_pattern, or use the configuration that the adapter was saved with"
        )
    convolution = len(down.shape) > 2
    return LayerSpec(
        name=name,
        out_features=up.shape[0],
        in_features=math.prod(down.shape[1:]),
        rank=rank,
        scale=rules.scale(name, rank),
        down_dtype=down.dtype,
        up_dtype=up.dtype,
        kind="embedding" if pair["A"].endswith("lora_embedding_A") else "conv" if convolution else "linear",
        kernel=down.shape[2:],
    )


def _pass_through(key: str, tensors: SafetensorsFile | _PickledFile) -> PassThrough:
    spec = tensors.tensors[key]
    return PassThrough(key, spec.dtype, spec.shape, spec.nbytes, lambda: tensors.chunks(key))


def _other_files(path: Path) -> tuple[dict[str, Path], list[str]]:
    """Files to carry over (relative path → file), and the names of what stays behind."""
    files: dict[str, Path] = {}
    left_behind: list[str] = []
    for entry in sorted(path.iterdir()):
        if entry.name in (CONFIG, WEIGHTS, PICKLED_WEIGHTS):
            continue
        if _TRAINING_STATE.fullmatch(entry.name):
            left_behind.append(entry.name)
        elif entry.is_dir():
            files.update((str(file.relative_to(path)), file) for file in sorted(entry.rglob("*")) if file.is_file())
        elif entry.is_file():
            files[entry.name] = entry
    return files, left_behind


def _notes(config: Mapping[str, Any], weights: Path, left_behind: list[str]) -> Iterator[str]:
    if weights.name == PICKLED_WEIGHTS:
        yield f"{PICKLED_WEIGHTS} is written as {WEIGHTS}"
    if left_behind:
        yield f"not carried over, as it belongs to the source's training: {', '.join(left_behind)}"
    if config.get("use_dora"):
        yield (
            "DoRA: the low-rank direction is squeezed and the magnitudes are kept, so the error reported is "
            "that of the low-rank part, not of the normalised weight"
        )


def _config_for(adapter: Adapter) -> dict[str, Any]:
    """The configuration under which PEFT gives every layer its rank and its scale.

    r is the largest rank, and lora_alpha makes the most common scale hold wherever no pattern is
    read, so that a server which ignores the patterns still applies it.
    """
    config = dict(adapter.config)
    root = bool(config.get("use_rslora", False))
    rank = adapter.rank
    scales = [spec.scale for spec in adapter.layers.values()]
    scale = max(dict.fromkeys(scales), key=scales.count)
    config["r"] = rank
    config["lora_alpha"] = _alpha(scale, rank, root=root)
    differing = {s.name: s for s in adapter.layers.values() if s.rank != rank or s.scale != scale}
    ranks = {name: spec.rank for name, spec in differing.items() if spec.rank != rank}
    alphas = {name: _alpha(spec.scale, spec.rank, root=root) for name, spec in differing.items()}
    config["rank_pattern"] = _patterns_for(ranks, adapter.layers)
    config["alpha_pattern"] = _patterns_for(alphas, adapter.layers)
    config.update(_targets_for(adapter))
    if config.get("init_lora_weights") == "orthogonal":
        config["init_lora_weights"] = True  # PEFT refuses to load an odd rank under "orthogonal"
    return config


def _patterns_for(values: Mapping[str, float], layers: Iterable[str]) -> dict[str, float]:
    """Patterns that give exactly these layers these values, as few as their last names allow.

    Where all layers of a last name (such as q_proj) have one value, that name is the pattern;
    otherwise each layer is named in full, anchored and escaped.
    """
    by_last_name: dict[str, list[str]] = {}
    for name in layers:
        by_last_name.setdefault(name.rpartition(".")[2], []).append(name)
    patterns: dict[str, float] = {}
    for last_name, names in by_last_name.items():
        own = {values.get(name) for name in names}
        if len(own) == 1 and len(names) > 1:
            value = own.pop()
            if value is not None:
                patterns[re.escape(last_name)] = value
        else:
            patterns.update({f"^{re.escape(name)}": values[name] for name in names if name in values})
    return patterns


def _targets_for(adapter: Adapter) -> dict[str, Any]:
    """target_modules and exclude_modules such that PEFT adapts the layers kept and no others."""
    if not adapter.left_out:
        return {}
    targets, excluded = adapter.config.get("target_modules"), adapter.config.get("exclude_modules")
    left_out = list(adapter.left_out)
    if isinstance(targets, list):
        targets = [target for target in targets if any(_targeted(name, target) for name in adapter.layers)]
        left_out = [name for name in left_out if any(_targeted(name, target) for target in targets)]
    if left_out and isinstance(excluded, str):
        excluded = "|".join((f"({excluded})", *map(re.escape, left_out)))
    elif left_out:
        excluded = [*(excluded or ()), *left_out]
    return {"target_modules": targets, "exclude_modules": excluded}


def _targeted(name: str, target: str) -> bool:
    """PEFT's rule for lists of targets."""
    return name == target or name.endswith(f".{target}")


def _alpha(scale: float, rank: int, *, root: bool) -> float:
    alpha = scale * (math.sqrt(rank) if root else rank)
    nearest = round(alpha)
    # 16 · √64 / √16 comes out as 31.999…; but 0.125 must never become 0.
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha


def _layer_block(spec: LayerSpec, borrow: Callable[[str], LoraLayer]) -> Block:
    if spec.kind == "embedding":
        keys = [f"{PREFIX}{spec.name}.lora_embedding_{factor}" for factor in "AB"]
    else:
        keys = [f"{PREFIX}{spec.name}.lora_{factor}.weight" for factor in "AB"]
    channels = spec.in_features // math.prod(spec.kernel)
    shapes = [(spec.rank, channels, *spec.kernel), (spec.out_features, spec.rank, *(1 for _ in spec.kernel))]
    specs = tuple(
        TensorSpec(key, dtype, shape, math.prod(shape) * DTYPES[dtype].itemsize)
        for key, dtype, shape in zip(keys, (spec.down_dtype, spec.up_dtype), shapes, strict=True)
    )

    def make() -> list[torch.Tensor]:
        layer = borrow(spec.name)
        return [
            factor.to(DTYPES[tensor.dtype]).reshape(tensor.shape)
            for factor, tensor in zip((layer.down, layer.up), specs, strict=True)
        ]

    return Block(specs, make)


def _pass_through_block(tensor: PassThrough) -> Block:
    return Block((TensorSpec(tensor.key, tensor.dtype, tensor.shape, tensor.nbytes),), lambda: [tensor.chunks()])
