"""lora-squeeze check."""

from __future__ import annotations

import click

from lora_squeeze.cli.options import runtime_options
from lora_squeeze.cli.source import open_source

__all__ = ["check_command"]


@click.command("check", short_help="Whether a runtime would load it, and why not.")
@click.argument("path")
@runtime_options(required=True)
@click.pass_context
def check_command(context: click.Context, path: str, runtime: str, max_lora_rank: int | None) -> None:
    """Say whether a runtime would load the adapter at PATH, and if not, why. Exit code 0 or 1."""
    from lora_squeeze.serving import RUNTIMES, caveats, check, rank_cap

    adapter = open_source(path)
    problems = check(adapter, runtime, max_lora_rank=max_lora_rank)
    cap = rank_cap(runtime, max_lora_rank)
    under = f" with max_lora_rank {cap}" if cap is not None else ""
    if not problems:
        click.echo(f"{path}: {runtime} loads it{under} (largest rank {adapter.rank})")
        for caveat in caveats(adapter) if runtime == "peft" else ():
            click.echo(f"Note: {caveat}")
        return
    click.echo(f"{path}: {runtime} would not load it as it is meant{under}:")
    for problem in problems:
        click.echo(f"  - {problem.what}\n    {problem.what_to_do}")
    click.echo(f"(rules: {RUNTIMES[runtime].source})")
    context.exit(1)
