"""diffusers files: where the scales stand, old and new keys; saved and loaded by diffusers' own pipelines."""

import json
from math import isclose

import pytest
import torch
from adapters import relative, truncate_in_place, truncation
from images import (
    load_flux,
    load_unet,
    lora_state,
    save,
    text_encoder,
    unet,
    unet_output,
    updates_in,
    with_lora,
)
from safetensors import safe_open
from safetensors.torch import load_file

from lora_squeeze import Ranks, compress, compress_adapter, open_adapter, save_adapter, squeeze
from lora_squeeze.errors import AdapterError, UnsupportedAdapter
from lora_squeeze.formats import weights_size
from lora_squeeze.serving import check

pytest.importorskip("diffusers")

LINEARS = ["to_q", "to_k", "to_v", "proj_mlp"]


def unet_file(folder, *, dtype=None, with_config=True, **lora):
    """What StableDiffusionPipeline.save_lora_weights writes, with or without the configuration in the header."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata

    model = with_lora(unet(), dtype=dtype, **lora)
    metadata = _collate_lora_metadata({"unet": model}) if with_config else {}
    StableDiffusionPipeline.save_lora_weights(str(folder), unet_lora_layers=lora_state(model), **metadata)
    return folder / "pytorch_lora_weights.safetensors"


def flux_file(file, *, alpha=None, **lora):
    """A transformer's file, optionally with an alpha tensor for each module (as ai-toolkit and others write)."""
    from images import flux

    state = {f"transformer.{key}": value for key, value in lora_state(with_lora(flux(), **lora)).items()}
    alphas = {}
    if alpha is not None:
        alphas = {key.replace(".lora_A.weight", ".alpha"): torch.tensor(alpha) for key in state if "lora_A" in key}
    return save(file, state, alphas)


def config_of(file):
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata().get("lora_adapter_metadata", "{}"))


def mixed(adapter):
    return Ranks("mine", {name: 1 + position % 3 for position, name in enumerate(adapter.layers)})


def assert_truncated(before, after, ranks, prefix):
    assert before.keys() == after.keys()
    for name, dense in before.items():
        assert relative(after[name], truncation(dense, ranks.by_layer[prefix + name])) < 1e-5, name


# --- loaded by diffusers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora", [{}, {"lora_alpha": 8}, {"use_rslora": True}, {"lora_alpha": 3, "rank_pattern": {"to_q": 2}}]
)
@torch.no_grad()
def test_the_output_is_that_of_the_exact_truncation(tmp_path, lora):
    source = unet_file(tmp_path / "in", **lora)
    expected = unet_output(truncate_in_place(load_unet(source).double(), 2))
    compress_adapter(source, tmp_path / "out.safetensors", 2)
    assert relative(unet_output(load_unet(tmp_path / "out.safetensors")), expected) < 1e-6
    assert relative(unet_output(load_unet(source)), expected) > 1e-3


@pytest.mark.parametrize("with_config", [True, False])
def test_mixed_ranks_are_applied_as_planned(tmp_path, with_config):
    source = unet_file(tmp_path / "in", with_config=with_config, lora_alpha=4)
    adapter = open_adapter(source)
    ranks = mixed(adapter)
    squeezed = compress(adapter, ranks)
    save_adapter(squeezed, tmp_path / "out.safetensors")
    assert_truncated(updates_in(load_unet(source)), updates_in(load_unet(tmp_path / "out.safetensors")), ranks, "unet.")
    assert config_of(tmp_path / "out.safetensors")["unet.r"] == 3
    assert (tmp_path / "out.safetensors").stat().st_size == weights_size(squeezed)


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_flux_applies_mixed_ranks_with_and_without_alpha(tmp_path, alpha):
    source = flux_file(tmp_path / "in.safetensors", alpha=alpha, target_modules=LINEARS)
    adapter = open_adapter(source)
    assert {spec.scale for spec in adapter.layers.values()} == {1.0 if alpha is None else alpha / 4}
    ranks = mixed(adapter)
    squeeze(adapter, ranks, tmp_path / "out.safetensors", runtime="diffusers")
    after = updates_in(load_flux(tmp_path / "out.safetensors"))
    assert_truncated(updates_in(load_flux(source)), after, ranks, "transformer.")
    written = load_file(tmp_path / "out.safetensors")
    with_alpha = {key.removesuffix(".alpha") for key in written if key.endswith(".alpha")}
    assert with_alpha == (set() if alpha is None else set(adapter.layers))
    assert bool(config_of(tmp_path / "out.safetensors")) == (alpha is None)  # diffusers refuses files with both


def test_a_layer_of_rank_zero_is_gone_and_the_others_are_applied(tmp_path):
    source = unet_file(tmp_path / "in")
    adapter = open_adapter(source)
    gone = next(iter(adapter.layers))
    ranks = Ranks("mine", {name: 0 if name == gone else 2 for name in adapter.layers})
    squeeze(adapter, ranks, tmp_path / "out.safetensors")
    before, after = updates_in(load_unet(source)), updates_in(load_unet(tmp_path / "out.safetensors"))
    del before[gone.removeprefix("unet.")]
    assert_truncated(before, after, ranks, "unet.")


def test_a_text_encoder_is_squeezed_beside_the_unet(tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata

    model = with_lora(unet())
    encoder = with_lora(text_encoder(), lora_alpha=8, target_modules=["q_proj", "fc1"])
    StableDiffusionPipeline.save_lora_weights(
        str(tmp_path / "in"),
        unet_lora_layers=lora_state(model),
        text_encoder_lora_layers=lora_state(encoder),
        **_collate_lora_metadata({"unet": model, "text_encoder": encoder}),
    )
    adapter = open_adapter(tmp_path / "in")
    ranks = mixed(adapter)
    squeeze(adapter, ranks, tmp_path / "out.safetensors")

    def loaded(file):
        encoder = text_encoder()
        state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(str(file), return_lora_metadata=True)
        StableDiffusionPipeline.load_lora_into_text_encoder(
            state, alphas, encoder, adapter_name="default", metadata=metadata
        )
        return updates_in(encoder)

    before = loaded(tmp_path / "in" / "pytorch_lora_weights.safetensors")
    assert len(before) == 4
    assert_truncated(before, loaded(tmp_path / "out.safetensors"), ranks, "text_encoder.")


# --- what the file says -------------------------------------------------------------------------------------------


def test_the_folder_that_diffusers_saves_to_is_an_adapter_too(tmp_path):
    file = unet_file(tmp_path / "in")
    assert open_adapter(tmp_path / "in").source == str(file)


def test_at_full_rank_every_tensor_keeps_its_bits(tmp_path):
    source = unet_file(tmp_path / "in", dtype=torch.float16, use_dora=True, lora_alpha=8)
    result = compress_adapter(source, tmp_path / "out.safetensors", 4)
    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    assert any("DoRA" in note for note in result.notes)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    old, new = config_of(source), config_of(tmp_path / "out.safetensors")
    assert {key for key in old | new if old.get(key) != new.get(key)} == set()


SPELLINGS = {
    "new": ("unet.mid.to_q.lora_A.weight", "unet.mid.to_q.lora_B.weight"),
    "old": ("unet.mid.to_q.lora.down.weight", "unet.mid.to_q.lora.up.weight"),
    "processor": ("unet.mid.processor.to_q_lora.down.weight", "unet.mid.processor.to_q_lora.up.weight"),
    "text": (
        "text_encoder.text_model.q_proj.lora_linear_layer.down.weight",
        "text_encoder.text_model.q_proj.lora_linear_layer.up.weight",
    ),
    "comfy": ("diffusion_model.blocks.0.q.lora_A.weight", "diffusion_model.blocks.0.q.lora_B.weight"),
}


@pytest.mark.parametrize("keys", SPELLINGS.values(), ids=SPELLINGS)
def test_keys_keep_their_spelling(tmp_path, keys):
    source = save(tmp_path / "in.safetensors", {keys[0]: torch.randn(4, 8), keys[1]: torch.randn(6, 4)})
    compress_adapter(source, tmp_path / "out.safetensors", 2)
    assert set(load_file(tmp_path / "out.safetensors")) == set(keys)


def test_comfyui_reads_no_header_so_a_scale_that_stands_there_is_a_problem(tmp_path):
    (problem,) = check(open_adapter(unet_file(tmp_path / "a", lora_alpha=8)), "comfyui")
    assert "header" in problem.what
    assert check(open_adapter(unet_file(tmp_path / "b")), "comfyui") == []
    assert check(open_adapter(tmp_path / "a"), "diffusers") == []
    (problem,) = check(open_adapter(tmp_path / "a"), "vllm")
    assert "diffusers adapter" in problem.what


# --- errors -------------------------------------------------------------------------------------------------------

DOWN, UP = SPELLINGS["new"]


@pytest.mark.parametrize(
    ("tensors", "config", "error", "words"),
    [
        ({UP: None}, None, AdapterError, "lora_A.weight"),
        ({UP: torch.ones(6, 3)}, None, AdapterError, "do not fit"),
        ({"mid.lora_A.weight": torch.ones(2, 2)}, None, AdapterError, "mid.lora_A.weight"),
        ({"unet.mid.to_q.lora.down.weight": torch.ones(4, 8)}, None, AdapterError, "same factor"),
        ({"unet.mid.to_q.alpha": torch.tensor(8.0)}, {"unet.r": 4, "unet.lora_alpha": 4}, AdapterError, "scale 2"),
        ({}, {"unet.r": 8, "unet.lora_alpha": 4}, AdapterError, "declares rank 8"),
        ({}, {"unet.r": "four"}, AdapterError, "four"),
        ({}, {"unet.r": 4, "unet.rank_pattern": {"(": 4}}, AdapterError, "regular expression"),
        ({}, {"unet.r": 4, "unet.rank_pattern": []}, None, ""),
        ({}, {"unet.r": 4, "unet.rank_pattern": [1]}, AdapterError, "must map"),
        ({}, "not JSON", AdapterError, "JSON"),
        ({"unet.x.lokr_w1": torch.ones(2, 2)}, None, UnsupportedAdapter, "LoKr"),
    ],
)
def test_errors_name_file_and_key(tmp_path, tensors, config, error, words):
    parts = {DOWN: torch.ones(4, 8), UP: torch.ones(6, 4), **tensors}
    metadata = {"lora_adapter_metadata": config if isinstance(config, str) else json.dumps(config)} if config else None
    parts = {key: value for key, value in parts.items() if value is not None}
    file = save(tmp_path / "in.safetensors", parts, metadata=metadata)
    if error is None:
        assert isclose(open_adapter(file).layers["unet.mid.to_q"].scale, 2.0)  # PEFT's default alpha is 8
        return
    with pytest.raises(error, match=words) as caught:
        open_adapter(file)
    assert str(file) in str(caught.value)


def test_unknown_tensors_are_kept_and_reported(tmp_path):
    extra = {"transformer.norm_q.weight": torch.ones(3, dtype=torch.int16)}
    source = save(tmp_path / "in.safetensors", {DOWN: torch.randn(4, 8), UP: torch.randn(6, 4)}, extra)
    result = compress_adapter(source, tmp_path / "out.safetensors", 2)
    assert any("norm_q" in note for note in result.notes)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["transformer.norm_q.weight"], torch.ones(3).short())
