"""A small training with transformers' Trainer, for tests: trainer_script.py FOLDER [--kill-after STEP]."""

import argparse
import os
import signal
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lora_squeeze.annealing.callback import SqueezeCallback

STEPS = 8
SCHEDULE = "8@0, 4@3, 2@6"


def model():
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            attention_dropout=0.1,
        )
    )
    return get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_dropout=0.1, target_modules=["q_proj", "up_proj"])
    )


def rows():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 61, (23, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(folder: Path, *callbacks: TrainerCallback, schedule=SCHEDULE, options=None, **settings) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 1.0,
        **settings,
    }
    squeeze = SqueezeCallback(schedule, **(options or {}))
    data = {"train_dataset": rows(), "eval_dataset": rows()}
    return Trainer(model(), TrainingArguments(**arguments), **data, callbacks=[squeeze, *callbacks])


class Kill(TrainerCallback):
    """Ends the process for good, as the machine's going away would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-after", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    trainer(given.folder, *([Kill(given.kill_after)] if given.kill_after else [])).train()
