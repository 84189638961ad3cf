"""The model card of a squeezed adapter: what it was made of, what that cost, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from lora_squeeze.errors import OutputError
from lora_squeeze.records import Compression
from lora_squeeze.sizes import bytes_text
from lora_squeeze.version import __version__

__all__ = ["model_card"]

BEGIN, END = "<!-- lora-squeeze: begin -->", "<!-- lora-squeeze: end -->"

_METADATA = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_SECTION = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}\n?", re.DOTALL)

# PEFT's task types → the class that loads such a base model.
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def model_card(
    compression: Compression,
    *,
    repo: str,
    revision: str = "",
    config: Mapping[str, Any],
    weight_name: str = "",
    existing: str = "",
    own: bool = False,
) -> str:
    """README.md for the Hub: an existing card with this section and the metadata that it lacks, or a new one.

    repo, revision
        where the adapter is being put, for the lines that load it.
    config
        fields of adapter_config.json; empty for an adapter of a single file, whose name is `weight_name`.
    existing
        the card to begin with. Its text and its metadata are kept; an earlier section of ours is replaced.
    own
        whether that is this repository's own card. Measured results (`model-index`) of another adapter,
        such as the source, are left out.

    Raises OutputError if the existing card's metadata are no YAML.
    """
    metadata, text = _parted(existing)
    if not own:
        metadata.pop("model-index", None)
    metadata = _completed(metadata, config)
    section = "\n".join((BEGIN, *_section(compression, repo, revision, config, weight_name), END, ""))
    text = text.strip() or f"# {repo.rpartition('/')[2]}"
    text = _SECTION.sub(lambda _: section, text) if _SECTION.search(text) else f"{text}\n\n{section}"
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n\n{text.strip()}\n"


def _parted(card: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its text."""
    found = _METADATA.match(card)
    if found is None:
        return {}, card
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())[:200]
        raise OutputError(f"README.md: the metadata at its beginning are not valid YAML: {where}; mend them") from error
    if not isinstance(metadata, dict | None):
        raise OutputError("README.md: the metadata at its beginning are no table of keys and values; mend them")
    return dict(metadata or {}), card[found.end() :]


def _completed(metadata: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What is there stays; base model, library and tags are added."""
    base = _hub_name(config.get("base_model_name_or_path"))
    library = "peft" if config else "diffusers"
    tags = metadata.get("tags")
    given = [tags] if isinstance(tags, str) else list(tags) if isinstance(tags, list) else []
    return {
        **({"base_model": base} if base else {}),
        "library_name": library,
        **metadata,
        "tags": list(dict.fromkeys([*given, "lora", "lora-squeeze"])),
    }


def _section(
    compression: Compression, repo: str, revision: str, config: Mapping[str, Any], weight_name: str
) -> list[str]:
    worst = compression.worst_layer
    rows = {
        "Source": _source(compression.source),
        "Policy": _code(compression.policy),
        "Rank": _ranks(compression),
        "Parameters": _change(compression.parameters_before, compression.parameters_after, "{:,}".format),
        "Weights": _change(compression.bytes_before, compression.bytes_after, bytes_text),
        "Retained variance": f"{compression.retained_variance:.2%}",
        "Relative error": f"{compression.relative_error:.2e} over all layers",
        "Worst layer": f"{worst.relative_error:.2e} in {_code(worst.spectrum.name)}",
    }
    return [
        "## Squeezed",
        "",
        "This adapter is a smaller approximation of another one: each layer's update was replaced by its best "
        f"approximation at a lower rank (lora-squeeze {__version__}, after "
        "[LoRA-Squeeze](https://arxiv.org/abs/2602.10993)). Nothing was trained.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "The relative error is ‖ΔW − ΔW'‖ / ‖ΔW‖, rounding included; the retained variance is 1 − error². They say how "
        "close the weights are, not how well the adapter does its task.",
        "",
        "```python",
        *_loading(repo, revision, config, weight_name),
        "```",
    ]


def _code(text: str) -> str:
    """A name or spelling from anybody's file as code in a cell: one line, which ends neither the cell nor the code."""
    text = " ".join(text.split()).replace("|", "\\|")
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (max(map(len, re.findall("`+", text))) + 1)
    return f"{fence} {text} {fence}"


def _source(source: str) -> str:
    """A link for what is on the Hub; no folders of this machine."""
    if found := re.fullmatch(r"hf://([^@/]+/[^@/]+)@([0-9a-f]{40})(?:/(.+))?", source):
        inside = f"/{found[3]}" if found[3] else ""
        return (
            f"[{found[1]}{inside}](https://huggingface.co/{found[1]}/tree/{found[2]}{inside}), commit `{found[2][:12]}`"
        )
    if source.startswith("tinker://"):
        return _code(source)
    return _code(PurePath(source).name)


def _ranks(compression: Compression) -> str:
    before, after = ([layer.spectrum.rank for layer in compression.layers], [one.rank for one in compression.layers])
    left_out = sum(rank == 0 for rank in after)
    note = f", {left_out} of {len(after)} layers left out" if left_out else ""
    return f"{_span(before)} → {_span([rank for rank in after if rank])}{note}"


def _span(ranks: list[int]) -> str:
    if len(set(ranks)) == 1:
        return str(ranks[0])
    return f"{min(ranks)}–{max(ranks)} (mean {sum(ranks) / len(ranks):.1f})"


def _change(before: int, after: int, shown: Any) -> str:
    share = f" ({after / before:.1%})" if before else ""
    return f"{shown(before)} → {shown(after)}{share}"


def _loading(repo: str, revision: str, config: Mapping[str, Any], weight_name: str) -> list[str]:
    at = f', revision="{revision}"' if revision else ""
    if not config:
        return [
            "# pipeline: a diffusers pipeline of the base model",
            f'pipeline.load_lora_weights("{repo}", weight_name="{weight_name}"{at})',
        ]
    auto = _AUTO_CLASSES.get(str(config.get("task_type")), "AutoModel")
    base = _hub_name(config.get("base_model_name_or_path")) or "BASE-MODEL"
    return [
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'base = {auto}.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(base, "{repo}"{at})',
    ]


def _hub_name(name: Any) -> str:
    """The base model if it is named as on the Hub, not by a folder of some machine."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name, re.ASCII) else ""
