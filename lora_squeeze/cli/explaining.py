"""What `--explain` prints: what settings amount to, and every key that is set.

A key is looked up in its dataclass, so one that is added there is shown as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from lora_squeeze.sections import document_of, keys_of, toml_value
from lora_squeeze.settings import Settings, SqueezeSettings
from lora_squeeze.training.settings import RunSettings

__all__ = ["explain_run", "explain_squeeze", "print_rows", "set_rows", "squeeze_rows"]

_WIDTH = 24

Rows = list[tuple[str, str]]

# What a key of [squeeze] amounts to; "" says nothing. Those without an entry are shown if they are set.
_SQUEEZE: dict[str, Callable[[SqueezeSettings], str]] = {
    "source_rank": lambda chosen: str(chosen.source_rank or "from the tensors"),
    "target_ranks": lambda chosen: str(chosen.target_ranks or "powers of two up to the source rank"),
    "min_variance_retention": lambda chosen: f"{chosen.min_variance_retention} ({chosen.by} over layers)",
    "output_path": lambda chosen: chosen.output_path or "none: analyze only",
    "compress_to": lambda chosen: _rank_chosen(chosen),
    "calibration": lambda chosen: chosen.calibration or "none: variance is that of the weights",
    "runtime": lambda chosen: chosen.runtime or "all that read its format",
    "device": lambda chosen: chosen.device,
}

# Keys of [squeeze] that say how the output is written: without an output_path they say nothing.
_OF_OUTPUT = (
    "compress_to", "dtype", "policy", "min_rank", "max_rank", "multiple_of", "steps", "rank_for", "equal", "runtime",
    "max_lora_rank", "base_path", "overwrite",
)  # fmt: skip


def print_rows(rows: Iterable[tuple[str, object]]) -> None:
    """A line for each label and what is said of it; nothing for what there is nothing to say of."""
    for label, value in rows:
        if value != "":
            click.echo(f"{label:<{max(_WIDTH, len(label) + 2)}}{value}")


def squeeze_rows(chosen: SqueezeSettings, *, unheeded: Mapping[str, str] | None = None) -> Rows:
    """What a squeeze would do, key by key.

    unheeded
        keys that have no say here → what has it instead.
    """
    given = document_of(chosen)
    rows: Rows = []
    for key in keys_of(SqueezeSettings):
        instead = (unheeded or {}).get(key, "")
        said = _SQUEEZE[key](chosen) if key in _SQUEEZE and not instead else _shown(given[key]) if key in given else ""
        if key in given and instead:
            said += f" (not heeded: {instead})"
        elif key in given and key in _OF_OUTPUT and not chosen.output_path:
            said += " (nothing is written without output_path)"
        rows.append((key, said))
    return rows


def set_rows(document: Mapping[str, Any], *, told: Iterable[str] = ()) -> Rows:
    """SECTION.KEY and its value for every key of a document as `document_of` gives it: for every key that is set.

    told
        those of which something has been said already, SECTION.KEY; or whole sections.
    """
    skipped = set(told)
    return [
        (f"{section}.{key}", _shown(value))
        for section, keys in document.items()
        if section not in skipped
        for key, value in keys.items()
        if f"{section}.{key}" not in skipped
    ]


def explain_squeeze(file: Path, settings: Settings) -> None:
    """Print what a squeeze would do."""
    chosen = settings.squeeze
    rows = dict(squeeze_rows(chosen))
    told = ["squeeze"]
    if settings.source_rank and not chosen.source_rank:
        rows["source_rank"] = str(settings.source_rank)
        told.append("model.lora_rank")
    print_rows([("mode", "squeeze"), ("config", file), *rows.items(), *set_rows(document_of(settings), told=told)])


def explain_run(config: Path, settings: RunSettings, folder: Path) -> None:
    """Print what a run would do."""
    told: set[str] = set()
    rows: list[tuple[str, object]] = [("mode", "training"), ("config", config)]

    def tell(label: str, value: object, *keys: str) -> None:
        rows.append((label, value))
        told.update(keys)

    training, model, data = settings.training, settings.model, settings.data
    grpo = settings.method == "grpo"
    tell("method", settings.method, "training.method")
    tell("model", model.model or "the one that the adapter names", "model.model")
    squeezed = f"{model.adapter}, squeezed to rank {model.squeeze_to}"
    tell("adapter", squeezed if model.squeeze_to else model.adapter, "model.adapter", "model.squeeze_to")
    tell("lora_rank", settings.rank or "that of the adapter", "model.lora_rank")
    if schedule := settings.schedule(settings.steps, settings.rank) if settings.steps and settings.rank else None:
        stages = zip(schedule.ranks, schedule.lengths, strict=True)
        tell("in_squeeze", ", ".join(f"{rank} for {steps} steps" for rank, steps in stages))
    else:
        tell("in_squeeze", settings.in_squeeze.schedule, "in_squeeze.schedule")
    tell("data", ", ".join(data.source), "data.source")
    if data.eval_source:
        tell("held out", ", ".join(data.eval_source), "data.eval_source")
    elif data.eval_fraction:
        tell("held out", f"{data.eval_fraction:g} of the data", "data.eval_fraction")
    if settings.steps:
        tell("steps", settings.steps, "training.max_steps")
    else:
        tell("steps", f"{training.epochs:g} epochs", "training.max_steps", "training.epochs")
    if grpo:
        in_groups = f"{training.batch_size} prompts × {training.group_size} completions"
        tell("batch_size", in_groups, "training.batch_size", "training.group_size")
    else:
        tell("batch_size", training.batch_size, "training.batch_size")
    warm_up = f" after {training.warmup_steps} steps" if training.warmup_steps else ""
    rate = f"{training.lr:g}, {training.lr_schedule}{warm_up}"
    tell("lr", rate, "training.lr", "training.lr_schedule", "training.warmup_steps")
    tell("optimizer", settings.optimizer.name, "optimizer.name")
    tell("seed", training.seed, "training.seed")
    if str(folder) == settings.logging.log_dir:
        told.add("logging.log_dir")
    tell("output", folder)
    if grpo:
        tell("reward", settings.reward.type or "exact", "reward.type")
        tell("advantage_mode", settings.algorithm.advantage_mode or "grpo", "algorithm.advantage_mode")
        tell("transform_mode", settings.algorithm.transform_mode or "none", "algorithm.transform_mode")
    print_rows([*rows, *set_rows(document_of(settings), told=("squeeze", *told))])
    if settings.squeeze is not None:
        click.echo("[squeeze], after training:")
        print_rows(squeeze_rows(settings.squeeze, unheeded={"adapter_path": "the adapter that is trained"}))


def _rank_chosen(chosen: SqueezeSettings) -> str:
    if chosen.compress_to:
        return str(chosen.compress_to)
    if chosen.policy:  # which is a row of its own
        return ""
    return "the recommended rank" if chosen.output_path else "nothing is written"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else toml_value(value)
