"""SqueezeCallback in TRL's trainers: the callback is all that is added."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_squeeze import open_adapter
from lora_squeeze.annealing.callback import SqueezeCallback
from lora_squeeze.annealing.live import live_adapter

trl = pytest.importorskip("trl")

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
ARGUMENTS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "save_steps": 1,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
RANKS = [8, 8, 4, 2]  # after so many steps
PEFT = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "down_proj"])


def squeeze():
    return SqueezeCallback("8@0, 4@2, 2@3")


def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )
    )


def check(trainer, folder):
    trainer.train()
    assert [open_adapter(folder / f"checkpoint-{step}").rank for step in (1, 2, 3)] == RANKS[1:]
    assert [entry["squeeze/rank"] for entry in trainer.state.log_history if "squeeze/rank" in entry] == [4, 2]


def test_sft(tmp_path):
    data = Dataset.from_dict({"text": ["a b c d e", "f g h i", "j k l m n o", "p q r s"] * 3})
    arguments = trl.SFTConfig(output_dir=str(tmp_path), dataset_text_field="text", **ARGUMENTS)
    trainer = trl.SFTTrainer(
        model(),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=PEFT,
        callbacks=[squeeze()],
    )
    check(trainer, tmp_path)
    again = trl.SFTTrainer(
        model(),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=PEFT,
        callbacks=[squeeze()],
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ends = [[one for one in each.model.parameters() if one.requires_grad] for each in (trainer, again)]
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


def test_dpo(tmp_path):
    rows = {"prompt": ["a b c", "d e"] * 4, "chosen": ["f g", "h i j"] * 4, "rejected": ["k l", "m"] * 4}
    trainer = trl.DPOTrainer(
        model(),
        args=trl.DPOConfig(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
        peft_config=PEFT,
        callbacks=[squeeze()],
    )
    check(trainer, tmp_path)


def test_grpo(tmp_path):
    trainer = trl.GRPOTrainer(
        model(),
        reward_funcs=lambda completions, **kwargs: [float(len(one)) for one in completions],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            num_generations=2,
            max_completion_length=4,
            **{**ARGUMENTS, "per_device_train_batch_size": 4},
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a b c", "d e", "f g h", "i j"] * 2}),
        processing_class=tokenizer(),
        peft_config=PEFT,
        callbacks=[squeeze()],
    )
    check(trainer, tmp_path)
    assert live_adapter(trainer.model).rank == 2
