"""The keys of a PEFT file: which tensors are factors, which belong to them, which are something else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_squeeze.errors import AdapterError, UnsupportedAdapter
from lora_squeeze.formats.tensors import TensorSpec
from lora_squeeze.peft_names import PREFIX

__all__ = ["Keys", "Pair", "sort_keys"]

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<factor>A|B)(\.(?P<adapter>[^.]+))?\.weight"
    r"|(?P<embedding>.+)\.lora_embedding_(?P<side>A|B)(\.(?P<name>[^.]+))?"
)
# AdaLoRA's three factors are parameters, not modules.
_ADALORA_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>A|B|E)(\.(?P<adapter>[^.]+))?")

# What PEFT stores beside the pairs, with an adapter's name in it where a raw state dict was saved.
_COMPANIONS = (
    (re.compile(r"(.+\.lora_B)\.([^.]+)(\.bias)"), r"\1\3"),
    (re.compile(r"(.+\.lora_magnitude_vector)(?:\.(?!weight$)([^.]+))?(\.weight)?"), r"\1"),
    (re.compile(r"(.+)\.modules_to_save\.([^.]+)(\..+)"), r"\1\3"),
    (re.compile(r"(.+\.trainable_tokens_delta)\.([^.]+)()"), r"\1"),
)
# Trained parts of a module without which its factors mean something else.
_FOREIGN_PART = re.compile(r".+\.lora_(?P<part>E|diag|mid)(\.[^.]+)*")
_KNOWN = re.compile(
    r".+\.lora_B\.bias|.+\.lora_magnitude_vector|.+\.trainable_tokens_delta|(.+\.)?(embed_tokens|lm_head)(\.base_layer)?\.weight"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The factors of one module, as they lie in the file.

    module
        its name in the file, without the prefix.
    values
        AdaLoRA's singular values, which lie between the two.
    """

    module: str
    down: TensorSpec
    up: TensorSpec
    embedding: bool = False
    values: TensorSpec | None = None


@dataclass(frozen=True)
class Keys:
    """All keys of a file, sorted.

    pairs
        by module, in file order.
    others
        key as PEFT saves it → key in the file, of what is no factor.
    unknown
        those of `others` of which nobody knows what they are for.
    adapter_name
        if the keys carry one, as in a raw state dict.
    bare
        keys of factors that do not begin with PEFT's prefix.
    """

    pairs: Mapping[str, Pair]
    others: Mapping[str, str]
    unknown: tuple[str, ...]
    adapter_name: str = ""
    bare: tuple[str, ...] = ()


def sort_keys(tensors: Mapping[str, TensorSpec], config: Mapping[str, Any], path: Path) -> Keys:
    """Sort all keys of a file. Raises AdapterError, naming file and key, for what is incomplete."""
    adalora = config.get("peft_type") == "ADALORA"
    factors: dict[str, dict[str, TensorSpec]] = {}
    embeddings: set[str] = set()
    others: dict[str, str] = {}
    names: dict[str, str] = {}
    bare: list[str] = []
    for key, spec in tensors.items():
        match = (_ADALORA_FACTOR if adalora else _FACTOR).fullmatch(key)
        if match is None:
            standard, name = _standard(key)
            if standard in others:
                raise AdapterError(f"{path}: '{key}' and '{others[standard]}' are the same tensor of two adapters")
            others[standard] = key
            if name:
                names.setdefault(name, key)
            continue
        groups = match.groupdict()
        module = (groups["module"] or groups["embedding"]).removeprefix(PREFIX)
        factor = groups["factor"] or groups["side"]
        if not key.startswith(PREFIX):
            bare.append(key)
        names.setdefault(groups["adapter"] or groups.get("name") or "", key)
        if factor in factors.setdefault(module, {}):
            raise AdapterError(f"{path}: '{key}' and '{factors[module][factor].key}' are factors of the same module")
        factors[module][factor] = spec
        if groups.get("embedding"):
            embeddings.add(module)
    if len(names) > 1:
        first, second = list(names)[:2]
        raise AdapterError(
            f"{path}: keys carry different adapter names ('{names[first]}', '{names[second]}'); save one adapter alone"
        )
    wanted = ("A", "B", "E") if adalora else ("A", "B")
    unknown = tuple(_unknown(others, config, path))
    return Keys(
        pairs={name: _pair(name, found, wanted, name in embeddings, path) for name, found in factors.items()},
        others=_prefixed(others, unknown, path) if bare else others,
        unknown=unknown,
        adapter_name=next(iter(names), ""),
        bare=tuple(bare),
    )


def _standard(key: str) -> tuple[str, str]:
    """A companion's key as PEFT saves it, and the adapter's name that was in it."""
    for pattern, replacement in _COMPANIONS:
        if match := pattern.fullmatch(key):
            return match.expand(replacement), match[2] or ""
    return key, ""


def _prefixed(others: Mapping[str, str], unknown: tuple[str, ...], path: Path) -> dict[str, str]:
    """The prefix before the keys of what belongs to factors without one; what is unknown stays as it was found."""
    found: dict[str, str] = {}
    for key, stored in others.items():
        repaired = key if key in unknown or key.startswith(PREFIX) else PREFIX + key
        if repaired in found:
            raise AdapterError(
                f"{path}: '{stored}' and '{found[repaired]}' are the same tensor, with and without {PREFIX}; "
                "remove the one that is wrong"
            )
        found[repaired] = stored
    return found


def _pair(module: str, found: Mapping[str, TensorSpec], wanted: tuple[str, ...], embedding: bool, path: Path) -> Pair:
    for factor in wanted:
        if factor not in found:
            present = next(iter(found.values())).key
            raise AdapterError(f"{path}: '{present}' has no lora_{factor} beside it; the file is incomplete")
    return Pair(module, found["A"], found["B"], embedding, found.get("E"))


def _unknown(others: Mapping[str, str], config: Mapping[str, Any], path: Path) -> Iterator[str]:
    saved = [re.escape(name) for name in config.get("modules_to_save") or ()]
    trained = re.compile(rf"(.*\.)?({'|'.join(saved)})\..+") if saved else None
    biases = config.get("bias", "none") != "none"
    for key in others:
        if part := _FOREIGN_PART.fullmatch(key):
            raise UnsupportedAdapter(
                f"{path}: '{key}' belongs to the update of its module, which is no product of lora_A and lora_B alone; "
                f"lora_{part['part']} cannot be squeezed"
            )
        if _KNOWN.fullmatch(key) or (biases and key.endswith(".bias")) or (trained and trained.fullmatch(key)):
            continue
        yield key
