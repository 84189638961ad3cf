"""adapter_config.json: which rank and scale a module has, what cannot be squeezed, and how to write it.

Which rank and scale a module has follows PEFT's own rule: the first key of rank_pattern (and of
alpha_pattern) for which re.match(rf"(.*\\.)?({key})$", name) holds, on names without the prefix
`base_model.model.`; otherwise r and lora_alpha. scale = alpha / rank, rsLoRA alpha / √rank.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_squeeze.adapter import Adapter, whole
from lora_squeeze.documents import parse_json, read_text
from lora_squeeze.errors import AdapterError, UnsupportedAdapter
from lora_squeeze.formats.peft_patterns import MANY, BadPattern, FirstMatch, endings, expression_of, patterns_for
from lora_squeeze.peft_names import CONFIG, WEIGHTS

__all__ = [
    "Rules",
    "alpha_of",
    "config_for",
    "number",
    "read_config",
    "refuse_what_is_not_plain_lora",
]

# Initialisations that change the base weights: the update is relative to a base nobody has.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Fields that name modules or parameters: a list of names, or an expression.
_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")

# Fields that change what the two factors mean.
_NOT_PLAIN = {
    "kasa_config": "KaSA puts a trained diagonal between the factors and truncates the base weights",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "use_qalora": "QA-LoRA's lora_A works on pooled inputs",
}

# Methods whose update of a weight has no two factors to squeeze, but that PEFT can approximate by LoRA.
_CONVERTIBLE = {
    "LOHA", "LOKR", "FOURIERFT", "SHIRA", "HIRA", "PSOFT", "RANDLORA", "C3A", "VERA", "MISS", "GRALORA", "DELORA",
    "WAVEFT", "VBLORA", "TINYLORA", "UNILORA",
}  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """The configuration's fields. Raises AdapterError, or UnsupportedAdapter for what is not plain LoRA."""
    try:
        config = parse_json(read_text(path))
    except FileNotFoundError as error:
        raise AdapterError(f"{path}: no such file; a PEFT adapter is a folder with {CONFIG} and {WEIGHTS}") from error
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise AdapterError(f"{path}: not valid JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object with the fields of a LoraConfig")
    _check_types(config, path)
    refuse_what_is_not_plain_lora(config, path)
    return config


def _check_types(config: Mapping[str, Any], path: Path) -> None:
    """Raise AdapterError if a field that is read here holds what PEFT would choke on, too."""
    if not isinstance(config.get("bias", ""), str | None):
        raise AdapterError(f"{path}: 'bias' must be a text, not {json.dumps(config['bias'])}")
    for field in _NAMES:
        value = config.get(field)
        if isinstance(value, str):
            try:
                re.compile(value)
            except (re.error, RecursionError, OverflowError) as error:
                raise AdapterError(f"{path}: '{field}' is not a regular expression: {error}") from error
        elif value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            raise AdapterError(f"{path}: '{field}' must be a list of names, or a regular expression")


def refuse_what_is_not_plain_lora(config: Mapping[str, Any], path: Path | str) -> None:
    """Raise UnsupportedAdapter, naming `path`, where the two factors are no update of the published model."""
    method = config.get("peft_type", "LORA")
    if isinstance(method, str) and method in _CONVERTIBLE:
        raise UnsupportedAdapter(
            f"{path}: peft_type is {method}, which is not LoRA: its update has no two factors to squeeze; load it with "
            "PEFT, turn it into LoRA with peft.save_as_lora(folder, model, rank=…), and squeeze the result"
        )
    if method not in ("LORA", "ADALORA"):
        raise UnsupportedAdapter(
            f"{path}: peft_type is {method}, which is not LoRA and adds no low-rank update to weights; "
            "there is nothing to squeeze: only LORA and ADALORA adapters can be squeezed"
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


class Rules:
    """The rank and the scale that a configuration declares for each module."""

    def __init__(self, config: Mapping[str, Any], path: Path, *, prefix: str = "") -> None:
        """prefix: before the names of all fields, as diffusers has it."""
        self.path = path
        self.rank = number(config, f"{prefix}r", path, whole=True)
        self.alpha = number(config, f"{prefix}lora_alpha", path)
        self.root = bool(config.get(f"{prefix}use_rslora", False))
        self.ranks = _patterns(config, f"{prefix}rank_pattern", path, whole=True)
        self.alphas = _patterns(config, f"{prefix}alpha_pattern", path)

    def declared_rank(self, name: str) -> int:
        """What PEFT takes as r of this module."""
        return int(self.ranks.get(name, self.rank))

    def scale(self, name: str, rank: int) -> float:
        """The effective scale of a module of this r."""
        return self.alphas.get(name, self.alpha) / (math.sqrt(rank) if self.root else rank)


def number(config: Mapping[str, Any], field: str, path: Path, *, whole: bool = False) -> float:
    """A field's number. Raises AdapterError if there is none."""
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{path}: '{field}' must be a number, not {json.dumps(value)}")
    if whole and (value != int(value) or value < 1):
        raise AdapterError(f"{path}: '{field}' must be a whole number of at least 1, not {value}")
    return value


def _patterns(config: Mapping[str, Any], field: str, path: Path, *, whole: bool = False) -> FirstMatch:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{path}: '{field}' must map module patterns to numbers")
    values = {key: number(patterns, key, path, whole=whole) for key in patterns}
    try:
        return FirstMatch(values)
    except BadPattern as error:
        raise AdapterError(f"{path}: '{field}' {error}") from error


def config_for(adapter: Adapter) -> dict[str, Any]:
    """The configuration under which PEFT gives every layer its rank and its scale.

    r is the largest rank, and lora_alpha makes the most common scale hold wherever no pattern is
    read, so that a server which ignores the patterns still applies it.
    """
    config = {"peft_type": "LORA", **adapter.config}
    root = bool(config.get("use_rslora", False))
    modules = _modules(adapter)
    rank = max(own for own, _ in modules.values())
    scales = [scale for _, scale in modules.values()]
    scale = Counter(scales).most_common(1)[0][0]
    config["r"] = rank
    config["lora_alpha"] = alpha_of(scale, rank, root=root)
    differing = {name: values for name, values in modules.items() if values != (rank, scale)}
    ranks = {name: own for name, (own, _) in differing.items() if own != rank}
    alphas = {name: alpha_of(own_scale, own, root=root) for name, (own, own_scale) in differing.items()}
    config["rank_pattern"] = patterns_for(ranks, modules)
    config["alpha_pattern"] = patterns_for(alphas, modules)
    config.update(_targets_for(adapter))
    if config.get("init_lora_weights") == "orthogonal":
        config["init_lora_weights"] = True  # PEFT refuses to load an odd rank under "orthogonal"
    return config


def _modules(adapter: Adapter) -> dict[str, tuple[int, float]]:
    """Module or parameter → the rank that PEFT calls its r, and its scale.

    The r of a grouped convolution is that of all its groups together.
    """
    parts = Counter(whole(name) for name in adapter.layers)
    return {
        whole(name): (spec.rank * (parts[whole(name)] if spec.kind == "conv" else 1), spec.scale)
        for name, spec in adapter.layers.items()
    }


def _targets_for(adapter: Adapter) -> dict[str, Any]:
    """target_modules and exclude_modules such that PEFT adapts the layers kept and no others."""
    if not adapter.left_out:
        return {}
    targets, excluded = adapter.config.get("target_modules"), adapter.config.get("exclude_modules")
    left_out, kept = list(adapter.left_out), {whole(name) for name in adapter.layers}
    if isinstance(targets, list):
        kept_endings = endings(kept)
        targets = [target for target in targets if target in kept_endings]
        left_out = [name for name in left_out if endings([name]).intersection(targets)]
    return {"target_modules": targets, "exclude_modules": _excluding(excluded, left_out, kept)}


def _excluding(excluded: Any, left_out: list[str], kept: Iterable[str]) -> Any:
    """exclude_modules with these names added: a list, or one expression where names end in one another or are many."""
    if not left_out:
        return excluded
    if not isinstance(excluded, str):
        listed: list[str] = list(excluded or ())
        if len(left_out) <= MANY and not endings(kept).intersection(left_out):
            return [*listed, *left_out]
        return "|".join((*(rf"(.*\.)?{re.escape(name)}" for name in listed), expression_of(left_out)))
    flags = re.match(r"\(\?([aiLmsux]+)\)", excluded)
    expression = f"(?{flags[1]}:{excluded[flags.end() :]})" if flags else f"({excluded})"
    return f"{expression}|{expression_of(left_out)}"


def alpha_of(scale: float, rank: int, *, root: bool) -> float:
    """The lora_alpha that gives this scale at this rank; a whole number if it is one."""
    alpha = scale * (math.sqrt(rank) if root else rank)
    nearest = round(alpha)
    # 16 · √64 / √16 comes out as 31.999…; but 0.125 must never become 0.
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha
