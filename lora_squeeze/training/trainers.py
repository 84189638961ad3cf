"""Settings and inputs → a Trainer of transformers or TRL, one function a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_squeeze.collating import collate
from lora_squeeze.encoding import Encoded
from lora_squeeze.extras import require
from lora_squeeze.models import pad_like
from lora_squeeze.seeing import Seeing, tokenizer_of
from lora_squeeze.training.folder import RunFolder
from lora_squeeze.training.inputs import (
    Inputs,
    as_answered,
    classes,
    encoded,
    groups,
    places,
    preferences,
    sequences,
)
from lora_squeeze.training.rewards import reward_of
from lora_squeeze.training.settings import RunSettings

__all__ = ["Prepared", "trainer_of"]

_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "lion": "lion_32bit",
}
_FROM_BITSANDBYTES = ("adamw_8bit", "lion")


@dataclass(frozen=True)
class Prepared:
    """All that a Trainer is made of."""

    settings: RunSettings
    folder: RunFolder
    inputs: Inputs
    reader: Any  # tokenizer, or Seeing
    model: Any
    callbacks: Sequence[Any]

    @property
    def tokenizer(self) -> Any:
        """Of texts."""
        return tokenizer_of(self.reader)


def trainer_of(prepared: Prepared) -> tuple[Any, tuple[str, ...]]:
    """The Trainer of the settings' method, and what to note about the data."""
    if prepared.settings.optimizer.name in _FROM_BITSANDBYTES:
        require("bitsandbytes", "bitsandbytes")
    return _METHODS[prepared.settings.method](prepared)


def _sft(prepared: Prepared) -> tuple[Any, tuple[str, ...]]:
    """TRL's SFTTrainer on sequences that are encoded already; images are opened batch by batch."""
    trl = require("trl", "train")
    training, left_out = encoded(prepared.inputs.training, prepared.reader, prepared.settings)
    held_out, _ = encoded(prepared.inputs.held_out, prepared.reader, prepared.settings)
    sees = isinstance(prepared.reader, Seeing)
    config = trl.SFTConfig(
        **_arguments(prepared),
        max_length=None,  # cut already
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=not sees,
    )
    if sees:
        given = _given(prepared, places(len(training)), places(len(held_out), len(training)))
        given["data_collator"] = _Shown((*training, *held_out), prepared.reader)
    else:
        given = _given(prepared, sequences(training), sequences(held_out))
    notes = (
        [f"{left_out} examples were left out: max_length cuts them off before anything to learn"] if left_out else []
    )
    return trl.SFTTrainer(args=config, **given), tuple(notes)


@dataclass(frozen=True)
class _Shown:
    """Places of examples → a batch with their images."""

    encoded: tuple[Encoded, ...]
    reader: Seeing

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        return collate([self.encoded[row["place"]] for row in rows], self.reader)


def _classify(prepared: Prepared) -> tuple[Any, tuple[str, ...]]:
    transformers = require("transformers", "train")
    inputs, tokenizer = prepared.inputs, prepared.tokenizer
    pad_like(prepared.model, tokenizer)
    training, held_out = (
        classes(examples, tokenizer, inputs.labels, prepared.settings)
        for examples in (inputs.training, inputs.held_out)
    )
    trainer = transformers.Trainer(
        args=transformers.TrainingArguments(**_arguments(prepared)),
        compute_metrics=_accuracy,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        **_given(prepared, training, held_out),
    )
    return trainer, ()


def _dpo(prepared: Prepared) -> tuple[Any, tuple[str, ...]]:
    trl = require("trl", "train")
    training = prepared.settings.training
    config = trl.DPOConfig(
        **_arguments(prepared), beta=0.1 if training.beta < 0 else training.beta, max_length=training.max_length
    )
    given = _given(prepared, preferences(prepared.inputs.training), preferences(prepared.inputs.held_out))
    return trl.DPOTrainer(args=config, **given), ()


def _grpo(prepared: Prepared) -> tuple[Any, tuple[str, ...]]:
    trl = require("trl", "train")
    from lora_squeeze.training.advantages import LOSSES, advantage_of, transform_of
    from lora_squeeze.training.grpo import GroupTrainer, as_reward_function

    settings, training = prepared.settings, prepared.settings.training
    reward = reward_of(settings.reward.type or "exact", pattern=settings.reward.pattern)
    mode = settings.algorithm.advantage_mode or "grpo"
    examples = as_answered(prepared.inputs.training) + as_answered(prepared.inputs.held_out)
    prompts = groups(examples)
    here = len(prepared.inputs.training)
    arguments = _arguments(prepared)
    # A batch counts prompts here and completions there.
    arguments["per_device_train_batch_size"] *= training.group_size
    arguments["per_device_eval_batch_size"] *= training.group_size
    config = trl.GRPOConfig(
        **arguments,
        beta=max(training.beta, 0.0),
        num_generations=training.group_size,
        max_completion_length=training.max_tokens,
        temperature=training.temperature,
        top_p=training.top_p,
        loss_type=LOSSES.get(mode, "dapo"),
        scale_rewards="none",
    )
    trainer = GroupTrainer(
        advantage=advantage_of(mode),
        transform=transform_of(settings.algorithm.transform_mode or "none"),
        reward_funcs=as_reward_function(reward, examples),
        args=config,
        **_given(
            prepared,
            prompts.select(range(here)),
            prompts.select(range(here, len(prompts))) if prepared.inputs.held_out else None,
        ),
    )
    return trainer, ()


_METHODS: dict[str, Callable[[Prepared], tuple[Any, tuple[str, ...]]]] = {
    "sft": _sft,
    "classify": _classify,
    "dpo": _dpo,
    "grpo": _grpo,
}


def _given(prepared: Prepared, training: Any, held_out: Any) -> dict[str, Any]:
    return {
        "model": prepared.model,
        "train_dataset": training,
        "eval_dataset": held_out,
        "processing_class": prepared.tokenizer,
        "callbacks": list(prepared.callbacks),
    }


def _arguments(prepared: Prepared) -> dict[str, Any]:
    """What all methods have in common, in the words of transformers.TrainingArguments."""
    settings = prepared.settings
    training, optimizer, logs = settings.training, settings.optimizer, settings.logging
    evaluates = bool(training.eval_every and prepared.inputs.held_out)
    on_processor = prepared.model.device.type == "cpu"
    batch = training.batch_size // training.gradient_accumulation
    warm = "constant_with_warmup" if training.warmup_steps else "constant"
    return {
        "output_dir": str(prepared.folder.checkpoints),
        "seed": training.seed,
        "max_steps": settings.steps or -1,
        "num_train_epochs": training.epochs or 1,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "learning_rate": training.lr,
        "lr_scheduler_type": warm if training.lr_schedule == "constant" else training.lr_schedule,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "optim": _OPTIMIZERS[optimizer.name],
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_epsilon": optimizer.eps,
        "max_grad_norm": optimizer.max_grad_norm,
        "gradient_checkpointing": training.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if training.gradient_checkpointing else None,
        "bf16": str(prepared.model.dtype) == "torch.bfloat16" and not on_processor,
        "fp16": str(prepared.model.dtype) == "torch.float16" and not on_processor,
        "use_cpu": on_processor,
        "dataloader_pin_memory": not on_processor,
        "dataloader_num_workers": training.data_workers,
        "save_strategy": "steps" if training.save_every else "no",
        "save_steps": training.save_every or 500,
        "save_total_limit": training.keep_checkpoints,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": training.eval_every or None,
        "logging_steps": logs.log_every,
        "logging_first_step": True,
        "report_to": [*logs.report_to, *(["wandb"] if logs.wandb_project else [])] or "none",
        "run_name": logs.wandb_run_name or prepared.folder.path.name,
        "disable_tqdm": True,
    }


def _accuracy(prediction: Any) -> dict[str, float]:
    found = prediction.predictions
    logits = found[0] if isinstance(found, tuple) else found  # models with an encoder also give what that said
    return {"accuracy": float((logits.argmax(axis=-1) == prediction.label_ids).mean())}
