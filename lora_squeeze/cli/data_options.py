"""Options of the commands that run a model on data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_squeeze.cli.output import download_progress

if TYPE_CHECKING:
    from lora_squeeze.data import Example
    from lora_squeeze.evaluation.measure import Trial
    from lora_squeeze.evaluation.subject import Subject

__all__ = ["DATA_PARAMETERS", "DataOptions", "data_options", "opened", "read", "trial_for"]

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class DataOptions:
    """A base model, data for it, and how they are run."""

    base: str
    data: tuple[str, ...]
    limit: int
    columns: dict[str, str]
    labels: tuple[str, ...]
    prompt: str
    batch_size: int
    max_length: int
    dtype: str
    quantization: str | None
    device: str


# What click calls them.
DATA_PARAMETERS = tuple(f"run_{name}" for name in DataOptions.__dataclass_fields__)


def _parse_columns(_context: click.Context, _option: click.Parameter, entries: tuple[str, ...]) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in entries]
    if wrong := [entry for entry, pair in zip(entries, pairs, strict=True) if not (pair[0] and pair[1])]:
        raise click.BadParameter(f"'{wrong[0]}' is not OURS=THEIRS, such as text=sentence")
    return {ours: theirs for ours, _, theirs in pairs}


def _parse_prompt(_context: click.Context, _option: click.Parameter, text: str) -> str:
    return text.replace("\\n", "\n")


def _parse_labels(_context: click.Context, _option: click.Parameter, text: str) -> tuple[str, ...]:
    """A comma-separated list, or a file with one a line."""
    if Path(text).is_file() and text:
        return tuple(line for line in Path(text).read_text(encoding="utf-8").splitlines() if line)
    return tuple(label.strip() for label in text.split(",") if label.strip())


def data_options(*, model: str = "", required: bool = True, base: bool = True) -> Callable[[Command], Command]:
    """--base, --data and how they are run; the command gets them as one DataOptions.

    model
        a prefix for --dtype and --device, in commands that have others of these names.
    base
        whether to add --base; a command that has its own fills it in.
    """

    def add(command: Command) -> Command:
        def with_data(**values: Any) -> Any:
            names = DataOptions.__dataclass_fields__
            return command(
                data_options=DataOptions(**{name: values.pop(f"run_{name}", "") for name in names}), **values
            )

        with_data.__doc__, with_data.__name__ = command.__doc__, command.__name__
        decorated: Any = with_data
        decorated.__click_params__ = list(getattr(command, "__click_params__", []))
        for option in _options(model, required)[: None if base else -1]:
            decorated = option(decorated)
        return decorated

    return add


def _options(model: str, required: bool) -> tuple[Callable[[Any], Any], ...]:
    option = click.option
    return (
        option(f"--{model}device", "run_device", default="auto", help="Torch device of the model."),
        option(
            f"--{model}dtype",
            "run_dtype",
            type=click.Choice(("auto", "f32", "f16", "bf16")),
            default="auto",
            help="Of the model.  [auto: f32 on a processor, else as stored]",
        ),
        option(
            f"--{model}quantization",
            "run_quantization",
            type=click.Choice(("4bit", "8bit")),
            help="Of the base model's weights, by bitsandbytes.  [default: none]",
        ),
        option("--max-length", "run_max_length", default=1024, help="Of an example, in tokens; 0: any."),
        option("--batch-size", "run_batch_size", type=click.IntRange(min=1), default=16, help="Rows run at a time."),
        option(
            "--prompt",
            "run_prompt",
            default="{text}\\nAnswer:",
            callback=_parse_prompt,
            help="Before the answers of a choice or a class; {text} is the question.",
        ),
        option(
            "--labels",
            "run_labels",
            default="",
            callback=_parse_labels,
            help="Names of the classes in the order of the head, as a,b,c or a file.  [default: as saved with it]",
        ),
        option(
            "--columns",
            "run_columns",
            multiple=True,
            metavar="OURS=THEIRS",
            callback=_parse_columns,
            help="Names that the data have for ours, as text=sentence; image= ignores images.  Repeatable.",
        ),
        option("--limit", "run_limit", type=click.IntRange(min=0), default=0, help="At most so many examples; 0: all."),
        option(
            "--data",
            "run_data",
            multiple=True,
            required=required,
            metavar="SOURCE",
            help="A file, a folder, builtin:NAME or a data set's name.  Repeatable.",
        ),
        option("--base", "run_base", default="", help="The base model.  [default: the one that the adapter names]"),
    )


def read(options: DataOptions) -> tuple[Example, ...]:
    """The examples that were asked for."""
    from lora_squeeze.data import read_examples

    return read_examples(options.data, columns=options.columns, limit=options.limit)


def opened(options: DataOptions, adapters: tuple[str, ...], examples: tuple[Example, ...]) -> Subject:
    """The base model with these adapters."""
    from lora_squeeze.evaluation.subject import open_subject
    from lora_squeeze.extras import require

    # The screen belongs to what this command has to say.
    speech = require("transformers", "train").utils.logging
    speech.set_verbosity_error()
    speech.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    with download_progress() as on_download:
        return open_subject(
            adapters,
            base=options.base,
            examples=examples,
            labels=options.labels,
            dtype=options.dtype,
            quantization=options.quantization or "",
            device=options.device,
            on_download=on_download,
        )


def trial_for(subject: Subject, options: DataOptions, examples: tuple[Example, ...]) -> Trial:
    """The examples, encoded for the model."""
    from lora_squeeze.evaluation.measure import trial_of

    return trial_of(
        subject, examples, batch_size=options.batch_size, max_length=options.max_length, prompt=options.prompt
    )
