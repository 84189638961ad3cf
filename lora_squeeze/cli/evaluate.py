"""lora-squeeze evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_squeeze.cli.data_options import DataOptions, data_options, opened, read, trial_for
from lora_squeeze.cli.decomposing import decomposed
from lora_squeeze.cli.options import calibration_option, parse_ranks, refuse_stray
from lora_squeeze.cli.output import print_table, progress, progress_of
from lora_squeeze.cli.source import open_source

if TYPE_CHECKING:
    from lora_squeeze.evaluation.subject import Contestant, Subject
    from lora_squeeze.measurements import Evaluation

__all__ = ["evaluate_command"]

# A task of lm-eval has its own.
_OF_DATA = ("metrics", "ablate_images", "run_columns", "run_labels", "run_prompt", "run_max_length")


@click.command("evaluate", short_help="Loss, accuracy and more of adapters and ranks on data.")
@click.argument("adapters", nargs=-1, required=True)
@click.option("--metric", "metrics", multiple=True, help="loss, perplexity, accuracy, …  Repeatable.  [default: all]")
@click.option("--ranks", default="", callback=parse_ranks, show_default=False, help="Also the first adapter at 4,8,16.")
@click.option(
    "--policy", "policies", multiple=True, metavar="NAME=VALUE", help="Also the first adapter so squeezed.  Repeatable."
)
@click.option("--without-adapter", "with_base", is_flag=True, help="Also the base model alone.")
@click.option(
    "--ablate-images",
    is_flag=True,
    help="Measure again with a plain grey image for each: what is still right was not seen.",
)
@click.option("--task", "tasks", multiple=True, help="A task of lm-eval by name, instead of --data.  Repeatable.")
@click.option("--include", multiple=True, metavar="FOLDER", help="With YAML files of your own lm-eval tasks.")
@click.option("--few-shot", type=click.IntRange(min=0), help="Examples in a task's prompt.  [default: as it says]")
@click.option("--draws", type=click.IntRange(min=100), default=2000, help="Of the bootstrap.")
@click.option("--seed", default=0, help="Of the bootstrap.")
@calibration_option
@data_options(required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
def evaluate_command(
    adapters: tuple[str, ...],
    metrics: tuple[str, ...],
    ranks: tuple[int, ...],
    policies: tuple[str, ...],
    with_base: bool,
    ablate_images: bool,
    tasks: tuple[str, ...],
    include: tuple[str, ...],
    few_shot: int | None,
    draws: int,
    seed: int,
    calibration: Path | None,
    data_options: DataOptions,
    as_json: bool,
) -> None:
    """Measure what ADAPTERS do to their base model on data, and compare them with the first.

    The base model is loaded once; adapters, and lower ranks of the first, are swapped in place.
    Differences come with bootstrap intervals, and those of noise are called noise.
    """
    from lora_squeeze.data import images_of, without_sight
    from lora_squeeze.measurements import evaluations_to_json
    from lora_squeeze.report.quality import evaluation_table

    if bool(tasks) == bool(data_options.data):
        raise click.UsageError("give --data with examples of your own, or --task with a task of lm-eval")
    if tasks:
        from lora_squeeze.evaluation.harness import refuse_classifier

        refuse_stray(_OF_DATA, "--data: a --task brings its own data, prompts and metrics")
        refuse_classifier(open_source(adapters[0]))
    else:
        refuse_stray(("include", "few_shot"), "--task: what --data names is measured as it is")
    if calibration is not None and not (ranks or policies):
        raise click.UsageError("--calibration is for the --ranks or --policy that shall be tried")
    examples = read(data_options) if data_options.data else ()
    if ablate_images and not any(map(images_of, examples)):
        raise click.UsageError("--ablate-images is for data with images, and there are none")
    subject = opened(data_options, adapters, examples)
    found: list[Evaluation]
    contestants = _contestants(subject, (*(f"fixed={rank}" for rank in ranks), *policies), calibration, with_base)
    if tasks:
        found = _on_tasks(subject, contestants, tasks, include, few_shot, data_options, draws=draws, seed=seed)
    else:
        from lora_squeeze.evaluation.measure import evaluate

        source = ", ".join(data_options.data)
        variants = {source: examples}
        if ablate_images:
            variants[f"{source}, every image grey"] = tuple(map(without_sight, examples))
        found = []
        for data, one in variants.items():
            trial = trial_for(subject, data_options, one)
            with progress_of("Evaluating", trial.steps) as advance:
                found.append(
                    evaluate(
                        subject,
                        contestants,
                        trial,
                        data=data,
                        metrics=metrics,
                        draws=draws,
                        seed=seed,
                        on_batch=advance,
                    )
                )
    if as_json:
        click.echo(evaluations_to_json(found))
        return
    for one in found:
        print_table(evaluation_table(one))


def _contestants(
    subject: Subject, policies: tuple[str, ...], calibration: Path | None, with_base: bool
) -> list[Contestant]:
    from lora_squeeze.evaluation.measure import squeezed
    from lora_squeeze.evaluation.subject import loaded, without_adapter
    from lora_squeeze.verbs import choose_ranks

    contestants = [loaded(subject, name) for name in subject.adapters]
    if policies:
        decomposition = decomposed(subject.adapters["default"], method="gram", device="cpu", calibration=calibration)
        plans = [choose_ranks(decomposition, policy) for policy in policies]
        contestants += squeezed(subject, decomposition, plans)
    return [*contestants, *([without_adapter()] if with_base else [])]


def _on_tasks(
    subject: Subject,
    contestants: list[Contestant],
    tasks: tuple[str, ...],
    include: tuple[str, ...],
    few_shot: int | None,
    options: DataOptions,
    *,
    draws: int,
    seed: int,
) -> list[Evaluation]:
    from lora_squeeze.evaluation.harness import evaluate_tasks

    with progress("Evaluating", len(contestants)) as advance:
        return evaluate_tasks(
            subject,
            contestants,
            tasks,
            include=include,
            limit=options.limit,
            few_shot=few_shot,
            batch_size=options.batch_size,
            draws=draws,
            seed=seed,
            on_adapter=advance,
        )
