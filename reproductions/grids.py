"""Writes the campaigns of this folder: `python reproductions/grids.py`. Their facts are here, once.

Where the papers do not say what a setting was, the READMEs beside the campaigns do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tasks
import vision_tasks

HERE = Path(__file__).parent

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
SEEDS = (42, 101, 202)
STEPS = 10_000
LONGER = 700  # the steps by which In-Squeeze and the longest Cont-Squeeze exceed STEPS

# LoRA on the text part alone; in the 1B model there is nothing else.
TEXT_PART = "target_modules = ['language_model\\.layers\\..*_proj']\n"


@dataclass(frozen=True)
class Suite:
    """Tasks, the folder in which their rows lie, and what has to be run before.

    title
        what is added to a model's name.
    training
        further keys of `[training]`.
    """

    tasks: tuple[str, ...]
    folder: str
    first: str
    title: str = ""
    training: str = ""


TEXT = Suite(tuple(tasks.TASKS), "build/tasks", "python reproductions/tasks.py build/tasks")
VISION = Suite(
    tuple(vision_tasks.TASKS),
    "build/vision",
    "python reproductions/vision_tasks.py build/vision --from slices",
    title=", vision-language",
    training="data_workers = 4\n",  # the GPU shall not wait while images are opened
)


@dataclass(frozen=True)
class Model:
    """A Gemma 3, what it is trained on, and the highest rank whose best rate was the higher one, 0.03, not 0.01."""

    name: str
    high_rate_up_to: int
    lora: str = ""
    suite: Suite = TEXT

    def rate(self, rank: int) -> float:
        """The best learning rate at this rank."""
        return 0.03 if rank <= self.high_rate_up_to else 0.01


MODELS = {
    "1b": Model("google/gemma-3-1b-it", 2),
    "4b": Model("google/gemma-3-4b-it", 4, TEXT_PART),
    "12b": Model("google/gemma-3-12b-it", 4, TEXT_PART),
    "4b-vision": Model("google/gemma-3-4b-it", 0, TEXT_PART, VISION),  # 0.01 at every rank
}


def condition(model: Model, task: str, rank: int, rate: float, more: str = "") -> str:
    """One line of a campaign. alpha = rank: the update is the product of the factors, as in the paper."""
    source, test = (f"{model.suite.folder}/{task}/{part}.jsonl" for part in ("train", "test"))
    data = f'data = {{ source = "{source}", eval_source = "{test}" }}'
    return f"{{ lora_rank = {rank}, alpha = {rank}, lr = {rate:g}{more}, {data} }}"


def rates(model: Model) -> Iterator[str]:
    """Every learning rate at every rank."""
    for task in model.suite.tasks:
        for rank in RANKS:
            for rate in RATES:
                yield condition(model, task, rank, rate)


def direct(model: Model, ranks: Sequence[int] = RANKS) -> Iterator[str]:
    """Every rank at its best learning rate."""
    for task in model.suite.tasks:
        for rank in ranks:
            yield condition(model, task, rank, model.rate(rank))


def down_to_one(model: Model) -> Iterator[str]:
    """Rank 1 trained for as long as the others, squeezed to before the last steps, and reached in stages."""
    low, high = model.rate(1), model.rate(128)
    for task in model.suite.tasks:
        for further in (200, LONGER):
            yield condition(model, task, 1, low, f", max_steps = {STEPS + further}")
        for further in (200, LONGER):
            again = f'schedule = "cont={further}", target_rank = 1, optimizer_state = "reset"'
            again += f', lr_after_switch = "rewarm", rewarm_steps = 100, lr_by_rank = {{ 1 = {low:g} }}'
            yield condition(model, task, 128, high, f", max_steps = {STEPS + further}, {again}")
        for schedule in ("standard", "minimum=200"):
            stages = f'schedule = "{schedule}", target_rank = 1'
            yield condition(model, task, 128, high, f", max_steps = {STEPS + LONGER}, {stages}")


def campaign(model: Model, conditions: Iterator[str], *, title: str, seeds: Sequence[int], score: str) -> str:
    """A whole file. `score` are the arguments of accuracy.py, which is run at the end."""
    lines = "".join(f"    {one},\n" for one in conditions)
    lora = f"\n[lora]\n{model.lora}" if model.lora else ""
    arguments = ", ".join(f'"{one}"' for one in score.split())
    return f"""\
# {title}
# Written by reproductions/grids.py. First: {model.suite.first}

[campaign]
seeds = {list(seeds)}
summary_script = "reproductions/accuracy.py"
summary_args = [{arguments}]
conditions = [
{lines}]

[model]
model = "{model.name}"
{lora}
[training]
method = "sft"
max_steps = {STEPS}
batch_size = 8
max_length = 1024
warmup_steps = 1000
lr_schedule = "constant"
save_every = 1000
{model.suite.training}
[optimizer]
name = "adafactor"

[data]
max_eval_examples = 500

[logging]
log_every = 50
"""


def files() -> Iterator[tuple[Path, str]]:
    """Every campaign: where it lies, and what it says."""
    all_ranks = "--to " + " ".join(map(str, RANKS[:-1]))
    paper = HERE / "lora-squeeze"
    for name in ("1b", "4b", "4b-vision"):
        model = MODELS[name]
        title = f"LoRA-Squeeze, Gemma 3 {name.partition('-')[0].upper()}{model.suite.title}"
        if model.suite is TEXT:
            yield (
                paper / f"{name}-rates.toml",
                campaign(
                    model,
                    rates(model),
                    title=f"{title}: every learning rate at every rank.",
                    seeds=SEEDS[:1],
                    score=all_ranks,
                ),
            )
        yield (
            paper / f"{name}-direct.toml",
            campaign(
                model,
                direct(model),
                title=f"{title}: every rank at its best rate, and Post-Squeeze between all pairs.",
                seeds=SEEDS,
                score=all_ranks,
            ),
        )
        yield (
            paper / f"{name}-down-to-one.toml",
            campaign(
                model,
                down_to_one(model),
                title=f"{title}: rank 1 directly, by Cont-Squeeze and by In-Squeeze.",
                seeds=SEEDS,
                score="",
            ),
        )
    model = MODELS["12b"]
    yield (
        paper / "12b-direct.toml",
        campaign(
            model,
            direct(model, (1, 2, 4, 8, 16)),
            title="LoRA-Squeeze, Gemma 3 12B: ranks up to 16, and Post-Squeeze between all pairs.",
            seeds=SEEDS[:1],
            score="--to 1 2 4 8",
        ),
    )
    budgets = "para-rank=0.5 para-rank=0.25 para-rank=0.1 para-energy=0.99 para-energy=0.95 para-energy=0.9"
    others = "fixed=32 fixed=16 fixed=6 params=0.5 params=0.25 params=0.1"
    for size in ("1b", "4b"):
        model = MODELS[size]
        yield (
            HERE / "para" / f"{size}.toml",
            campaign(
                model,
                direct(model, (64,)),
                title=f"PARA, Gemma 3 {size.upper()}: rank 64, cut to its budgets and evenly to the same sizes.",
                seeds=SEEDS,
                score=f"--to {budgets} {others}",
            ),
        )


if __name__ == "__main__":
    for path, text in files():
        path.write_text(text, encoding="utf-8")
        print(path)
