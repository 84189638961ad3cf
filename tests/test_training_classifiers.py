"""Classifiers, trained and then measured: causal ones without a padding token, with an encoder, in halves."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from quick_runs import models, quick  # noqa: F401
from test_hub import server  # noqa: F401
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BartConfig, BartForSequenceClassification

from lora_squeeze.attaching import attach_adapter, attach_lora
from lora_squeeze.cli import main
from lora_squeeze.models import load_model
from lora_squeeze.training.run import train

CLASSIFY = {"training": {"method": "classify"}, "data": {"eval_fraction": 0.2}}


@pytest.fixture(scope="module")
def bart(models):
    folder = models / "bart"
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", end)])
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end,
        bos_token_id=end,
        decoder_start_token_id=end,
        forced_eos_token_id=None,
        max_position_embeddings=512,
    )
    BartForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_causal_classifier_whose_model_names_no_padding_token_is_measured(quick, models, tmp_path):
    file = models / "llama" / "config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "pad_token_id": None}))
    try:
        record = train(quick("builtin:sentiment:40", **CLASSIFY), tmp_path / "run")
        command = ["evaluate", record.adapter, "--data", "builtin:sentiment:40", "--device", "cpu", "--json"]
        result = CliRunner().invoke(main, [*command, "--batch-size", "4"])
    finally:
        file.write_text(before)
    assert result.exit_code == 0, result.output
    assert "eval_accuracy" in record.metrics


def test_a_classifier_with_an_encoder_is_measured_while_training(quick, bart, tmp_path):
    record = train(quick("builtin:sentiment:40", bart.name, **CLASSIFY), tmp_path / "run")
    assert 0 <= record.metrics["eval_accuracy"] <= 1


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("base", ["llama", "bert"])
def test_a_head_is_trained_in_float32(base, dtype, models, tmp_path):
    def loaded():
        options = {"task": "sequence-classification", "labels": ("a", "b"), "device": "cpu"}
        return load_model(str(models / base), dtype=dtype, **options)

    model = attach_lora(loaded(), rank=2)
    model.save_pretrained(str(tmp_path))
    for one in (model, attach_adapter(loaded(), str(tmp_path), trainable=True)):
        trained = [parameter for parameter in one.parameters() if parameter.requires_grad]
        assert {parameter.dtype for parameter in trained} == {torch.float32}
        made = one(input_ids=torch.arange(8)[None], attention_mask=torch.ones(1, 8, dtype=torch.long))
        assert made.logits.dtype == one.dtype != torch.float32
        optimizer, scaler = torch.optim.SGD(trained, lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(made.logits.float().sum()).backward()
        scaler.unscale_(optimizer)
    kept = attach_adapter(loaded(), str(tmp_path))
    assert torch.float32 not in {parameter.dtype for name, parameter in kept.named_parameters() if "saved" in name}


@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_modules_trained_as_a_whole_fit_a_model_in_halves(part, models, tmp_path):
    model = load_model(str(models / "llama"), dtype="bf16", device="cpu")
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    adapted = attach_lora(model, rank=2, modules_to_save=[part])
    after = adapted(input_ids=ids).logits
    assert after.dtype == torch.bfloat16
    assert torch.allclose(after.float(), before.float(), atol=0.1)
    assert {one.dtype for one in adapted.parameters() if one.requires_grad} == {torch.float32}
    assert adapted.generate(input_ids=ids, max_new_tokens=2).shape[1] <= 8


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_classifier_in_halves_trains(dtype, quick, tmp_path):
    settings = quick("builtin:sentiment:40", "bert", model={"dtype": dtype}, **CLASSIFY)
    assert "eval_accuracy" in train(settings, tmp_path / "run").metrics
    assert Path(tmp_path / "run" / "final").is_dir()
