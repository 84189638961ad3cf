"""The settings of a training run as TOML: one dataclass a section, its fields the keys with their defaults.

Names follow the `squeeze` document's own implementation where it has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_squeeze.annealing.schedule import Schedule, parse_schedule
from lora_squeeze.annealing.targets import parse_targets
from lora_squeeze.errors import LoraSqueezeError, SettingsError
from lora_squeeze.sections import ONE_WILL_DO, build, choice, document_of, read_toml
from lora_squeeze.settings import ModelSettings, SqueezeSettings, check_squeeze

__all__ = [
    "METHODS",
    "AlgorithmSettings",
    "DataSettings",
    "InSqueezeSettings",
    "LoggingSettings",
    "LoraSettings",
    "OptimizerSettings",
    "ResumeSettings",
    "RewardSettings",
    "RunSettings",
    "TrainingSettings",
    "check",
    "read_run_settings",
]

METHODS = ("sft", "classify", "dpo", "grpo")
# Keys of [training] that not every method heeds.
_OF_METHODS = {
    "group_size": ("grpo",),
    "max_tokens": ("grpo",),
    "temperature": ("grpo",),
    "top_p": ("grpo",),
    "beta": ("dpo", "grpo"),
    "completion_only": ("sft",),
}
DEFAULT_RANK = 64
DEFAULT_STEPS = 500


@dataclass(frozen=True)
class LoraSettings:
    """The `[lora]` section."""

    alpha: float = 0.0  # 0: twice the rank
    dropout: float = 0.0  # fraction of the inputs of lora_A that are dropped
    target_modules: list[str] = field(default_factory=list[str])  # ends of names; []: all linear layers but the head
    modules_to_save: list[str] = field(default_factory=list[str])  # modules to train as a whole
    rslora: bool = False  # scale alpha / √rank instead of alpha / rank
    dora: bool = False  # also train a magnitude for each output


@dataclass(frozen=True)
class TrainingSettings:
    """The `[training]` section."""

    method: str = choice(("", *METHODS), "")  # "": grpo if there is a reward or an advantage_mode, else sft
    seed: int = 42
    max_steps: int | None = None  # optimizer steps; not given: 500, or as many as `epochs` say
    epochs: float = 0.0  # passes over the data, instead of max_steps
    batch_size: int = 8  # examples, in grpo prompts, of an optimizer step on each device
    gradient_accumulation: int = 1  # parts in which a batch is computed
    lr: float = 2e-4  # peak learning rate
    lr_schedule: str = choice(("constant", "linear", "cosine"), "constant")  # after the warm-up
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_length: int = 1024  # tokens of an example, an image being one; longer ones lose their end
    completion_only: bool = True  # leave prompts out of the loss
    gradient_checkpointing: bool = False  # less memory, more time
    data_workers: int = 0  # processes that open images and make batches ahead; 0: none but the training itself
    save_every: int = 50  # steps between checkpoints; 0: none
    keep_checkpoints: int = 1  # the newest so many
    eval_every: int = 0  # steps between evaluations on held-out data; 0: only at the end
    beta: float = -1.0  # weight of the distance from the base model; -1: 0.1 in dpo, 0 in grpo
    group_size: int = 8  # grpo: completions of each prompt
    max_tokens: int = 256  # grpo: tokens of a completion
    temperature: float = 1.0  # grpo: of sampling
    top_p: float = 1.0  # grpo: of sampling


@dataclass(frozen=True)
class AlgorithmSettings:
    """The `[algorithm]` section: how grpo makes advantages of rewards."""

    advantage_mode: str = ""  # grpo, dr_grpo, maxrl or package.module.function; "": grpo
    transform_mode: str = ""  # none or package.module.function; "": none


@dataclass(frozen=True)
class OptimizerSettings:
    """The `[optimizer]` section."""

    name: str = choice(("adamw", "adamw_8bit", "adafactor", "sgd", "lion"), "adamw")
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0: they are not


@dataclass(frozen=True)
class DataSettings:
    """The `[data]` section."""

    source: list[str] = field(
        default_factory=list[str], metadata=ONE_WILL_DO
    )  # files, folders, data sets or builtin:NAME
    columns: dict[str, str] = field(default_factory=dict[str, str])  # our key = theirs; image = "" ignores images
    max_examples: int = 0  # 0: all
    eval_source: list[str] = field(default_factory=list[str], metadata=ONE_WILL_DO)  # held-out data
    eval_fraction: float = 0.0  # of `source` that is held out, without eval_source
    max_eval_examples: int = 0  # 0: all


@dataclass(frozen=True)
class RewardSettings:
    """The `[reward]` section."""

    type: str = ""  # exact, numeric, regex or package.module.function; "": exact
    pattern: str = ""  # of regex; {answer} stands for the example's answer


@dataclass(frozen=True)
class InSqueezeSettings:
    """The `[in_squeeze]` section: lower ranks while training."""

    schedule: str = ""  # standard, minimum=STEPS, equal, inverse, post, cont=STEPS, "64@0, 8@75%"; "": one rank
    target_rank: int = 0  # the last rank
    ranks: list[int] = field(default_factory=list[int])  # all ranks, instead of target_rank
    spacing: str = choice(("geometric", "linear"), "geometric")  # of the ranks down to target_rank
    rank_policy: str = "uniform"  # one rank for all layers; or "params", or NAME=VALUE, under the same budget
    optimizer_state: str = choice(("transport", "reset"), "transport")  # at a switch
    balance: str = choice(("keep", "balanced"), "keep")  # of the sizes of A and B at a switch
    lr_after_switch: str = choice(("continue", "rewarm", "restart"), "continue")
    rewarm_steps: int = -1  # of rewarm; -1: a tenth of the stage
    lr_by_rank: dict[str, float] = field(default_factory=dict[str, float])  # rank = learning rate from there on


@dataclass(frozen=True)
class LoggingSettings:
    """The `[logging]` section."""

    log_dir: str = ""  # "": logs/NAME of a run, logs/campaign_TIME of a campaign
    log_every: int = 10  # steps
    report_to: list[str] = field(default_factory=list[str], metadata=ONE_WILL_DO)  # tensorboard, trackio
    wandb_project: str = ""  # "": nothing is sent to W&B
    wandb_entity: str = ""
    wandb_group: str = ""
    wandb_tags: list[str] = field(default_factory=list[str], metadata=ONE_WILL_DO)
    wandb_run_name: str = ""  # "": the name of the run


@dataclass(frozen=True)
class ResumeSettings:
    """The `[resume]` section."""

    from_: str = ""  # folder of a run whose last checkpoint is to be continued in this one


@dataclass(frozen=True)
class RunSettings:
    """A file that trains one adapter, and with `[squeeze]` squeezes it afterwards."""

    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    algorithm: AlgorithmSettings = field(default_factory=AlgorithmSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    in_squeeze: InSqueezeSettings = field(default_factory=InSqueezeSettings)
    squeeze: SqueezeSettings | None = None
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    resume: ResumeSettings = field(default_factory=ResumeSettings)

    @property
    def method(self) -> str:
        """One of METHODS."""
        about_rewards = self.algorithm.advantage_mode or self.algorithm.transform_mode or self.reward.type
        return self.training.method or ("grpo" if about_rewards else "sft")

    @property
    def rank(self) -> int:
        """The rank that training starts at; 0: that of the adapter that it starts from."""
        return self.model.squeeze_to or self.model.lora_rank or (0 if self.model.adapter else DEFAULT_RANK)

    @property
    def steps(self) -> int:
        """How many optimizer steps to take; 0: as many as `epochs` need, which is known once the data are."""
        given = self.training.max_steps
        return (0 if self.training.epochs else DEFAULT_STEPS) if given is None else given

    def schedule(self, steps: int, rank: int) -> Schedule | None:
        """Which rank is in force when, in so many steps from this rank. Raises RankError or SettingsError."""
        chosen = self.in_squeeze
        if not chosen.schedule:
            return None
        return parse_schedule(
            chosen.schedule,
            steps=steps,
            ranks=chosen.ranks or None,
            source=rank,
            target=chosen.target_rank or None,
            spacing=chosen.spacing,
        )


def read_run_settings(path: Path) -> RunSettings:
    """Read the TOML file of a run. Raises SettingsError for anything unknown, mistyped, missing or contradictory."""
    settings = build(RunSettings, read_toml(path), path)
    check(settings, path)
    return settings


def check(settings: RunSettings, file: Path | str) -> None:
    """Refuse settings that cannot work. Raises SettingsError, with the file, the section and the key."""
    for problem in _problems(settings):
        raise SettingsError(f"{file}: {problem}")
    if settings.squeeze is not None:
        check_squeeze(settings.squeeze, file)


def _problems(settings: RunSettings) -> list[str]:
    training, data, model = settings.training, settings.data, settings.model
    problems: list[str] = []
    if not model.model and not model.adapter:
        problems.append("[model] model is missing: a folder, a name on the Hub or a .gguf file")
    if model.squeeze_to and not model.adapter:
        problems.append("[model] squeeze_to needs an adapter, which is squeezed to this rank first")
    if model.adapter and model.lora_rank:
        problems.append("[model] lora_rank is that of a fresh LoRA; with an adapter, give squeeze_to or nothing")
    if not data.source:
        problems.append("[data] source is missing: a file, a folder, a data set or builtin:NAME")
    problems += [
        f"[{section}] {key} must be at least {least}, not {value}"
        for section, key, value, least in _at_least(settings)
        if value is not None and value < least
    ]
    if training.max_steps and training.epochs:
        problems.append(
            f"[training] max_steps = {training.max_steps} and epochs = {training.epochs:g} are both given, here or in "
            "[campaign]: leave one of them out"
        )
    if not settings.steps and not training.epochs:
        problems.append("[training] max_steps and epochs are both 0: for how long shall it train?")
    if not 0 <= data.eval_fraction < 1:
        problems.append(f"[data] eval_fraction must be a fraction below 1, not {data.eval_fraction}")
    if not 0 < training.top_p <= 1:
        problems.append(f"[training] top_p must be in (0, 1], not {training.top_p}")
    if training.lr <= 0:
        problems.append(f"[training] lr must be more than 0, not {training.lr}")
    if training.batch_size % max(training.gradient_accumulation, 1):
        problems.append(
            f"[training] batch_size {training.batch_size} cannot be computed in {training.gradient_accumulation} "
            "equal parts (gradient_accumulation)"
        )
    if settings.method != "grpo":
        given = {
            "[algorithm] advantage_mode": settings.algorithm.advantage_mode,
            "[algorithm] transform_mode": settings.algorithm.transform_mode not in ("", "none"),
            "[reward] type": settings.reward.type,
        }
        problems += [f"{key} belongs to method grpo, not to {settings.method}" for key, value in given.items() if value]
    if settings.reward.type == "regex" and not settings.reward.pattern:
        problems.append("[reward] pattern is missing: what shall a completion match?")
    if settings.reward.pattern and settings.reward.type != "regex":
        problems.append('[reward] pattern needs type = "regex"')
    return problems + _without_effect(settings) + _schedule_problems(settings)


def _without_effect(settings: RunSettings) -> list[str]:
    """What is said and would not be heeded."""
    method, trained = settings.method, document_of(settings.training)
    problems: list[str] = []
    if settings.model.adapter:
        problems += [
            f"[lora] {key} is that of a fresh LoRA, and [model] adapter brings its own: leave it out"
            for key in document_of(settings.lora)
        ]
    if settings.data.eval_source and settings.data.eval_fraction:
        problems.append("[data] eval_source and eval_fraction both say what is held out: leave one of them out")
    for key, methods in _OF_METHODS.items():
        if key in trained and method not in methods:
            problems.append(f"[training] {key} belongs to method {' or '.join(methods)}, not to {method}: leave it out")
    return problems


def _at_least(settings: RunSettings) -> list[tuple[str, str, Any, int]]:
    """Section, key, value and the least it may be."""
    training, data = settings.training, settings.data
    least = {"max_steps": 0, "epochs": 0, "batch_size": 1, "gradient_accumulation": 1, "warmup_steps": 0}
    least |= {
        "weight_decay": 0,
        "max_length": 1,
        "data_workers": 0,
        "save_every": 0,
        "keep_checkpoints": 1,
        "eval_every": 0,
        "seed": 0,
    }
    if settings.method == "grpo":
        least |= {"group_size": 2, "max_tokens": 1}
    rows: list[tuple[str, str, Any, int]] = [
        ("training", key, getattr(training, key), one) for key, one in least.items()
    ]
    rows += [("data", key, getattr(data, key), 0) for key in ("max_examples", "max_eval_examples")]
    rows += [
        ("logging", "log_every", settings.logging.log_every, 1),
        ("model", "lora_rank", settings.model.lora_rank, 0),
        ("model", "squeeze_to", settings.model.squeeze_to, 0),
    ]
    return rows


def _schedule_problems(settings: RunSettings) -> list[str]:
    chosen = settings.in_squeeze
    if not chosen.schedule:
        return [f'[in_squeeze] {key} needs a schedule, such as "equal"' for key in document_of(chosen)]
    if bad := [rank for rank in chosen.lr_by_rank if not rank.isdecimal()]:
        return [f"[in_squeeze] lr_by_rank: '{bad[0]}' is not a rank"]
    if bad := [rank for rank, rate in chosen.lr_by_rank.items() if not rate > 0]:
        return [f"[in_squeeze] lr_by_rank: {chosen.lr_by_rank[bad[0]]} for rank {bad[0]} is not above 0"]
    if chosen.rewarm_steps >= 0 and chosen.lr_after_switch != "rewarm":
        return ['[in_squeeze] rewarm_steps needs lr_after_switch = "rewarm"']
    try:
        parse_targets(chosen.rank_policy)
    except LoraSqueezeError as error:
        return [f"[in_squeeze] rank_policy: {error}"]
    # With epochs, the number of steps is known once the data are; with an adapter, the rank once it is.
    steps, rank = settings.steps, settings.rank
    if not steps or not rank:
        return []
    try:
        schedule = settings.schedule(steps, rank)
    except LoraSqueezeError as error:
        return [f"[in_squeeze] {error}"]
    ranks = schedule.ranks if schedule else ()
    return [
        f"[in_squeeze] lr_by_rank: rank {one} is not among those of the schedule, {', '.join(map(str, ranks))}"
        for one in chosen.lr_by_rank
        if int(one) not in ranks
    ]
