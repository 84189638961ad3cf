"""The same update under other names, where names map without the model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import CONFIG, WEIGHTS, make_adapter, relative
from click.testing import CliRunner
from images import (
    kohya_pair,
    kohya_updates,
    load_unet,
    lora_state,
    save,
    text_encoder,
    unet,
    unet_output,
    updates_in,
    with_lora,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_squeeze import open_adapter, save_adapter, verify
from lora_squeeze.cli import main
from lora_squeeze.conversion import convert
from lora_squeeze.errors import AdapterError, OutputError, UnsupportedAdapter

TARGETS = ["to_q", "to_out.0", "ff.net.0.proj", "conv1", "proj_in", "time_emb_proj", "conv_shortcut", "linear_1"]


def converted(source, to, output):
    save_adapter(convert(open_adapter(source), to), output)
    return output


def adapter_of_a_unet(path, **lora):
    """A PEFT adapter of a UNet, saved by PEFT, with mixed ranks and scales."""
    pytest.importorskip("diffusers")
    mixed = {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2, "conv1": 3}, "alpha_pattern": {"conv1": 5}}
    model = get_peft_model(unet(), LoraConfig(target_modules=TARGETS, **mixed, **lora))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return adapter_of_a_unet(tmp_path_factory.mktemp("peft") / "adapter")


def peft_updates(folder):
    model = PeftModel.from_pretrained(unet(), str(folder))
    return {name.removeprefix("base_model.model."): dense for name, dense in updates_in(model).items()}


def assert_same(found, expected, *, within=1e-6):
    assert found.keys() == expected.keys()
    assert all(relative(found[name], dense) < within for name, dense in expected.items())


def test_diffusers_applies_a_peft_adapter_of_its_unet(tmp_path, folder):
    file = converted(folder, "diffusers", tmp_path / "out.safetensors")
    assert_same(updates_in(load_unet(file)), peft_updates(folder))
    assert {spec.scale for spec in open_adapter(file).layers.values()} == {1.0}  # right for those who read no header


def test_a_kohya_file_has_diffusers_own_converters_keys(tmp_path, folder):
    from diffusers.utils import convert_state_dict_to_kohya

    file = converted(folder, "kohya", tmp_path / "out.safetensors")
    state = {f"unet.{key}": value for key, value in lora_state(with_lora(unet(), target_modules=TARGETS)).items()}
    assert set(load_file(file)) == set(convert_state_dict_to_kohya(state))
    expected = {"lora_unet_" + name.replace(".", "_"): dense for name, dense in peft_updates(folder).items()}
    assert_same(kohya_updates(file), expected)


@torch.no_grad()
def test_round_trip_through_all_formats(tmp_path, folder):
    kohya = converted(folder, "kohya", tmp_path / "kohya.safetensors")
    diffusers = converted(kohya, "diffusers", tmp_path / "diffusers.safetensors")
    again = converted(diffusers, "peft", tmp_path / "peft")
    assert_same(peft_updates(again), peft_updates(folder))
    expected = PeftModel.from_pretrained(unet(), str(folder))
    assert relative(unet_output(load_unet(diffusers)), unet_output(expected)) < 1e-6


@torch.no_grad()
def test_trained_biases_get_the_scale_that_the_factors_get(tmp_path):
    source = adapter_of_a_unet(tmp_path / "adapter", lora_bias=True)
    expected = unet_output(PeftModel.from_pretrained(unet(), str(source)))
    assert (
        relative(unet_output(PeftModel.from_pretrained(unet(), str(without_biases(source, tmp_path)))), expected) > 0.01
    )

    diffusers = converted(source, "diffusers", tmp_path / "out.safetensors")

    assert relative(unet_output(load_unet(diffusers)), expected) < 1e-6
    again = converted(diffusers, "peft", tmp_path / "again")
    assert relative(unet_output(PeftModel.from_pretrained(unet(), str(again))), expected) < 1e-6
    assert verify(diffusers, source).passed


def without_biases(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "no biases"))
    tensors = load_file(copy / "adapter_model.safetensors")
    zeroed = {key: tensor * (not key.endswith(".bias")) for key, tensor in tensors.items()}
    save_file(zeroed, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    return copy


def test_text_encoders_have_kohyas_names_and_find_back(tmp_path):
    def state(component):
        model = with_lora(text_encoder(), target_modules=["q_proj", "out_proj", "fc1"])
        names = {key: key if key.startswith("text_model.") else f"text_model.{key}" for key in lora_state(model)}
        return {f"{component}.{names[key]}": value for key, value in lora_state(model).items()}

    for parts, prefixes in (
        ((state("text_encoder"),), {"lora_te"}),
        ((state("text_encoder"), state("text_encoder_2")), {"lora_te1", "lora_te2"}),
    ):
        source = save(tmp_path / "in.safetensors", *parts)
        kohya = converted(source, "kohya", tmp_path / f"kohya{len(parts)}.safetensors")
        layers = open_adapter(kohya).layers
        assert {name.partition("_text_model_encoder_layers_")[0] for name in layers} == prefixes
        back = converted(kohya, "diffusers", tmp_path / f"back{len(parts)}.safetensors")
        assert open_adapter(back).layers.keys() == open_adapter(source).layers.keys()
        before, after = load_file(source), load_file(back)
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_old_attention_names_become_the_models_own(tmp_path):
    keys = (
        "unet.mid_block.attn1.processor.to_out_lora.down.weight",
        "unet.mid_block.attn1.processor.to_out_lora.up.weight",
    )
    source = save(tmp_path / "in.safetensors", {keys[0]: torch.randn(2, 4), keys[1]: torch.randn(6, 2)})
    assert set(convert(open_adapter(source), "peft").layers) == {"mid_block.attn1.to_out.0"}
    assert set(convert(open_adapter(source), "kohya").layers) == {"lora_unet_mid_block_attn1_to_out_0"}


def test_metadata_of_kohyas_own_tensors_does_not_come_along(tmp_path):
    metadata = {"ss_network_dim": "4", "sshs_model_hash": "ab" * 32, "ss_tag_frequency": "{}", "ss_network_alpha": "2"}
    name = "lora_unet_mid_block_attentions_0_proj_in"
    source = save(tmp_path / "in.safetensors", kohya_pair(name, 8, 4, 6, alpha=2.0), metadata=metadata)
    file = converted(source, "diffusers", tmp_path / "out.safetensors")
    with safe_open(file, "pt") as opened:
        assert opened.metadata().keys() == {"format", "lora_squeeze", "ss_tag_frequency"}


def test_the_same_format_is_the_same_adapter(folder):
    adapter = open_adapter(folder)
    assert convert(adapter, "peft") is adapter


def test_to_its_own_format_there_is_nothing_to_convert(tmp_path, folder):
    done = CliRunner().invoke(main, ["convert", str(folder), str(tmp_path / "out"), "--to", "peft"])
    assert done.exit_code == 2
    assert "is a peft adapter already" in done.output
    assert "copy it" in done.output
    assert not (tmp_path / "out").exists()


def test_pickled_tensors_are_converted_to_their_own_format(tmp_path):
    source = make_adapter(tmp_path / "in", use_dora=True)
    torch.save(load_file(source / WEIGHTS), source / "adapter_model.bin")
    (source / WEIGHTS).unlink()
    done = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "out"), "--to", "peft"])
    assert done.exit_code == 0, done.output
    assert "--base" not in done.output  # nothing is squeezed
    assert verify(tmp_path / "out", source).passed
    assert verify(tmp_path / "out").checks[2].found.startswith("convert to peft,")


def test_files_that_stay_behind_are_named(tmp_path, folder):
    (folder / "tokenizer.json").write_text("{}")
    assert any("tokenizer.json" in note for note in convert(open_adapter(folder), "kohya").notes)


# --- what does not map --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_transformer_transformer_blocks_0_attn_to_q",
        "lora_te_encoder_block_0_layer_0_SelfAttention_q",
    ],
)
def test_kohya_names_that_need_the_model_are_refused(tmp_path, name):
    source = save(tmp_path / "in.safetensors", kohya_pair(name, 8, 4, 6))
    with pytest.raises(UnsupportedAdapter, match=f"{name}.*without the model"):
        convert(open_adapter(source), "diffusers")


def test_what_has_no_place_in_the_other_format_is_refused(tmp_path):
    module = kohya_pair("lora_unet_mid_block_attentions_0_proj_in", 8, 4, 6)
    source = save(tmp_path / "a.safetensors", module, {"lora_unet_norm.diff": torch.ones(8)})
    with pytest.raises(UnsupportedAdapter, match=r"lora_unet_norm\.diff"):
        convert(open_adapter(source), "diffusers")
    with pytest.raises(UnsupportedAdapter, match="no part of a diffusers pipeline"):
        convert(open_adapter(make_adapter(tmp_path / "llama")), "kohya")
    both = save(tmp_path / "b.safetensors", module, kohya_pair("lora_te_text_model_encoder_layers_0_mlp_fc1", 8, 4, 6))
    with pytest.raises(UnsupportedAdapter, match="is for one model"):
        convert(open_adapter(both), "peft")
    comfy = save(tmp_path / "c.safetensors", kohya_pair("diffusion_model.blocks.0.q", 8, 4, 6))
    assert set(convert(open_adapter(comfy), "diffusers").layers) == {"diffusion_model.blocks.0.q"}
    pair = {"controlnet.q.lora_A.weight": torch.ones(2, 4), "controlnet.q.lora_B.weight": torch.ones(4, 2)}
    with pytest.raises(UnsupportedAdapter, match="controlnet"):
        convert(open_adapter(save(tmp_path / "d.safetensors", pair)), "kohya")


def test_a_scale_that_overflows_the_factors_is_an_error(tmp_path):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    pair = kohya_pair(name, 8, 4, 6, dtype=torch.float16, alpha=torch.tensor(4e6))
    source = save(tmp_path / "in.safetensors", pair)
    with pytest.raises(AdapterError, match="overflow F16"):
        converted(source, "diffusers", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# --- the command --------------------------------------------------------------------------------------------------


def test_command(tmp_path, folder):
    out = tmp_path / "out.safetensors"
    result = CliRunner().invoke(main, ["convert", str(folder), str(out), "--to", "diffusers"])
    assert result.exit_code == 0, result.output
    assert "Note: the scale" in result.output
    again = CliRunner().invoke(main, ["convert", str(folder), str(out), "--to", "diffusers"])
    assert again.exit_code == 1
    assert "already exists" in again.output
    back = CliRunner().invoke(main, ["convert", str(out), str(tmp_path / "peft"), "--to", "peft"])
    assert back.exit_code == 0, back.output
    assert json.loads((tmp_path / "peft" / CONFIG).read_text())["r"] == 4


def test_the_output_may_not_be_the_source(tmp_path):
    source = save(tmp_path / "in.safetensors", kohya_pair("lora_unet_mid_block_attentions_0_proj_in", 8, 4, 6))
    with pytest.raises(OutputError, match="same file"):
        converted(source, "diffusers", source)
    with pytest.raises(OutputError, match="around it"):
        save_adapter(convert(open_adapter(source), "peft"), tmp_path, overwrite=True)
    assert source.exists()
