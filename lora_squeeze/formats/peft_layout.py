"""How a PEFT file lays matrices out: one module may hold one matrix or many.

- most modules: A (r, in), B (out, r); convolutions A (r, in, *kernel), B (out, r, 1, …)
- a parameter of E experts (target_parameters): A (E·r, in), expert by expert; B (out, r·E) with the
  expert as the fastest index, so that expert e is B[:, e::E]. Where several parameters of a module are
  adapted, their wrappers are nested, and the file knows them by their depth: `experts.base_layer` is
  the parameter that the module registers before the one of `experts`
- a convolution of G groups: A (r, in, *kernel), B (out, r/G, 1, …); group g has rows g of both
- nn.MultiheadAttention: `mha` (in_proj) and `mha.base_layer.out_proj`, with one rank

Each matrix becomes a layer of its own; those that are stored together are named MODULE#PART.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lora_squeeze.adapter import Adapter, LayerSpec, LoraLayer
from lora_squeeze.errors import AdapterError, UnsupportedAdapter
from lora_squeeze.formats.peft_config import Rules
from lora_squeeze.formats.peft_keys import Keys, Pair
from lora_squeeze.formats.peft_patterns import targeted
from lora_squeeze.formats.pickled import PickledFile
from lora_squeeze.formats.tensors import DTYPES, SafetensorsFile, TensorSpec
from lora_squeeze.formats.writing import Block
from lora_squeeze.peft_names import PREFIX

__all__ = ["Place", "layer_blocks", "places", "readers"]

_NESTED = ".base_layer"
_OUT_PROJ = ".base_layer.out_proj"
# Parameters of experts in the order in which transformers' modules register them, which is the order of nesting.
_REGISTERED = ("gate_up_proj", "gate_proj", "up_proj", "w1", "v1", "w3", "w2", "down_proj")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer's two matrices lie: part `index` of `parts` in this pair."""

    pair: Pair
    index: int
    parts: int
    spec: LayerSpec


def places(keys: Keys, config: Mapping[str, Any], rules: Rules, path: Path) -> dict[str, Place]:
    """Every layer of a file and where it lies. Raises AdapterError for shapes that do not fit the configuration."""
    parameters = _parameters(keys.pairs, config, rules)
    found: dict[str, Place] = {}
    for module, pair in keys.pairs.items():
        _check_factors(pair, path)
        if module in parameters:
            layers = _experts(pair, parameters[module], rules, path)
        elif module.endswith(_OUT_PROJ) and module.removesuffix(_OUT_PROJ) in keys.pairs:
            layers = [_place(pair, f"{module.removesuffix(_OUT_PROJ)}#out_proj", rules, path)]
        elif f"{module}{_OUT_PROJ}" in keys.pairs:
            layers = [_place(pair, f"{module}#in_proj", rules, path)]
        else:
            layers = _groups_or_one(pair, rules, path)
        found.update((place.spec.name, place) for place in layers)
    return found


def _check_factors(pair: Pair, path: Path) -> None:
    for spec in (pair.down, pair.up):
        if spec.dtype not in DTYPES:
            raise AdapterError(
                f"{path}: '{spec.key}' has dtype {spec.dtype}; LoRA factors of "
                f"{', '.join(DTYPES)} can be squeezed: convert the adapter first"
            )
        if len(spec.shape) < 2 or 0 in spec.shape:
            raise AdapterError(f"{path}: '{spec.key}' has shape {list(spec.shape)}; a matrix was expected")


def _misfit(pair: Pair, name: str, path: Path, rule: str) -> AdapterError:
    return AdapterError(
        f"{path}: layer '{name}': lora_A {list(pair.down.shape)} and lora_B {list(pair.up.shape)} do not fit "
        f"together; {rule}"
    )


def _wrong_rank(name: str, declared: int, rows: int, rules: Rules) -> AdapterError:
    return AdapterError(
        f"{rules.path}: declares rank {declared} for layer '{name}', but its lora_A has {rows} rows; "
        "correct r or rank_pattern, or use the configuration that the adapter was saved with"
    )


def _groups_or_one(pair: Pair, rules: Rules, path: Path) -> list[Place]:
    """One matrix, or those of a grouped convolution."""
    rows, out, inner = pair.down.shape[0], pair.up.shape[0], pair.up.shape[1]
    if len(pair.down.shape) < 3 or rows == inner or rows % inner or out % (rows // inner):
        return [_place(pair, pair.module, rules, path)]
    groups = rows // inner
    return [_place(pair, f"{pair.module}#{group}", rules, path, index=group, groups=groups) for group in range(groups)]


def _place(pair: Pair, name: str, rules: Rules, path: Path, *, index: int = 0, groups: int = 1) -> Place:
    down, up = pair.down.shape, pair.up.shape
    rows = down[0]
    if up[1] * groups != rows or math.prod(up[2:]) != 1 or len(up) != len(down):
        raise _misfit(pair, name, path, "the rank must be the first dimension of A and the second of B")
    module = name.partition("#")[0]
    declared = rules.declared_rank(module)
    if declared != rows:
        raise _wrong_rank(module, declared, rows, rules)
    spec = LayerSpec(
        name=name,
        out_features=up[0] // groups,
        in_features=math.prod(down[1:]),
        rank=rows // groups,
        scale=rules.scale(module, rows),
        down_dtype=pair.down.dtype,
        up_dtype=pair.up.dtype,
        kind="embedding" if pair.embedding else "conv" if len(down) > 2 else "linear",
        kernel=down[2:],
        stored_as=pair.module if pair.module != name else "",
    )
    return Place(pair, index, groups, spec)


def _experts(pair: Pair, parameter: str, rules: Rules, path: Path) -> list[Place]:
    """One matrix for each expert of a parameter; how many there are follows from the declared rank."""
    down, up = pair.down.shape, pair.up.shape
    if len(down) != 2 or len(up) != 2 or up[1] != down[0]:
        raise _misfit(pair, parameter, path, "experts · rank must be the first dimension of A and the second of B")
    rank = rules.declared_rank(parameter)
    if down[0] % rank:
        raise _wrong_rank(parameter, rank, down[0], rules)
    experts = down[0] // rank
    return [
        Place(
            pair,
            expert,
            experts,
            LayerSpec(
                name=f"{parameter}#{expert}",
                out_features=up[0],
                in_features=down[1],
                rank=rank,
                scale=rules.scale(parameter, rank),
                down_dtype=pair.down.dtype,
                up_dtype=pair.up.dtype,
                kind="expert",
                stored_as=pair.module,
            ),
        )
        for expert in range(experts)
    ]


def _parameters(pairs: Mapping[str, Pair], config: Mapping[str, Any], rules: Rules) -> dict[str, str]:
    """Module in the file → the parameter that it adapts, for those that target_parameters names."""
    names = config.get("target_parameters") or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"{rules.path}: 'target_parameters' must be a list of names")
    depths: dict[str, list[str]] = {}
    for module in pairs:
        base = re.sub(rf"({re.escape(_NESTED)})+$", "", module)
        depths.setdefault(base, []).append(module)
    found: dict[str, str] = {}
    for base, modules in depths.items():
        candidates: set[str] = set() if _is_module(base, config) else _candidates(base, names)
        if not candidates:
            continue
        modules.sort(key=len, reverse=True)  # innermost first: the parameter that is registered first
        ordered = _in_order(candidates)
        if len(ordered) != len(modules):
            raise UnsupportedAdapter(
                f"{rules.path}: cannot tell which of the parameters {', '.join(sorted(candidates))} of '{base}' is "
                "stored where: that depends on the model; name in target_parameters only those that are adapted"
            )
        found.update((module, f"{base}.{name}") for module, name in zip(modules, ordered, strict=True))
    return found


def _candidates(base: str, targets: Iterable[str]) -> set[str]:
    """Names of the parameters of this module that may be meant."""
    pairs = (target.rpartition(".") for target in targets)
    return {name for owner, _, name in pairs if not owner or targeted(base, owner)}


def _is_module(base: str, config: Mapping[str, Any]) -> bool:
    """Whether target_modules means this module as a whole."""
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return re.fullmatch(targets, base) is not None
    return any(targeted(base, target) for target in targets)


def _in_order(names: set[str]) -> list[str]:
    """The parameters in the order of registration; empty if that is not known."""
    if len(names) > 1 and not names <= set(_REGISTERED):
        return []
    return sorted(names, key=lambda name: _REGISTERED.index(name) if name in _REGISTERED else 0)


def readers(
    found: Mapping[str, Place], tensors: SafetensorsFile | PickledFile
) -> tuple[Callable[[str], LoraLayer], Callable[[str], LoraLayer]]:
    """Two functions that read a layer by name: into new memory, and into memory that is used again.

    The tensors of a module of many parts are kept until a few others have been read: parts lie
    across them, and reading each part on its own would read everything once per expert.
    """
    lock = threading.Lock()

    @lru_cache(maxsize=torch.get_num_threads() + 1)
    def split(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        place = by_module[module]
        return _split(place, tensors.read(place.pair.down.key), tensors.read(place.pair.up.key))

    by_module = {place.pair.module: place for place in found.values() if place.parts > 1}

    def read(name: str, down_as: str, up_as: str) -> LoraLayer:
        place = found[name]
        spec, pair = place.spec, place.pair
        if place.parts > 1:
            with lock:
                downs, ups = split(pair.module)
            return LoraLayer(name=name, down=downs[place.index], up=ups[place.index], scale=spec.scale)
        down = tensors.read(pair.down.key, borrow_as=down_as).reshape(spec.rank, spec.in_features)
        up = tensors.read(pair.up.key, borrow_as=up_as).reshape(spec.out_features, spec.rank)
        if pair.values is not None:
            # The product of two half-precision numbers fits float32.
            dtype = DTYPES[spec.down_dtype]
            down = down.to(dtype) * tensors.read(pair.values.key).to(dtype).reshape(spec.rank, 1)
        return LoraLayer(name=name, down=down, up=up, scale=spec.scale)

    return lambda name: read(name, "", ""), lambda name: read(name, "down", "up")


def _split(place: Place, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All parts of a module: (parts, rank, in) and (parts, out, rank)."""
    spec, parts = place.spec, place.parts
    downs = down.reshape(parts, spec.rank, spec.in_features)
    if spec.kind == "expert":
        return downs, up.reshape(spec.out_features, spec.rank, parts).permute(2, 0, 1).contiguous()
    return downs, up.reshape(parts, spec.out_features, spec.rank)


def layer_blocks(adapter: Adapter) -> Iterator[Block]:
    """What to write for the layers: both factors of a module together, all parts of it."""
    modules: dict[str, list[LayerSpec]] = {}
    for spec in adapter.layers.values():
        modules.setdefault(spec.stored_as or spec.name, []).append(spec)
    for module, specs in modules.items():
        yield _block(module, specs, adapter.borrow)


def _block(module: str, parts: list[LayerSpec], borrow: Callable[[str], LoraLayer]) -> Block:
    one, count = parts[0], len(parts)
    if one.kind == "embedding":
        keys = [f"{PREFIX}{module}.lora_embedding_{factor}" for factor in "AB"]
    else:
        keys = [f"{PREFIX}{module}.lora_{factor}.weight" for factor in "AB"]
    channels = one.in_features // math.prod(one.kernel)
    down_shape = (count * one.rank, channels, *one.kernel)
    if one.kind == "expert":
        up_shape: tuple[int, ...] = (one.out_features, one.rank * count)
    else:
        up_shape = (count * one.out_features, one.rank, *(1 for _ in one.kernel))
    specs = tuple(
        TensorSpec(key, dtype, shape, math.prod(shape) * DTYPES[dtype].itemsize)
        for key, dtype, shape in zip(keys, (one.down_dtype, one.up_dtype), (down_shape, up_shape), strict=True)
    )

    def make() -> list[torch.Tensor]:
        if count == 1:
            layer = borrow(one.name)
            return [
                factor.to(DTYPES[tensor.dtype]).reshape(tensor.shape)
                for factor, tensor in zip((layer.down, layer.up), specs, strict=True)
            ]
        down, up = (torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype]) for tensor in specs)
        downs = down.view(count, one.rank, one.in_features)
        if one.kind == "expert":
            ups = up.view(one.out_features, one.rank, count).permute(2, 0, 1)
        else:
            ups = up.view(count, one.out_features, one.rank)
        for part, target_down, target_up in zip(parts, downs, ups, strict=True):
            layer = borrow(part.name)
            target_down.copy_(layer.down)
            target_up.copy_(layer.up)
        return [down, up]

    return Block(specs, make, tuple(part.name for part in parts))
