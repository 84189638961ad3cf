"""What each runtime loads, in one table, and how to write an adapter so that it does.

The rules were read off the runtimes' own loaders (the sources named in RUNTIMES). A runtime can
change any day: `check` says what these rules say, and the runtime has the last word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_squeeze.adapter import Adapter, Deviation, LayerSpec
from lora_squeeze.errors import RankError, UnsupportedAdapter
from lora_squeeze.formats.dora import magnitudes_of
from lora_squeeze.limits import Limits
from lora_squeeze.provenance import ENTRY, restated
from lora_squeeze.rewriting import as_plain_lora, padded, scale_in_factors

__all__ = [
    "RUNTIMES",
    "Problem",
    "Runtime",
    "caveats",
    "check",
    "fit",
    "limits_for",
    "needs_one_alpha",
    "needs_scale_in_factors",
    "rank_cap",
    "refuse_unloadable",
    "rules_of",
]


def _as_peft(_config: Mapping[str, Any], spec: LayerSpec) -> float:
    return spec.scale


def _one_for_all(config: Mapping[str, Any], _spec: LayerSpec) -> float:
    """lora_alpha / r (rsLoRA: / √r) for every module, whatever its own rank is."""
    rank = config["r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _alpha_over_own_rank(config: Mapping[str, Any], spec: LayerSpec) -> float:
    return config["lora_alpha"] / spec.rank


@dataclass(frozen=True)
class Runtime:
    """What a runtime accepts.

    mixed_ranks
        whether layers may differ in rank.
    mixed_scales
        whether alpha_pattern is honoured; otherwise one effective scale has to hold for all layers.
    rslora
        whether alpha / √r is understood.
    applies
        configuration and layer → the scale that the runtime applies to it.
    rejects_patterns
        whether entries of rank_pattern or alpha_pattern that differ from r and lora_alpha are an error.
    default_max_rank
        of an adapter, where the server was started without another; None: no cap.
    max_ranks
        what the cap may be set to; empty: anything.
    refuses
        configuration field → why an adapter that sets it is not loaded.
    only_pairs
        whether tensors other than lora_A and lora_B are refused.
    formats
        what it reads.
    mixed_alphas
        whether the modules of a kohya file may differ in alpha.
    stumbles
        in what a file may differ from what is written here → what the runtime makes of it.
    """

    name: str
    source: str
    formats: tuple[str, ...] = ("peft",)
    mixed_alphas: bool = True
    mixed_ranks: bool = True
    mixed_scales: bool = True
    rslora: bool = True
    applies: Callable[[Mapping[str, Any], LayerSpec], float] = _as_peft
    rejects_patterns: bool = False
    default_max_rank: int | None = None
    max_ranks: tuple[int, ...] = ()
    refuses: dict[str, str] = field(default_factory=dict[str, str])
    only_pairs: bool = False
    stumbles: dict[Deviation, str] = field(default_factory=dict[Deviation, str])


_OTHER_KEYS = "keys that do not end in lora_A.weight or lora_B.weight are refused there"

_NO_DORA = "DoRA's magnitudes are not supported there; merge the adapter into the base model instead"
_NO_FULL_MODULES = "fully trained modules are not loaded there; serve them as part of the base model"
_NO_BIAS = "trained biases are not loaded there"
_NO_TOKENS = "trained token embeddings are not loaded there"

# Experts that are modules of their own, as in adapters saved under transformers 4 (PEFT fuses them:
# peft/utils/transformers_weight_conversion.py, which sets the rank of what it fuses from r).
_EXPERT_MODULE = re.compile(r"(.+\.)?experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj)")

# Where nobody names a runtime, an adapter is for whatever reads its format.
_ANY = Runtime(name="", source="", formats=("peft", "kohya", "diffusers"))

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            name="peft",
            source="peft/tuners/lora/model.py, peft/utils/other.py:get_pattern_key, peft/utils/save_and_load.py",
            stumbles={
                "bare keys": "such factors are not found, and stay at zero",
                "named keys": "PEFT 0.18 leaves such factors at zero, and 0.21 finds them under that name alone",
                "no peft_type": "without it, the configuration is refused there",
                "odd orthogonal": "that initialisation is refused for odd ranks",
            },
        ),
        Runtime(
            name="vllm",
            source="vllm/lora/peft_helper.py, vllm/lora/utils.py:parse_fine_tuned_lora_name; up to about 0.26 "
            "rank_pattern and alpha_pattern are ignored, ranks are taken from the tensors and one alpha / r is applied "
            "to all modules",
            mixed_scales=False,
            applies=_one_for_all,
            default_max_rank=16,
            max_ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
            refuses={
                "use_dora": _NO_DORA,
                "modules_to_save": _NO_FULL_MODULES,
                "lora_bias": _NO_BIAS,
                "trainable_token_indices": _NO_TOKENS,
                "alora_invocation_tokens": "activated LoRA is not supported there",
            },
            only_pairs=True,
            stumbles={"adalora": _OTHER_KEYS, "named keys": _OTHER_KEYS},
        ),
        Runtime(
            name="sglang",
            source="python/sglang/srt/lora/lora.py, lora_config.py: entries of rank_pattern and alpha_pattern that "
            "differ from r and lora_alpha are rejected, buffers have r rows, use_rslora is not read",
            mixed_ranks=False,
            mixed_scales=False,
            rslora=False,
            applies=_one_for_all,
            rejects_patterns=True,
            refuses={
                "use_dora": _NO_DORA,
                "modules_to_save": _NO_FULL_MODULES,
                "lora_bias": _NO_BIAS,
                "trainable_token_indices": _NO_TOKENS,
                "target_parameters": "experts as parameters are rejected there",
                "alora_invocation_tokens": "activated LoRA is not supported there",
            },
            only_pairs=True,
            stumbles={
                "adalora": "no peft_type but LORA is loaded there",
                "no peft_type": "without it, the adapter is not loaded there",
            },
        ),
        Runtime(
            name="llamacpp",
            source="llama.cpp/convert_lora_to_gguf.py: one lora_alpha over the rank read from each tensor, "
            "use_rslora and the patterns are not read, other tensors are refused",
            mixed_ranks=False,
            mixed_scales=False,
            rslora=False,
            applies=_alpha_over_own_rank,
            refuses={
                "use_dora": _NO_DORA,
                "modules_to_save": _NO_FULL_MODULES,
                "lora_bias": _NO_BIAS,
                "target_parameters": "experts as parameters have no name there",
            },
            only_pairs=True,
            stumbles={"adalora": _OTHER_KEYS, "named keys": _OTHER_KEYS},
        ),
        Runtime(
            name="diffusers",
            source="diffusers/loaders/lora_conversion_utils.py:_get_alpha_name, utils/peft_utils.py:get_peft_kwargs; "
            "in 0.42 the alphas of attention and text encoder modules of a kohya file are filed under names that match "
            "no module, so they get the most common alpha; dora_scale is dropped, others than pairs are refused; "
            "lora_pipeline.py: Stable Diffusion refuses alphas in a diffusers file, Flux those beside a header",
            formats=("diffusers", "kohya"),
            mixed_alphas=False,
            stumbles={"cp form": "tensors other than lora_down, lora_up and alpha are refused there"},
        ),
        Runtime(
            name="comfyui",
            source="comfy/weight_adapter/lora.py: alpha / rank of each module, scale 1 where there is no alpha tensor; "
            "the adapter configuration in the header of a diffusers file is not read",
            formats=("diffusers", "kohya"),
        ),
    )
}


@dataclass(frozen=True)
class Problem:
    """Why a runtime would not load an adapter, or not as it is meant, and what to do about it."""

    what: str
    what_to_do: str


def rules_of(runtime: str) -> Runtime:
    """What a runtime accepts; "" is whatever reads the adapter's format."""
    return RUNTIMES[runtime] if runtime else _ANY


def check(adapter: Adapter, runtime: str, *, max_lora_rank: int | None = None) -> list[Problem]:
    """All reasons why this runtime would not load the adapter, or would apply another update.

    adapter
        one that was opened is judged as its file is; `formats.as_written` is what saving it makes of it.
    runtime
        "" is whatever reads the adapter's format.
    max_lora_rank
        what the server was started with; None takes the runtime's default.

    Raises RankError for a max_lora_rank that the runtime does not know.
    """
    rules = rules_of(runtime)
    if adapter.format not in rules.formats:
        return [Problem(f"it is a {adapter.format} adapter", f"{runtime} reads {' and '.join(rules.formats)}")]
    problems = [
        Problem(f"{name} is set: {why}", "squeezing cannot change that")
        for name, why in rules.refuses.items()
        if adapter.config.get(name)
    ]
    put_right = f"squeezing writes it in the plain form, and so does lora-squeeze convert --to {adapter.format}"
    stumbles: list[Deviation] = [kind for kind in adapter.deviations if kind in rules.stumbles]
    if rules.only_pairs and adapter.pass_through and not problems:
        key = adapter.pass_through[0].key
        problems.append(Problem(f"tensor '{key}' is no lora_A or lora_B", "squeezing cannot change that"))
    problems += [Problem(f"{adapter.deviations[kind]}: {rules.stumbles[kind]}", put_right) for kind in stumbles]
    cap = rank_cap(runtime, max_lora_rank)
    if cap is not None and adapter.rank > cap:
        problems.append(
            Problem(
                f"rank {adapter.rank} is above max_lora_rank {cap}",
                f"squeeze with --max-rank {cap}, or start the server with a larger one",
            )
        )
    what_to_do = f"squeeze with --for {runtime}"
    if adapter.format == "peft":
        # The configuration is by then that of a LoRA, which AdaLoRA's own is not.
        return problems if "adalora" in stumbles else problems + _misread(adapter, rules, what_to_do)
    alphas = {round(spec.scale * spec.rank, 6) for spec in adapter.layers.values()}
    if needs_one_alpha(adapter, runtime) and len(alphas) > 1:
        problems.append(Problem("modules differ in alpha, and the alphas of attention modules are misread", what_to_do))
    if runtime == "diffusers" and adapter.format == "kohya" and magnitudes_of(adapter):
        what = "it is DoRA, and the dora_scale of a kohya file is dropped"
        problems.append(Problem(what, "convert it with lora-squeeze convert --to diffusers"))
    if adapter.format == "diffusers":
        fold = f"{what_to_do}, or convert it with lora-squeeze convert --to diffusers: the scale goes into the factors"
        problems += [Problem(what, fold) for what in _scales_out_of_place(adapter, runtime)]
    return problems


def _scales_out_of_place(adapter: Adapter, runtime: str) -> list[str]:
    """Why the scales of a diffusers file do not count there, or keep it from being loaded; at most one reason."""
    with_alpha = [spec.name for spec in adapter.layers.values() if spec.alpha_dtype]
    unread = [spec.name for spec in adapter.layers.values() if spec.scale != 1 and not spec.alpha_dtype]
    if runtime == "comfyui" and unread:
        return [f"the scale of '{unread[0]}' stands in the header only, which is not read there"]
    if runtime == "diffusers" and with_alpha:
        # Which pipeline a transformer belongs to, the names do not tell: of those, some read alphas.
        if any(name.startswith("unet.") for name in adapter.layers):
            return [
                f"'{with_alpha[0]}.alpha' is an alpha tensor, and Stable Diffusion's pipelines refuse files with such"
            ]
        if adapter.config:
            return [f"'{with_alpha[0]}.alpha' is an alpha tensor, and Flux refuses those beside a header with scales"]
    return []


def _misread(adapter: Adapter, rules: Runtime, what_to_do: str) -> list[Problem]:
    """What the runtime would reject or apply with another scale than PEFT does."""
    config, ranks = adapter.config, {spec.rank for spec in adapter.layers.values()}
    rank, alpha = config.get("r", adapter.rank), config.get("lora_alpha", 0)
    if rules.rejects_patterns:
        values = {"rank_pattern": rank, "alpha_pattern": alpha}
        if len(ranks) > 1:
            return [Problem(f"layers differ in rank ({min(ranks)} to {max(ranks)})", f"{what_to_do}: it pads them")]
        for name, default in values.items():
            if any(value != default for value in (config.get(name) or {}).values()):
                what = f"{name} asks for another rank or scale than r and lora_alpha, which is rejected"
                return [Problem(what, what_to_do)]
        if ranks != {rank}:
            return [Problem(f"the layers have rank {max(ranks)}, but r is {rank}", what_to_do)]
    if config.get("use_rslora") and not rules.rslora:
        return [Problem("use_rslora is not read: the update would be √r too weak", what_to_do)]
    for spec in adapter.layers.values():
        applied = rules.applies(config, spec)
        if not math.isclose(applied, spec.scale, rel_tol=1e-6):
            return [
                Problem(
                    f"layer '{spec.name}' would get scale {applied:g} instead of {spec.scale:g}, as "
                    "rank_pattern and alpha_pattern are not read",
                    what_to_do,
                )
            ]
    return []


def caveats(adapter: Adapter) -> tuple[str, ...]:
    """What may go wrong when PEFT loads the adapter, depending on the version of transformers."""
    rank = adapter.rank
    others = (spec for spec in adapter.layers.values() if spec.rank != rank)
    odd = next((spec for spec in others if _EXPERT_MODULE.fullmatch(spec.name)), None)
    if adapter.format != "peft" or odd is None:
        return ()
    return (
        f"transformers 5 fuses the experts of many models when PEFT loads modules such as '{odd.name}', which works "
        f"only if all have rank r: this one has {odd.rank}, r is {rank}; where that matters, give all layers "
        "one rank (--rank, or --equal '.+')",
    )


def rank_cap(runtime: str, max_lora_rank: int | None) -> int | None:
    """The largest rank an adapter may have there. Raises RankError for a cap the runtime does not know."""
    rules = rules_of(runtime)
    if max_lora_rank is None:
        return rules.default_max_rank
    if max_lora_rank < 1 or (rules.max_ranks and max_lora_rank not in rules.max_ranks):
        known = ", ".join(map(str, rules.max_ranks)) or "1 and up"
        raise RankError(f"max_lora_rank {max_lora_rank} is not possible for {runtime}: it knows {known}")
    return max_lora_rank


def needs_one_alpha(adapter: Adapter, runtime: str) -> bool:
    """Whether this runtime applies the right scale only if all modules of this adapter have one alpha."""
    return adapter.format == "kohya" and not rules_of(runtime).mixed_alphas


def needs_scale_in_factors(adapter: Adapter, runtime: str) -> bool:
    """Whether this runtime applies the right scale, or loads the file, only if all scales of this adapter are 1."""
    if adapter.format != "diffusers":
        return False
    specs = adapter.layers.values()
    # Squeezed, all layers get the most common scale: then those without an alpha tensor are the ones to have none.
    told_in_part = {spec.scale for spec in specs} != {1.0} and any(not spec.alpha_dtype for spec in specs)
    return (runtime == "comfyui" and told_in_part) or bool(_scales_out_of_place(adapter, runtime))


def fit(adapter: Adapter, runtime: str) -> Adapter:
    """The same update as this runtime wants it: padded to one rank, rsLoRA as plain LoRA, the scale in the factors."""
    rules = rules_of(runtime)
    if needs_scale_in_factors(adapter, runtime):
        adapter = scale_in_factors(adapter)
        if adapter.late_metadata is not None and ENTRY in adapter.metadata:
            # What was lost by then is known, and that it is rounded once more is not in it.
            adapter = restated(adapter, lambda made: replace(made, scales=1.0, relative_error=math.nan))
    if not rules.rslora or not rules.mixed_scales:
        adapter = as_plain_lora(adapter)
    return adapter if rules.mixed_ranks else padded(adapter)


def refuse_unloadable(adapter: Adapter, runtime: str, *, max_lora_rank: int | None = None) -> None:
    """Raise UnsupportedAdapter, with all reasons, if this runtime would not load the adapter."""
    if problems := check(adapter, runtime, max_lora_rank=max_lora_rank):
        reasons = "; ".join(f"{problem.what} ({problem.what_to_do})" for problem in problems)
        raise UnsupportedAdapter(f"{adapter.source}: {runtime} would not load it: {reasons}")


def limits_for(runtime: str, limits: Limits, *, max_lora_rank: int | None = None) -> Limits:
    """The limits, tightened to what this runtime loads: its largest rank, and one rank if need be.

    Where layers may not differ in rank, smaller ones would be padded with zeros: the bytes are spent
    anyway, so all layers get the same rank, but for those that are left out. Raises RankError for a
    rank of their own for some.
    """
    cap = rank_cap(runtime, max_lora_rank)
    if cap is not None:
        limits = replace(limits, max_rank=cap if limits.max_rank is None else min(cap, limits.max_rank))
    if not rules_of(runtime).mixed_ranks:
        if own := next((f"{pattern}={rank}" for pattern, rank in limits.rank_for if rank > 0), None):
            raise RankError(
                f"rank_for '{own}': {runtime} has one rank for all layers, so none can have its own; leave it out, or "
                "give those layers rank 0 to leave them out"
            )
        limits = replace(limits, one_rank=True)
    return limits
