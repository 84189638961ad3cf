"""Base models and adapters as PEFT and transformers hold them: load, attach, name what is missing.

    tokenizer = load_tokenizer("models/base")
    model = attach_lora(load_model("models/base"), rank=64)
    model = attach_adapter(load_model("models/base"), "my-adapter")

    seeing = load_seeing("models/that-sees")

A base model is a folder, the name of a model on the Hub, or a .gguf file, whose weights are then
dequantised.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from lora_squeeze.errors import AdapterError, ModelError
from lora_squeeze.extras import require
from lora_squeeze.peft_names import CONFIG
from lora_squeeze.precision import hold_in_float32
from lora_squeeze.seeing import Seeing, seeing_of

__all__ = [
    "DTYPES",
    "LABELS",
    "PLAIN_TEMPLATE",
    "QUANTIZATIONS",
    "TASKS",
    "Task",
    "attach_adapter",
    "attach_lora",
    "base_of",
    "device_of",
    "labels_of_adapter",
    "load_model",
    "load_seeing",
    "load_tokenizer",
    "pad_like",
    "plain_template",
    "task_of",
    "use_adapter",
    "write_labels",
]

Task = Literal["causal-lm", "image-text-to-text", "sequence-classification"]
TASKS: tuple[str, ...] = get_args(Task)
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
QUANTIZATIONS = ("4bit", "8bit")

LABELS = "labels.json"  # beside an adapter that classifies: what its classes are called


def plain_template(image_token: str = "") -> str:
    """A chat template for base models without one of their own; it is saved with the tokenizer or processor.

    image_token
        what stands for an image in messages in parts.
    """
    part = f"{{{{ '{image_token}' if part.type == 'image' else part.text }}}}"
    return (
        "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}{{ message.role.capitalize() }}: "
        "{% if message.content is string %}{{ message.content | trim }}"
        f"{{% else %}}{{% for part in message.content %}}{part}{{% endfor %}}{{% endif %}}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n' }}Assistant:{% endif %}"
    )


PLAIN_TEMPLATE = plain_template()

_PLAIN_NAME = re.compile(r"[\w.-]+")
_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "image-text-to-text": "AutoModelForImageTextToText",
    "sequence-classification": "AutoModelForSequenceClassification",
}
_PEFT_TASKS = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}


def device_of(name: str = "auto") -> str:
    """A torch device; auto is the first GPU there is, else the processor. Raises ModelError."""
    torch = require("torch", "train")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return name


def load_tokenizer(source: str, *, revision: str = "") -> Any:
    """The tokenizer of a base model, with a token to pad with and a chat template.

    Where it has no padding token, that of the end of a text serves; where it has no template,
    PLAIN_TEMPLATE. Raises ModelError.
    """
    transformers = require("transformers", "train")
    where, options = _where(source, revision)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:  # OSError, ValueError, KeyError, network errors: whatever was in the files
        raise ModelError(f"{source}: its tokenizer cannot be loaded: {_reason(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ModelError(f"{source}: its tokenizer has no token for padding, and none for the end of a text either")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def load_seeing(source: str, *, revision: str = "") -> Seeing:
    """The processor of a base model that sees, with a tokenizer as `load_tokenizer` gives it. Raises ModelError."""
    transformers = require("transformers", "train")
    require("PIL.Image", "vision")
    where, options = _where(source, revision)
    try:
        processor = transformers.AutoProcessor.from_pretrained(where, **options)
    except Exception as error:  # OSError, ValueError, KeyError, network errors: whatever was in the files
        raise ModelError(f"{source}: there are images in the data; {_reads_only_text(error)}") from error
    if not isinstance(processor, transformers.ProcessorMixin):
        raise ModelError(f"{source}: there are images in the data; {_reads_only_text()}")
    tokenizer = load_tokenizer(source, revision=revision)
    vars(processor)["tokenizer"] = tokenizer
    try:
        found = seeing_of(processor, tokenizer)
        if processor.chat_template is None and tokenizer.chat_template == PLAIN_TEMPLATE:
            processor.chat_template = tokenizer.chat_template = plain_template(found.token)
            found = seeing_of(processor, tokenizer)
        return found
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error


def load_model(
    source: str,
    *,
    task: Task = "causal-lm",
    labels: Sequence[str] = (),
    dtype: str = "auto",
    quantization: str = "",
    device: str = "auto",
    revision: str = "",
) -> Any:
    """A base model, in eval mode, on a device.

    labels
        of a sequence classification; a head that the model does not have is made anew, at random.
    dtype
        f32, f16 or bf16; auto: f32 on a processor, otherwise that of the file.
    quantization
        4bit (NF4, as in QLoRA, arXiv 2305.14314) or 8bit (LLM.int8, arXiv 2208.07339): the linear layers'
        weights, by bitsandbytes.

    Raises ModelError for what cannot be found or read.
    """
    torch = require("torch", "train")
    where, options = _where(source, revision)
    place = device_of(device)
    if task == "sequence-classification":
        if not labels:
            raise ModelError(f"{source}: a sequence classification needs its labels")
        numbered = dict(enumerate(labels))
        options |= {"num_labels": len(labels), "id2label": numbered, "label2id": {v: k for k, v in numbered.items()}}
        options["ignore_mismatched_sizes"] = True  # a head of other classes is of no use
    if dtype == "auto" and place == "cpu":
        dtype = "f32"  # faster than bf16 on most processors
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype '{dtype}' is unknown; known are auto, {', '.join(DTYPES)}")
    wanted: Any = "auto" if dtype == "auto" else getattr(torch, DTYPES[dtype])
    if quantization:
        if task == "sequence-classification" or "gguf_file" in options:
            what = "a new head" if task == "sequence-classification" else "a .gguf file"
            raise ModelError(f"{source}: {what} and quantization = '{quantization}' do not go together")
        options |= {"quantization_config": _quantized(quantization, dtype), "device_map": {"": place}}
    try:
        model = _from_pretrained(task, where, dtype=wanted, **options)
    except Exception as error:  # OSError, ValueError, KeyError, network errors: whatever was in the files
        raise ModelError(f"{source}: cannot be loaded as {task}: {_reason(error)}") from error
    if "gguf_file" in options:
        _forget_quantisation(model)
    return (model if quantization else model.to(place)).eval()


def _from_pretrained(task: Task, where: str, **options: Any) -> Any:
    transformers = require("transformers", "train")
    try:
        return getattr(transformers, _CLASSES[task]).from_pretrained(where, **options)
    except ValueError as error:
        # Some models that see have no class for texts alone.
        if task != "causal-lm" or "Unrecognized configuration class" not in str(error):
            raise
        try:
            return transformers.AutoModelForImageTextToText.from_pretrained(where, **options)
        except ValueError:
            raise error from None


def _quantized(quantization: str, dtype: str) -> Any:
    transformers, torch = require("transformers", "train"), require("torch", "train")
    require("bitsandbytes", "bitsandbytes")
    if quantization == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, DTYPES.get(dtype, "bfloat16")),
    )


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
        raise ModelError(f"no LoRA can be attached to {type(model).__name__}: {_reason(error)}") from error
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


def use_adapter(model: Any, path: str, *, name: str) -> None:
    """Load a saved adapter beside those that a PeftModel has, and let it be the one that computes.

    Raises AdapterError.
    """
    with _loading(path, model.get_base_model()):
        model.load_adapter(path, name)
    model.set_adapter(name)


@contextmanager
def _loading(path: str, model: Any) -> Generator[None, None, None]:
    """What PEFT says of an adapter that does not fit, as an AdapterError."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield
    except Exception as error:  # a missing file, other shapes, an unknown type: whatever was in the folder
        raise AdapterError(f"{path}: cannot be loaded onto {type(model).__name__}: {_reason(error)}") from error
    _check_complete(path, model, said)


def _check_complete(path: str, model: Any, said: Sequence[warnings.WarningMessage]) -> None:
    """PEFT leaves factors that it does not find as they begin, which change nothing, and only warns."""
    for one in said:
        if "missing adapter keys" not in str(one.message):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        else:
            first = str(one.message).partition("['")[2].partition("'")[0]
            raise AdapterError(
                f"{path}: does not fit {type(model).__name__}, which would have factors where it has none (first: "
                f"{first}); it was trained on another model, or on another class of it"
            )


def pad_like(model: Any, tokenizer: Any) -> None:
    """Tell a classifier which token its texts are padded with: causal ones look for the last token before these."""
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id


def task_of(model: Any) -> Task:
    """What a model, with or without an adapter, is for."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return "sequence-classification" if "SequenceClassification" in type(model).__name__ else "causal-lm"


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


def _where(source: str, revision: str) -> tuple[str, dict[str, Any]]:
    """Where from_pretrained shall look, and the options that say so."""
    options: dict[str, Any] = {"revision": revision} if revision else {}
    path = Path(source)
    if path.suffix == ".gguf":
        require("gguf", "train")
        if not path.is_file():
            raise ModelError(f"{source}: no such file")
        return str(path.parent), {**options, "gguf_file": path.name}
    if path.is_absolute() or source.startswith((".", "~")):
        path = path.expanduser()
        if not path.is_dir():
            raise ModelError(f"{source}: no such folder")
        return str(path), options
    return source, options


def _forget_quantisation(model: Any) -> None:
    """Its parameters are ordinary tensors, but it calls itself quantised and would refuse to be trained."""
    vars(model.config).pop("quantization_config", None)
    for name in ("is_quantized", "hf_quantizer", "quantization_method"):
        vars(model).pop(name, None)


def _reads_only_text(error: Exception | None = None) -> str:
    reason = f"it has no processor for them ({_reason(error)})" if error else "it reads only texts"
    return f"{reason}; [data] columns = {{ image = '' }}, or --columns image=, ignores them"


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
