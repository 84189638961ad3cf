"""Adapters of quantised bases and in Arrow: squeezed, loaded back by PEFT, compared with the exact truncation."""

import json

import pytest
import torch
from adapters import CONFIG, LLAMA, WEIGHTS, effect, make_adapter, read_config, relative, truncate_in_place
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_squeeze import compress_adapter, open_adapter

TOKENS = LLAMA.inputs[0]
QUANTISED = {
    "8 bits": {"load_in_8bit": True},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model whose weights bitsandbytes can cut into its blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(vocab_size=61, max_position_embeddings=32, **sizes)).save_pretrained(path)
    return path


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS).logits.double()


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("bits", QUANTISED.values(), ids=QUANTISED)
@torch.no_grad()
def test_an_adapter_trained_on_a_quantised_base(tmp_path, model_folder, bits, dora):
    pytest.importorskip("bitsandbytes")

    def base():
        quantisation = BitsAndBytesConfig(**bits)
        return LlamaForCausalLM.from_pretrained(model_folder, quantization_config=quantisation, dtype=torch.float32)

    model = get_peft_model(
        base(), LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"], use_dora=dora)
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_pretrained(str(tmp_path / "adapter"))
    assert "bnb" in str(type(model.base_model.model.model.layers[0].self_attn.q_proj))

    compress_adapter(tmp_path / "adapter", tmp_path / "out", 2)

    plain, expected = logits(base()), logits(truncate_in_place(model, 2))
    found = logits(PeftModel.from_pretrained(base(), str(tmp_path / "out")))
    assert relative(found - plain, expected - plain) < 1e-4
    assert relative(logits(PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))), expected) > 1e-3


KEPT = {
    "GPTQ": {"base_model_name_or_path": "some/model-GPTQ-Int4", "task_type": "CAUSAL_LM"},
    "AWQ": {"base_model_name_or_path": "some/model-AWQ", "runtime_config": {"ephemeral_gpu_offload": False}},
    "LoftQ's fields, unused": {"loftq_config": {"loftq_bits": 4}, "init_lora_weights": True},
    "aLoRA": {"alora_invocation_tokens": [3, 4]},
    "EVA": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
}


@pytest.mark.parametrize("fields", KEPT.values(), ids=KEPT)
def test_what_the_configuration_says_of_the_base_is_kept(tmp_path, fields):
    source = make_adapter(tmp_path / "adapter")
    config = {**read_config(source), **fields}
    (source / CONFIG).write_text(json.dumps(config))
    compress_adapter(source, tmp_path / "out", 2)
    after = read_config(tmp_path / "out")
    assert {field: after[field] for field in fields} == fields
    assert LoraConfig.from_pretrained(str(tmp_path / "out")).r == 2


# --- Arrow: a router over several adapters ------------------------------------------------------------------------


@pytest.fixture
def experts(tmp_path):
    return [make_adapter(tmp_path / f"expert{seed}", LLAMA, seed=seed) for seed in range(3)]


def routed(folders):
    from peft import ArrowConfig, create_arrow_model

    arrow = ArrowConfig(top_k=2, router_temperature=1.0, rng_seed=0)
    return create_arrow_model(LLAMA.build(), [str(folder) for folder in folders], arrow)


@torch.no_grad()
def test_arrow_routes_squeezed_adapters_as_it_routes_the_exact_truncations(tmp_path, experts):
    """Arrow needs one rank in all of its experts; the router is made of their first singular vectors."""
    squeezed = [tmp_path / f"squeezed{number}" for number in range(len(experts))]
    exact = [tmp_path / f"exact{number}" for number in range(len(experts))]
    for source, out, reference in zip(experts, squeezed, exact, strict=True):
        compress_adapter(source, out, 3)
        model = truncate_in_place(PeftModel.from_pretrained(LLAMA.build(), str(source)), 3)
        model.save_pretrained(str(reference))

    plain, expected = logits(LLAMA.build()), logits(routed(exact))
    assert relative(logits(routed(squeezed)) - plain, expected - plain) < 1e-4
    assert relative(logits(routed(experts)) - plain, expected - plain) > 1e-2


def test_an_adapter_with_arrows_configuration_is_squeezed_and_keeps_it(tmp_path, experts):
    from peft import ArrowConfig

    source = experts[0]
    arrow = {"top_k": 2, "router_temperature": 0.5, "use_gks": False, "rng_seed": 1}
    config = {**read_config(source), "arrow_config": arrow}
    (source / CONFIG).write_text(json.dumps(config))
    compress_adapter(source, tmp_path / "out", 2)
    assert read_config(tmp_path / "out")["arrow_config"] == arrow
    assert ArrowConfig(**arrow).top_k == 2
    assert open_adapter(tmp_path / "out").rank == 2
    assert {tensor.shape[0] for key, tensor in load_file(tmp_path / "out" / WEIGHTS).items() if "lora_A" in key} == {2}
    edited = {field: value for field, value in read_config(tmp_path / "out").items() if field != "arrow_config"}
    (tmp_path / "out" / CONFIG).write_text(json.dumps(edited))
    (source / CONFIG).write_text(json.dumps({**config, "arrow_config": None}))
    assert relative(effect(LLAMA, tmp_path / "out"), effect(LLAMA, source, truncated_to=2)) < 1e-5
