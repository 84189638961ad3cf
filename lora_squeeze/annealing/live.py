"""A PEFT model in memory as an `Adapter`, and new factors put into it where it stands.

Every LoRA module is a `Site`: its two parameters, and how they lie as matrices. The layout is that of
the files (see `lora_squeeze.formats.peft_layout`): one matrix a module, or one for each expert or group
of a convolution, named MODULE#PART. So every policy, and `compress`, works on a live model.

Parameters keep their identity: `put_factors` replaces what they hold (`parameter.data`), so optimizers,
learning-rate schedulers and gradient scalers go on pointing at the right ones.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.adapter import Adapter, LayerSpec, LoraLayer, PassThrough, whole
from lora_squeeze.annealing.sharding import gathered, is_sharded, owners, refill
from lora_squeeze.errors import AdapterError, RankError, UnsupportedAdapter
from lora_squeeze.formats.peft_config import config_for, refuse_what_is_not_plain_lora
from lora_squeeze.formats.peft_keys import PREFIX
from lora_squeeze.formats.tensors import DTYPES, dtype_name, memory_of

__all__ = [
    "Factors",
    "Site",
    "adapter_config",
    "factors_of",
    "live_adapter",
    "place",
    "put_factors",
    "record_ranks",
    "site_of",
    "sites",
    "unwrapped",
]

Factors = tuple[Tensor, Tensor]  # (A (r, in), B (out, r))

_KINDS = ("linear", "conv", "embedding", "expert")
# Variants of a LoRA module whose update is still scale · B · A of the same two factors.
_PLAIN_VARIANTS = ("Dora", "ALora")


@dataclass(frozen=True)
class Site:
    """One LoRA module of a live model: where its factors are, and how they lie as matrices.

    down, up
        its parameters: `lora_A` (or `lora_embedding_A`) and `lora_B`.
    parts
        layer names, one for each matrix that the two parameters hold.
    """

    name: str
    adapter: str
    module: Any
    down: nn.Parameter
    up: nn.Parameter
    kind: str
    parts: tuple[str, ...]
    key: str  # the module's name in a state dict, without the prefix
    owners: tuple[Any, Any] = (None, None)  # what looks after sharded parameters

    @property
    def rank(self) -> int:
        """Of each part."""
        return self.down.shape[0] // len(self.parts)

    @property
    def scale(self) -> float:
        """The effective one: ΔW = scale · B · A."""
        return float(self.module.scaling[self.adapter])

    def downs(self, like_down: Tensor) -> Tensor:
        """A (whole) tensor of `down`'s shape, as matrices: (parts, r, in)."""
        return like_down.reshape(len(self.parts), like_down.shape[0] // len(self.parts), -1)

    def ups(self, like_up: Tensor) -> Tensor:
        """A (whole) tensor of `up`'s shape, as matrices: (parts, out, r)."""
        count = len(self.parts)
        if self.kind == "expert":  # the expert is the fastest index of B's columns
            return like_up.reshape(like_up.shape[0], -1, count).permute(2, 0, 1)
        return like_up.reshape(count, like_up.shape[0] // count, -1)

    def as_down(self, matrices: Tensor) -> Tensor:
        """(parts, k, in) → the shape of `down` at rank k."""
        return matrices.reshape(matrices.shape[0] * matrices.shape[1], *self.down.shape[1:])

    def as_up(self, matrices: Tensor) -> Tensor:
        """(parts, out, k) → the shape of `up` at rank k."""
        if self.kind == "expert":
            return matrices.permute(1, 2, 0).reshape(matrices.shape[1], -1)
        rows = matrices.reshape(matrices.shape[0] * matrices.shape[1], matrices.shape[2])
        return rows.reshape(*rows.shape, *(1 for _ in self.up.shape[2:]))

    def specs(self) -> Iterator[LayerSpec]:
        """One for each part."""
        count, rows = len(self.parts), self.up.shape[0]
        for part in self.parts:
            yield LayerSpec(
                name=part,
                out_features=rows if self.kind == "expert" else rows // count,
                in_features=math.prod(self.down.shape[1:]),
                rank=self.rank,
                scale=self.scale,
                down_dtype=dtype_name(self.down.dtype),
                up_dtype=dtype_name(self.up.dtype),
                kind=self.kind,
                kernel=tuple(self.down.shape[2:]),
                stored_as=self.key if self.key != part else "",
            )


def live_adapter(model: nn.Module, adapter_name: str = "default") -> Adapter:
    """A model's adapter, as `open_adapter` reads one from a file; its layers are views, nothing is copied.

    Raises AdapterError if the model has no adapter of this name, UnsupportedAdapter, naming the module,
    for what is not a plain low-rank update.
    """
    bare = factors_of(model, sites(model, adapter_name))
    return replace(bare, pass_through=tuple(_companions(model, adapter_name)))


def factors_of(model: nn.Module, found: Mapping[str, Site]) -> Adapter:
    """The factors alone of some sites, as an Adapter."""
    adapter_name = next(iter(found.values())).adapter
    places = {part: (site, index) for site in found.values() for index, part in enumerate(site.parts)}

    def load(name: str) -> LoraLayer:
        site, index = places[name]
        down, up = site.downs(gathered(site.down))[index], site.ups(gathered(site.up))[index]
        return LoraLayer(name=name, down=down, up=up, scale=site.scale)

    return Adapter(
        source=f"the adapter '{adapter_name}' of a {type(unwrapped(model)).__name__}",
        format="peft",
        layers={spec.name: spec for site in found.values() for spec in site.specs()},
        load=load,
        borrow=load,
        config=_plain(adapter_config(model, adapter_name).to_dict()),
    )


def put_factors(
    model: nn.Module,
    factors: Mapping[str, Factors],
    *,
    scale: float | Mapping[str, float] | None = None,
    adapter_name: str = "default",
) -> None:
    """Replace the factors of some layers of a model by others, of any rank, without leaving its training loop.

    factors
        layer (a module, or MODULE#PART where it holds several matrices) → (A (r, in), B (out, r)).
        All parts of a module come together, at one rank. They are converted to the parameters' dtype
        and device; gradients are dropped.
    scale
        the new effective scale, of all of these layers or by layer; default: each keeps its own.

    Rank, scaling and lora_alpha of the modules follow, and so does the adapter's configuration, so that
    `save_pretrained` writes it at its true ranks. Other adapters of the model are not touched. An
    optimizer that has state for these parameters must be told (`Squeezer` does). Raises RankError or
    UnsupportedAdapter before anything is changed.
    """
    found = sites(model, adapter_name)
    planned = [_planned(site, factors, scale) for site in found.values() if set(site.parts) & set(factors)]
    unknown = set(factors) - {part for site in found.values() for part in site.parts}
    if unknown:
        raise RankError(f"layer '{min(unknown)}' is not in the adapter '{adapter_name}' of this model")
    for site, down, up, new_scale in planned:
        place(site, down, up, scale=new_scale)
    record_ranks(model, adapter_name)


def place(site: Site, down: Tensor, up: Tensor, *, scale: float) -> None:
    """Put tensors of the parameters' layout into one module; `record_ranks` has to follow."""
    for parameter, tensor, owner in zip((site.down, site.up), (down, up), site.owners, strict=True):
        _refill(parameter, tensor) if owner is None else refill(parameter, tensor, owner)
    module, name, rank = site.module, site.adapter, _declared_rank(site)
    module.r[name] = rank
    module.scaling[name] = scale
    alpha = scale * (math.sqrt(rank) if module.use_rslora.get(name) else rank)
    module.lora_alpha[name] = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
    if site.kind != "embedding":
        inner, outer = ("out_channels", "in_channels") if site.kind == "conv" else ("out_features", "in_features")
        setattr(module.lora_A[name], inner, down.shape[0])
        setattr(module.lora_B[name], outer, down.shape[0])


def _refill(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Give a parameter another tensor of another shape; its gradient is dropped."""
    parameter.grad = None
    # As long as a graph of before is alive (a loss that somebody kept), autograd would let new gradients
    # arrive at its node, which expects the old shape. A change of dtype makes it forget that node.
    other = torch.float16 if tensor.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = tensor


def record_ranks(model: nn.Module, adapter_name: str, found: Mapping[str, Site] | None = None) -> None:
    """Write the ranks and scales of the modules into the adapter's configuration."""
    configs: dict[str, Any] = unwrapped(model).peft_config  # pyright: ignore[reportAssignmentType]
    # Never in place: the object is the user's, who may make the next model with it, and TRL gives it to the frozen
    # copy of an adapter ("ref"), too.
    config = configs[adapter_name] = copy.copy(adapter_config(model, adapter_name))
    values = config_for(factors_of(model, sites(model, adapter_name) if found is None else found))
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights"):
        setattr(config, field, values[field])


def sites(model: nn.Module, adapter_name: str = "default") -> dict[str, Site]:
    """All modules of a model that this adapter adapts, in the model's order.

    Raises AdapterError if there are none, UnsupportedAdapter for what cannot be squeezed, by name.
    """
    config = adapter_config(model, adapter_name)
    label = f"adapter '{adapter_name}'"
    refuse_what_is_not_plain_lora(_plain(config.to_dict()), label)
    if str(config.peft_type.value) != "LORA":
        raise UnsupportedAdapter(f"{label}: {config.peft_type.value} chooses its ranks itself while it trains")
    from peft.tuners.lora import LoraLayer as PeftLayer

    found: dict[str, Site] = {}
    holders: dict[int, str] = {}
    sharded = owners(unwrapped(model))
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, PeftLayer) and adapter_name in (*module.lora_A, *module.lora_embedding_A):
            site = site_of(name.removeprefix(PREFIX), module, adapter_name)
            site = replace(site, owners=(sharded.get(id(site.down)), sharded.get(id(site.up))))
            for parameter in (site.down, site.up):
                # A tied embedding's parameters are transposed views of another's.
                place_in_memory = 0 if is_sharded(parameter) else parameter.data_ptr()
                shared = holders.setdefault(place_in_memory or id(parameter), site.name)
                if shared != site.name:
                    raise UnsupportedAdapter(f"modules '{shared}' and '{site.name}' share factors: they are tied")
            found[site.name] = site
    if not found:
        raise AdapterError(f"{label} adapts no module of this model by LoRA; is it the right adapter_name?")
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            return model


def adapter_config(model: nn.Module, adapter_name: str) -> Any:
    """The PEFT configuration of an adapter. Raises AdapterError if the model has none of this name."""
    configs: Any = getattr(unwrapped(model), "peft_config", None)
    if "peft" not in sys.modules or not isinstance(configs, dict):
        raise AdapterError(
            f"this {type(unwrapped(model)).__name__} has no PEFT adapter; wrap it first: peft.get_peft_model(model, …)"
        )
    if adapter_name not in configs:
        raise AdapterError(f"this model has no adapter '{adapter_name}'; it has {', '.join(configs) or 'none'}")
    return configs[adapter_name]


def site_of(name: str, module: Any, adapter: str) -> Site:
    """One LoRA module, by its name in a state dict (without PEFT's prefix)."""
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

    _check_plain(name, module, adapter)
    if adapter in module.lora_embedding_A:
        down, up, kind = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter], "embedding"
    else:
        down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        kind = "conv" if down.dim() > 2 else "linear"
    whole_name, parts = name, (name,)
    if isinstance(module, ParamWrapper):
        while whole_name.endswith(".base_layer"):
            whole_name = whole_name.removesuffix(".base_layer")
        whole_name, kind = f"{whole_name}.{module.parameter_name}", "expert"
        parts = tuple(f"{whole_name}#{expert}" for expert in range(module.num_experts))
    elif isinstance(module, MultiheadAttention):
        parts = (f"{name}#in_proj",)
    elif name.endswith(".base_layer.out_proj"):
        whole_name = name.removesuffix(".base_layer.out_proj") + "#out_proj"
        parts = (whole_name,)
    elif kind == "conv" and (groups := down.shape[0] // up.shape[1]) > 1:
        parts = tuple(f"{name}#{group}" for group in range(groups))
    for parameter in (down, up):
        if parameter.dtype not in DTYPES.values():
            raise UnsupportedAdapter(f"module '{name}': factors of {parameter.dtype} cannot be squeezed")
    return Site(whole_name, adapter, module, down, up, kind, parts, name)


def _check_plain(name: str, module: Any, adapter: str) -> None:
    variant = type(module.lora_variant.get(adapter)).__name__
    if adapter in module.lora_variant and not variant.startswith(_PLAIN_VARIANTS):
        raise UnsupportedAdapter(f"module '{name}': {variant} uses its two factors in another way than scale · B · A")
    if adapter in module.merged_adapters:
        raise UnsupportedAdapter(f"module '{name}': the adapter '{adapter}' is merged; call unmerge_adapter() first")


def _planned(
    site: Site, factors: Mapping[str, Factors], scale: float | Mapping[str, float] | None
) -> tuple[Site, Tensor, Tensor, float]:
    """One module's new factors in the layout of its parameters. Raises RankError for what does not fit."""
    missing = [part for part in site.parts if part not in factors]
    if missing:
        raise RankError(f"layer '{missing[0]}' is stored together with all of '{whole(missing[0])}': give all of them")
    one = next(site.specs())
    width, height = one.in_features, one.out_features
    rank = factors[site.parts[0]][0].shape[0]
    for part in site.parts:
        down, up = factors[part]
        if tuple(down.shape) != (rank, width) or tuple(up.shape) != (height, rank) or rank < 1:
            raise RankError(
                f"layer '{part}': A {list(down.shape)} and B {list(up.shape)} do not fit; "
                f"this module takes ({rank or 'r'}, {width}) and ({height}, {rank or 'r'})"
            )
    device = site.down.device
    downs = torch.stack([factors[part][0].detach().to(device, site.down.dtype) for part in site.parts])
    ups = torch.stack([factors[part][1].detach().to(device, site.up.dtype) for part in site.parts])
    own = {_scale_of(part, site, scale) for part in site.parts}
    if len(own) > 1:
        raise RankError(f"the parts of module '{site.name}' share one scale; they were given {sorted(own)}")
    return site, site.as_down(downs).contiguous(), site.as_up(ups).contiguous(), own.pop()


def _scale_of(part: str, site: Site, scale: float | Mapping[str, float] | None) -> float:
    if scale is None:
        return site.scale
    return scale.get(part, site.scale) if isinstance(scale, Mapping) else scale


def _declared_rank(site: Site) -> int:
    """What PEFT calls the module's r: that of one expert, or of all groups of a convolution."""
    return site.down.shape[0] // (len(site.parts) if site.kind == "expert" else 1)


def _companions(model: nn.Module, adapter_name: str) -> Iterator[PassThrough]:
    """What PEFT saves beside the factors: modules_to_save, biases, DoRA magnitudes."""
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(
        unwrapped(model), adapter_name=adapter_name, save_embedding_layers=False
    )
    for key, tensor in state.items():
        if key.endswith((".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")):
            continue
        spelled = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
        dtype = spelled.get(tensor.dtype) or dtype_name(tensor.dtype)
        nbytes = tensor.numel() * tensor.element_size()
        yield PassThrough(key, dtype, tuple(tensor.shape), nbytes, _bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> Any:
    return lambda: iter([bytes(memory_of(tensor.detach().cpu().contiguous()))])


def _plain(value: Any) -> Any:
    """A configuration's value as JSON has it, as `save_pretrained` writes it."""
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(one) for key, one in value.items()}
    if isinstance(value, set):
        return sorted(_plain(one) for one in value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value.value if isinstance(value, Enum) else value
