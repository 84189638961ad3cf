"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from lora_squeeze.limits import EQUAL, Limits
from lora_squeeze.settings import CHOICES, is_stray_max_lora_rank
from lora_squeeze.spelling import read_numbers

__all__ = [
    "PLACE",
    "PLACE_AS_TEXT",
    "RankOptions",
    "as_json",
    "calibration_option",
    "compute_options",
    "dtype_option",
    "given_of",
    "parse_fractions",
    "parse_ranks",
    "push_options",
    "rank_options",
    "refuse_stray",
    "refuse_stray_by",
    "refuse_stray_max_lora_rank",
    "runtime_options",
    "spelled",
]


class _Place(click.Path):
    """A path to write to, which may not be empty: pathlib takes that for the folder one is in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty: is a variable of the shell not set?", param, ctx)
        return super().convert(value, param, ctx)


PLACE, PLACE_AS_TEXT = _Place(path_type=Path), _Place(path_type=str)

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class RankOptions:
    """How ranks are to be chosen, as the command line says it."""

    policies: tuple[str, ...]
    by: Any
    limits: Limits


def spelled(
    options: RankOptions, *, dtype: str | None, runtime: str, max_lora_rank: int | None, calibration: Path | None
) -> tuple[str, ...]:
    """All of these but the policies, as the command line takes them again."""
    limits = options.limits
    values: dict[str, object] = {
        "--by": options.by if options.by != "mean" else None,
        "--min-rank": limits.min_rank,
        "--max-rank": limits.max_rank,
        "--multiple-of": limits.multiple_of if limits.multiple_of != 1 else None,
        "--steps": ",".join(map(str, limits.steps)) or None,
        "--dtype": dtype.lower() if dtype else None,
        "--for": runtime or None,
        "--max-lora-rank": max_lora_rank,
        "--calibration": calibration,
    }
    once = [part for option, value in values.items() if value is not None for part in (option, str(value))]
    fixed = [part for pattern, rank in limits.rank_for for part in ("--rank-for", f"{pattern}={rank}")]
    return (*once, *fixed, *(part for group in limits.equal for part in ("--equal", group)))


def given_of(context: click.Context, parameters: Iterable[str]) -> list[str]:
    """Which of these parameters the command line gives, as it spells them."""
    given = {name for name in parameters if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    return [one.opts[0] for one in context.command.params if one.name in given]


def refuse_stray(parameters: Iterable[str], what: str) -> None:
    """Raise UsageError if the command line gives any of these: they belong to `what`, and mean nothing now."""
    if stray := given_of(click.get_current_context(), parameters):
        raise click.UsageError(f"{' and '.join(stray)} belong{'s' if len(stray) == 1 else ''} to {what}")


def refuse_stray_by(options: RankOptions, others: tuple[str, ...] = ()) -> None:
    """--by says how `variance` is to be reached, which is the default: it means nothing to other policies.

    others
        policies that do not come from --policy.
    """
    names = (*(policy.partition("=")[0] for policy in options.policies), *others)
    if options.by != "mean" and names and "variance" not in names:
        raise click.UsageError(f"--by {options.by} is for --policy variance=VALUE (or --retain), and none is given")


def refuse_stray_max_lora_rank(max_lora_rank: int | None, runtime: str) -> None:
    """--max-lora-rank is what a server allows, so there has to be one."""
    if is_stray_max_lora_rank(max_lora_rank, runtime):
        raise click.UsageError("--max-lora-rank is what a server allows: say which with --for, or use --max-rank")


def parse_ranks(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    """A comma-separated list of ranks."""
    try:
        return tuple(int(rank) for rank in text.split(",") if text)
    except ValueError:
        raise click.BadParameter(f"'{text}' is not a list of ranks such as 4,8,16") from None


def parse_fractions(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[float, ...]:
    """A comma-separated list of fractions; none if the option is not given."""
    try:
        return () if text is None else read_numbers(text)
    except ValueError:
        raise click.BadParameter(f"'{text}' is not a list of fractions such as 0.5,0.25") from None


def _parse_rank_for(
    _context: click.Context, _option: click.Parameter, entries: tuple[str, ...]
) -> tuple[tuple[str, int], ...]:
    pairs: list[tuple[str, int]] = []
    for entry in entries:
        pattern, _, rank = entry.rpartition("=")
        if not pattern or not (rank.isascii() and rank.isdecimal()):
            raise click.BadParameter(f"'{entry}' is not PATTERN=RANK, such as q_proj=8")
        pairs.append((pattern, int(rank)))
    return tuple(pairs)


def _parse_runtime(_context: click.Context, _option: click.Parameter, runtime: str | None) -> str:
    return runtime or ""


def _parse_dtype(_context: click.Context, _option: click.Parameter, dtype: str | None) -> str | None:
    return dtype.upper() if dtype else None


def compute_options(command: Command) -> Command:
    """--method and --device."""
    for option in (
        click.option("--device", default="cpu", help="Torch device that computes."),
        click.option("--method", type=click.Choice(CHOICES["method"]), default="gram", help="Route of the SVD."),
    ):
        command = option(command)
    return command


def calibration_option(command: Command) -> Command:
    """--calibration."""
    return click.option(
        "--calibration",
        type=click.Path(path_type=Path),
        metavar="MOMENTS",
        help="Measure variance on data: a file from lora-squeeze calibrate.",
    )(command)


def as_json(command: Command) -> Command:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")(command)


def dtype_option(command: Command) -> Command:
    """--dtype, handed on in safetensors' spelling."""
    return click.option(
        "--dtype",
        type=click.Choice([one for one in CHOICES["dtype"] if one], case_sensitive=False),
        callback=_parse_dtype,
        help="Of the new factors.  [default: as it was]",
    )(command)


def push_options(command: Command) -> Command:
    """--push, --private and --commit-message."""
    for option in (
        click.option("--commit-message", default="", metavar="TEXT", help="Of --push.  [default: the policy]"),
        click.option("--private", is_flag=True, help="If --push makes the repository: for you alone."),
        click.option("--push", "repo", default="", metavar="USER/REPO[@BRANCH]", help="Put it on the Hub as well."),
    ):
        command = option(command)
    return command


def runtime_options(*, required: bool = False) -> Callable[[Command], Command]:
    """--for and --max-lora-rank."""

    choice = click.Choice([one for one in CHOICES["runtime"] if one])
    what = "The runtime that has to load it."
    for_one = click.option("--for", "runtime", type=choice, required=True, help=what)
    for_any = click.option(
        "--for", "runtime", type=choice, callback=_parse_runtime, help=f"{what}  [default: all that read its format]"
    )

    def add(command: Command) -> Command:
        for option in (
            click.option(
                "--max-lora-rank", type=click.IntRange(min=1), help="What the server allows.  [default: its default]"
            ),
            for_one if required else for_any,
        ):
            command = option(command)
        return command

    return add


def rank_options(*, repeatable: bool = True) -> Callable[[Command], Command]:
    """--policy and what limits any policy; the command gets them as one RankOptions.

    repeatable
        whether the command takes several policies.
    """

    def add(command: Command) -> Command:
        return _with_rank_options(command, repeatable=repeatable)

    return add


def _with_rank_options(command: Command, *, repeatable: bool) -> Command:

    def with_ranks(**values: Any) -> Any:
        limits = Limits(
            min_rank=values.pop("min_rank"),
            max_rank=values.pop("max_rank"),
            multiple_of=values.pop("multiple_of"),
            steps=values.pop("steps"),
            rank_for=values.pop("rank_for"),
            equal=values.pop("equal"),
        )
        options = RankOptions(policies=values.pop("policies"), by=values.pop("by"), limits=limits)
        return command(rank_options=options, **values)

    with_ranks.__doc__ = command.__doc__
    with_ranks.__name__ = command.__name__
    decorated: Any = with_ranks
    decorated.__click_params__ = list(getattr(command, "__click_params__", []))
    for option in (
        click.option(
            "--equal",
            multiple=True,
            metavar="GROUP",
            help=f"Same rank in a group: {', '.join(EQUAL)}, or a pattern; layers whose names differ only there.",
        ),
        click.option(
            "--rank-for",
            multiple=True,
            metavar="PATTERN=RANK",
            callback=_parse_rank_for,
            help="Fix the rank of some layers, as q_proj=8.  Repeatable; the first match decides.",
        ),
        click.option("--steps", default="", callback=parse_ranks, show_default=False, help="Round up to one of 8,16."),
        click.option("--multiple-of", default=1, help="Round ranks up to a multiple of this."),
        click.option("--max-rank", type=int, help="Of any layer."),
        click.option("--min-rank", type=int, help="Of any layer.  [default: 1, for global policies 0]"),
        click.option("--by", type=click.Choice(CHOICES["by"]), default="mean", help="For variance."),
        click.option(
            "--policy",
            "policies",
            multiple=True,
            metavar="NAME=VALUE",
            help="How to choose ranks, as energy=0.9, params=0.25 or size=10MB." + "  Repeatable." * repeatable,
        ),
    ):
        decorated = option(decorated)
    return decorated
