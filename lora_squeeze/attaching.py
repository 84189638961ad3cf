"""Adapters on base models, as PEFT holds them: a fresh LoRA, a saved one, what it says of its base and its classes.

model = attach_lora(load_model("models/base"), rank=64)
model = attach_adapter(load_model("models/base"), "my-adapter")
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_squeeze.errors import AdapterError, ModelError, reason_of
from lora_squeeze.extras import require
from lora_squeeze.models import Task, task_of
from lora_squeeze.peft_names import CONFIG
from lora_squeeze.precision import hold_in_float32

__all__ = [
    "LABELS",
    "attach_adapter",
    "attach_another",
    "attach_lora",
    "base_of",
    "labels_of_adapter",
    "use_adapter",
    "write_labels",
]

LABELS = "labels.json"  # beside an adapter that classifies: what its classes are called

_PLAIN_NAME = re.compile(r"[\w.-]+")
_PEFT_TASKS = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}


def attach_lora(
    model: Any,
    *,
    rank: int,
    alpha: float = 0,
    dropout: float = 0.0,
    target_modules: Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
    rslora: bool = False,
    dora: bool = False,
) -> Any:
    """Give a base model a fresh LoRA to train, and return the PeftModel.

    alpha
        0: twice the rank.
    target_modules
        names, or ends of names, of modules, or regular expressions for them; none: every linear layer but the head.
        Of a model that sees, names mean its text part alone; a regular expression reaches the rest, too.

    Raises ModelError if nothing in the model has these names.
    """
    peft = require("peft", "train")
    by_name = all(map(_PLAIN_NAME.fullmatch, target_modules))
    text_part = _text_part(model)
    config = peft.LoraConfig(
        task_type=_PEFT_TASKS[task_of(model)],
        r=rank,
        lora_alpha=alpha or 2 * rank,
        lora_dropout=dropout,
        target_modules=_targets(target_modules or _linear_names(model, text_part)),
        exclude_modules=rf"(?!{re.escape(text_part)}\.).*" if text_part and by_name else None,
        modules_to_save=list(modules_to_save) or None,
        use_rslora=rslora,
        use_dora=dora,
    )
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"no LoRA can be attached to {type(model).__name__}: {reason_of(error)}") from error
    hold_in_float32(adapted)
    return adapted


def _targets(names: Sequence[str]) -> list[str] | str:
    """As PEFT takes them: names as a list, regular expressions as one that matches a whole name."""
    if all(_PLAIN_NAME.fullmatch(name) for name in names):
        return list(names) or "all-linear"
    for name in names:
        try:
            re.compile(name)
        except re.error as error:
            raise ModelError(f"target_modules: '{name}' is neither a name nor a regular expression: {error}") from error
    ends = "|".join(re.escape(name) if _PLAIN_NAME.fullmatch(name) else name for name in names)
    return rf"(?:.*\.)?(?:{ends})"


def _text_part(model: Any) -> str:
    """The name of what is neither vision tower nor projector, in a model that sees; "" in others."""
    if getattr(model.config, "vision_config", None) is None:
        return ""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def _linear_names(model: Any, part: str) -> list[str]:
    """The last names of the linear layers in a part of a model; none for "", where PEFT knows which is the head."""
    torch = require("torch", "train")
    layers = model.get_submodule(part).named_modules() if part else ()
    return sorted({name.rpartition(".")[2] for name, module in layers if isinstance(module, torch.nn.Linear)})


def attach_adapter(model: Any, path: str, *, trainable: bool = False, name: str = "default") -> Any:
    """Load a saved adapter onto its base model, and return the PeftModel. Raises AdapterError."""
    peft = require("peft", "train")
    if Path(path).exists() and not (Path(path) / CONFIG).exists():
        raise AdapterError(f"{path}: holds no {CONFIG}; only PEFT adapters can be loaded onto a model")
    with _loading(path, model):
        adapted = peft.PeftModel.from_pretrained(model, path, adapter_name=name, is_trainable=trainable)
    if trainable:
        hold_in_float32(adapted, name=name)
    return adapted


def attach_another(model: Any, path: str, *, name: str) -> None:
    """Load a saved adapter beside those that a PeftModel has. Raises AdapterError, also for one that does not fit."""
    base = model.get_base_model()
    with _loading(path, base):
        missing: Sequence[str] = model.load_adapter(path, name).missing_keys
    if missing:  # only from_pretrained warns of these
        raise _unfitting(path, base, missing[0])


def use_adapter(model: Any, path: str, *, name: str) -> None:
    """Load a saved adapter beside those that a PeftModel has, and let it be the one that computes.

    Raises AdapterError.
    """
    attach_another(model, path, name=name)
    model.set_adapter(name)


@contextmanager
def _loading(path: str, model: Any) -> Generator[None, None, None]:
    """What PEFT says of an adapter that does not fit, as an AdapterError."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield
    except Exception as error:  # a missing file, other shapes, an unknown type: whatever was in the folder
        raise AdapterError(f"{path}: cannot be loaded onto {type(model).__name__}: {reason_of(error)}") from error
    _check_complete(path, model, said)


def _check_complete(path: str, model: Any, said: Sequence[warnings.WarningMessage]) -> None:
    """PEFT leaves factors that it does not find as they begin, which change nothing, and only warns."""
    for one in said:
        if "missing adapter keys" not in str(one.message):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        else:
            raise _unfitting(path, model, str(one.message).partition("['")[2].partition("'")[0])


def _unfitting(path: str, model: Any, first: str) -> AdapterError:
    return AdapterError(
        f"{path}: does not fit {type(model).__name__}, which would have factors where it has none (first: "
        f"{first}); it was trained on another model, or on another class of it"
    )


def base_of(path: str) -> tuple[str, Task]:
    """The base model that an adapter names, and what it is for. Raises AdapterError if it names none."""
    file = Path(path) / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{path}: holds no {CONFIG}; only PEFT adapters can be loaded onto a model") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file}: cannot be read: {error}") from error
    if not config.get("base_model_name_or_path"):
        raise AdapterError(f"{file}: names no base model; say which with --base")
    return config["base_model_name_or_path"], (
        "sequence-classification" if config.get("task_type") == "SEQ_CLS" else "causal-lm"
    )


def write_labels(folder: Path, labels: Sequence[str]) -> None:
    """Save what the classes are called beside an adapter."""
    (folder / LABELS).write_text(json.dumps({"labels": list(labels)}, ensure_ascii=False) + "\n", encoding="utf-8")


def labels_of_adapter(path: str) -> tuple[str, ...]:
    """What the classes of an adapter are called; none if `write_labels` left nothing. Raises AdapterError."""
    file = Path(path) / LABELS
    try:
        return tuple(str(label) for label in json.loads(file.read_text(encoding="utf-8"))["labels"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{file}: cannot be read: {error}") from error
