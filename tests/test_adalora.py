"""AdaLoRA: read as the plain LoRA with the same update, and written as that."""

import pytest
import torch
from adapters import (
    CONFIG,
    LLAMA,
    PREFIX,
    WEIGHTS,
    edit_config,
    edit_tensors,
    output,
    read_config,
    relative,
    truncation,
)
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora.layer import SVDLinear
from safetensors.torch import load_file

from lora_squeeze import compress_adapter, decompose, open_adapter
from lora_squeeze.errors import AdapterError

Q0 = "model.layers.0.self_attn.q_proj"
TARGETS = ["q_proj", "v_proj"]


def make(folder, *, masks=None, base=LLAMA, dtype=torch.float32, **fields):
    """An AdaLoRA adapter saved by PEFT; masks: module → which of its six directions are kept."""
    config = AdaLoraConfig(
        **{"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 12, "target_modules": TARGETS, **fields}
    )
    model = get_peft_model(base.build(), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(dtype)
    if masks:
        model.peft_config["default"].rank_pattern = {
            f"{name}.lora_E.default": masks.get(name.removeprefix(PREFIX), [True] * 6)
            for name in (n.removeprefix(PREFIX) for n, m in model.named_modules() if isinstance(m, SVDLinear))
        }
    model.save_pretrained(str(folder))
    return folder


def load(folder):
    return PeftModel.from_pretrained(LLAMA.build(), str(folder)).double().eval()


def updates(folder):
    """Module → the update that PEFT computes."""
    modules = load(folder).named_modules()
    return {
        name.removeprefix(PREFIX): module.get_delta_weight("default").detach().double()
        for name, module in modules
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")
    }


MASKS = {Q0: [True, False, True, False, False, True], "model.layers.1.self_attn.v_proj": [False] * 5 + [True]}
VARIANTS = {
    "all directions": {},
    "directions pruned": {"masks": MASKS},
    "no alpha": {"lora_alpha": -1},
    "no alpha, directions pruned": {"lora_alpha": 0, "masks": MASKS},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_layers_are_the_updates_that_peft_applies(tmp_path, variant):
    adapter, expected = open_adapter(make(tmp_path / "a", **variant)), updates(tmp_path / "a")
    assert set(adapter.layers) == set(expected)
    for name, dense in expected.items():
        layer = adapter.load(name)
        assert layer.down.shape[0] == adapter.layers[name].rank
        torch.testing.assert_close(layer.scale * layer.up.double() @ layer.down.double(), dense, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 2, 6])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_peft_loads_plain_lora_with_the_exact_truncation(tmp_path, variant, rank):
    source = make(tmp_path / "a", **variant)
    compression = compress_adapter(source, tmp_path / "out", rank)

    assert read_config(tmp_path / "out")["peft_type"] == "LORA"
    for name, found in updates(tmp_path / "out").items():
        assert relative(found, truncation(updates(source)[name], rank)) < 1e-6
    assert any("AdaLoRA" in note for note in compression.notes)
    assert all(key.endswith(".weight") for key in load_file(tmp_path / "out" / WEIGHTS))


def test_the_output_of_the_model_stays(tmp_path):
    source = make(tmp_path / "a", masks=MASKS)
    compress_adapter(source, tmp_path / "out", 6)
    plain = output(LLAMA.build().double().eval(), LLAMA)
    assert relative(output(load(tmp_path / "out"), LLAMA) - plain, output(load(source), LLAMA) - plain) < 1e-6


def test_no_field_of_adalora_is_left(tmp_path):
    source = make(tmp_path / "a", masks=MASKS)
    compress_adapter(source, tmp_path / "out", 2)
    fields = read_config(tmp_path / "out")
    assert not {"init_r", "target_r", "tinit", "tfinal", "deltaT", "total_step"} & set(fields)
    assert fields["r"] == 2
    assert fields["target_modules"] == read_config(source)["target_modules"]


def test_half_precision_is_folded_without_rounding(tmp_path):
    source = make(tmp_path / "a")
    edit_tensors(source, lambda t: t.update({key: tensor.bfloat16() for key, tensor in t.items()}))
    adapter, stored = open_adapter(source), load_file(source / WEIGHTS)
    exact = stored[f"{PREFIX}{Q0}.lora_A"].double() * stored[f"{PREFIX}{Q0}.lora_E"].double()
    assert torch.equal(adapter.load(Q0).down.double(), exact)


def test_modules_pruned_to_rank_0_are_left_out_and_reported(tmp_path):
    source = make(tmp_path / "a", masks={Q0: [False] * 6})
    adapter = open_adapter(source)
    assert Q0 not in adapter.layers
    assert adapter.left_out == (Q0,)
    compression = compress_adapter(source, tmp_path / "out", 2)
    assert any(Q0 in note for note in compression.notes)
    assert set(updates(tmp_path / "out")) == set(adapter.layers)


def test_spectra_are_those_of_the_effective_update(tmp_path):
    source = make(tmp_path / "a")
    for spectrum in decompose(open_adapter(source)).spectra:
        dense = torch.linalg.svdvals(updates(source)[spectrum.name])[: spectrum.rank]
        torch.testing.assert_close(
            torch.tensor(spectrum.singular_values, dtype=torch.float64), dense, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("factor", "ABE")
def test_a_missing_factor_is_named(tmp_path, factor):
    source = make(tmp_path / "a")
    edit_tensors(source, lambda tensors: tensors.__delitem__(f"{PREFIX}{Q0}.lora_{factor}"))
    with pytest.raises(AdapterError, match=rf"{WEIGHTS}.*{Q0}.*no lora_{factor}"):
        open_adapter(source)


@pytest.mark.parametrize("shape", [(5, 1), (6, 2), ()], ids=str)
def test_singular_values_of_another_shape_name_file_and_layer(tmp_path, shape):
    source = make(tmp_path / "a")
    edit_tensors(source, lambda tensors: tensors.update({f"{PREFIX}{Q0}.lora_E": torch.ones(shape)}))
    with pytest.raises(AdapterError, match=rf"{WEIGHTS}.*{Q0}"):
        open_adapter(source)


def test_a_missing_initial_rank_is_named(tmp_path):
    source = make(tmp_path / "a")
    edit_config(source, init_r=...)
    with pytest.raises(AdapterError, match=rf"{CONFIG}.*init_r"):
        open_adapter(source)
