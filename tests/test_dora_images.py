"""DoRA in image formats: magnitudes are converted, fitted, and loaded by diffusers, PEFT and LyCORIS."""

import pytest
import torch
from adapters import lora_modules, relative
from images import kohya_pair, kohya_updates, load_unet, save, unet, unet_output
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lora_squeeze import compress_adapter, open_adapter, save_adapter
from lora_squeeze.conversion import convert
from lora_squeeze.errors import AdapterError, UnsupportedAdapter

pytest.importorskip("diffusers")

TARGETS = ["to_q", "to_out.0", "ff.net.0.proj", "conv1", "proj_in", "time_emb_proj", "conv_shortcut", "linear_1"]


def converted(source, to, output):
    save_adapter(convert(open_adapter(source), to), output)
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DoRA adapter of a UNet, linear modules and convolutions, saved by PEFT."""
    model = get_peft_model(unet(), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + 0.2 * noise) if "magnitude" in name else noise * 0.3
    path = tmp_path_factory.mktemp("dora") / "adapter"
    model.save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder of a pipeline, as far as its UNet goes."""
    path = tmp_path_factory.mktemp("pipeline")
    unet().save_pretrained(path / "unet", max_shard_size="20KB")
    return path


def by_peft(folder):
    """Module → the weight that PEFT applies."""
    model = PeftModel.from_pretrained(unet(), str(folder)).double()
    modules = dict(lora_modules(model))
    model.merge_adapter()
    return {name: module.get_base_layer().weight.data for name, module in modules.items()}


def by_lycoris(file, *, build=unet, prefix="lora_unet_"):
    """Module → the weight that LyCORIS applies, by its own formula."""
    from lycoris.functional.general import weight_decompose

    weights, stored = build().double().state_dict(), load_file(file)
    names = {f"{prefix}{key.removesuffix('.weight').replace('.', '_')}": key for key in weights}
    found = {}
    for name, update in kohya_updates(file).items():
        weight = weights[names[name]]
        changed, scale = weight + update.reshape(weight.shape), stored[f"{name}.dora_scale"].double()
        by_output = scale.shape[0] == len(weight)
        found[names[name].removesuffix(".weight")] = weight_decompose(changed, scale, wd_on_out=by_output)
    return found


def assert_same(found, expected, *, within=1e-6):
    assert found.keys() == expected.keys()
    assert all(relative(found[name], dense) < within for name, dense in expected.items())


# --- conversion ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_diffusers_applies_the_weights_that_peft_applies(tmp_path, folder):
    file = converted(folder, "diffusers", tmp_path / "out.safetensors")
    expected = unet_output(PeftModel.from_pretrained(unet(), str(folder)))
    assert relative(unet_output(load_unet(file)), expected) < 1e-6
    assert relative(unet_output(unet()), expected) > 1e-3


def test_kohyas_dora_scale_gives_the_weights_that_peft_applies(tmp_path, folder):
    pytest.importorskip("lycoris")
    file = converted(folder, "kohya", tmp_path / "out.safetensors")
    scales = {key: tensor.shape for key, tensor in load_file(file).items() if key.endswith(".dora_scale")}
    assert scales["lora_unet_mid_block_resnets_0_conv1.dora_scale"] == (16, 1, 1, 1)
    assert {shape[1:] for shape in scales.values()} == {(1,), (1, 1, 1)}
    assert_same(by_lycoris(file), by_peft(folder))


@torch.no_grad()
def test_round_trip_through_all_formats_keeps_every_magnitude(tmp_path, folder):
    kohya = converted(folder, "kohya", tmp_path / "kohya.safetensors")
    diffusers = converted(kohya, "diffusers", tmp_path / "diffusers.safetensors")
    again = converted(diffusers, "peft", tmp_path / "peft")
    direct = converted(folder, "diffusers", tmp_path / "direct.safetensors")
    assert relative(unet_output(load_unet(diffusers)), unet_output(load_unet(direct))) < 1e-6
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, again))
    assert before.keys() == after.keys()
    magnitudes = [key for key in before if key.endswith(".lora_magnitude_vector")]
    assert all(torch.equal(before[key], after[key]) for key in magnitudes)
    assert len(magnitudes) == len(open_adapter(folder).layers)
    assert_same(by_peft(again), by_peft(folder))
    assert convert(open_adapter(kohya), "peft").config["use_dora"] is True
    assert not [note for note in convert(open_adapter(folder), "kohya").notes if "squeezed" in note]


@pytest.mark.parametrize("shape", [(1, 6), (6,), (4, 1)], ids=str)
def test_norms_of_inputs_are_known_to_kohya_alone(tmp_path, shape):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    source = save(tmp_path / "in.safetensors", kohya_pair(name, 8, 4, 6), {f"{name}.dora_scale": torch.ones(shape)})
    for to in ("diffusers", "peft"):
        with pytest.raises(UnsupportedAdapter, match=rf"{name}\.dora_scale.*norms of inputs"):
            convert(open_adapter(source), to)


# --- fitted with the base weights ---------------------------------------------------------------------------------


def test_all_formats_find_the_weights_of_a_pipeline_and_fit_the_same(tmp_path, folder, pipeline):
    pytest.importorskip("lycoris")
    compress_adapter(folder, tmp_path / "peft", 2, base=pipeline / "unet")
    expected = by_peft(tmp_path / "peft")
    for form in ("kohya", "diffusers"):
        source = converted(folder, form, tmp_path / f"{form}.safetensors")
        out = tmp_path / f"{form}-out.safetensors"
        for base in (pipeline, pipeline / "unet"):
            found = compress_adapter(source, out, 2, base=base, overwrite=True).dora
            assert found.relative_error < found.relative_error_if_kept
        again = by_lycoris(out) if form == "kohya" else by_peft(converted(out, "peft", tmp_path / f"{form}-peft"))
        assert_same(again, expected, within=1e-5)


class _Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 12, 3, padding=1)
        self.last = nn.Linear(12, 6)

    def forward(self, image):
        return self.last(self.first(image).relu().mean((-1, -2)))


@pytest.mark.parametrize("by_output", [True, False])
@torch.no_grad()
def test_lycoris_loads_the_best_weights_for_the_squeezed_directions(tmp_path, by_output):
    lycoris = pytest.importorskip("lycoris")

    def network():
        torch.manual_seed(0)
        return _Network()

    options = {"dora_wd": True, "wd_on_output": by_output, "algo": "lora"}
    lycoris.LycorisNetwork.apply_preset({"target_name": [".*"], "target_module": []})
    made = lycoris.create_lycoris(network(), 1.0, linear_dim=4, linear_alpha=2.0, conv_dim=4, conv_alpha=2.0, **options)
    made.apply_to()
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.data = parameter.data * (1 + 0.2 * noise) if "dora" in name else noise * 0.5
    source = save(tmp_path / "in.safetensors", dict(made.state_dict()))
    base = save(tmp_path / "base.safetensors", network().state_dict())

    def weights(file):
        if not by_output:  # which LyCORIS trains, but cannot load
            return by_lycoris(file, build=network, prefix="lycoris_")
        model = network()
        lycoris.create_lycoris_from_weights(1.0, str(file), model)[0].merge_to(1.0)
        return {name: model.get_submodule(name).weight.data.double() for name in ("first", "last")}

    kept = compress_adapter(source, tmp_path / "kept.safetensors", 2)
    fitted = compress_adapter(source, tmp_path / "out.safetensors", 2, base=base)
    assert (kept.dora, fitted.dora.layers) == (None, 2)

    before, with_kept, after = (weights(tmp_path / f"{name}.safetensors") for name in ("in", "kept", "out"))
    for name, old in before.items():
        rows = (lambda tensor: tensor) if by_output else (lambda tensor: tensor.transpose(0, 1))
        new = nn.functional.normalize(rows(with_kept[name]).flatten(1), dim=1)
        best = (rows(old).flatten(1) * new).sum(1, keepdim=True) * new
        assert relative(rows(after[name]).flatten(1), best) < 1e-5
    plain = {name: network().get_submodule(name).weight.double() for name in before}
    lost, update = (
        sum(float((before[name] - other[name]).square().sum()) for name in before) for other in (after, plain)
    )
    assert fitted.dora.relative_error == pytest.approx((lost / update) ** 0.5, rel=1e-4)


def test_a_checkpoint_without_the_part_is_an_error(tmp_path, folder, pipeline):
    source = converted(folder, "kohya", tmp_path / "in.safetensors")
    (pipeline / "unet").rename(pipeline / "vae")
    try:
        with pytest.raises(AdapterError, match="has no weight of"):
            compress_adapter(source, tmp_path / "out.safetensors", 2, base=pipeline)
    finally:
        (pipeline / "vae").rename(pipeline / "unet")
