"""Base models as transformers holds them: load them and their tokenizers, name what is missing.

    tokenizer, model = load_tokenizer("models/base"), load_model("models/base")

    seeing = load_seeing("models/that-sees")

A base model is a folder, the name of a model on the Hub, or a .gguf file, whose weights are then
dequantised.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lora_squeeze.errors import ModelError, reason_of
from lora_squeeze.extras import require
from lora_squeeze.seeing import Seeing, seeing_of

__all__ = [
    "DTYPES",
    "PLAIN_TEMPLATE",
    "QUANTIZATIONS",
    "TASKS",
    "Task",
    "device_of",
    "load_model",
    "load_seeing",
    "load_tokenizer",
    "pad_like",
    "plain_template",
    "task_of",
]

Task = Literal["causal-lm", "image-text-to-text", "sequence-classification"]
TASKS: tuple[str, ...] = get_args(Task)
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
QUANTIZATIONS = ("4bit", "8bit")


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

_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "image-text-to-text": "AutoModelForImageTextToText",
    "sequence-classification": "AutoModelForSequenceClassification",
}


def device_of(name: str = "auto") -> str:
    """A torch device; auto is the first GPU there is, else the processor. Raises ModelError."""
    torch = require("torch", "train")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device '{name}' cannot be used: {reason_of(error)}") from error
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
        raise ModelError(f"{source}: its tokenizer cannot be loaded: {reason_of(error)}") from error
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
        raise ModelError(f"{source}: cannot be loaded as {task}: {reason_of(error)}") from error
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


def pad_like(model: Any, tokenizer: Any) -> None:
    """Tell a classifier which token its texts are padded with: causal ones look for the last token before these."""
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id


def task_of(model: Any) -> Task:
    """What a model, with or without an adapter, is for."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return "sequence-classification" if "SequenceClassification" in type(model).__name__ else "causal-lm"


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
    reason = f"it has no processor for them ({reason_of(error)})" if error else "it reads only texts"
    return f"{reason}; [data] columns = {{ image = '' }}, or --columns image=, ignores them"
