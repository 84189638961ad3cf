"""The scale in the factors: diffusers files whose scale a runtime does not find, or refuses where it stands."""

import json

import pytest
import torch
from adapters import relative, truncation
from commands import prints
from images import kohya_pair, load_flux, load_unet, lora_state, save, unet, unet_output, updates_in, with_lora
from safetensors.torch import load_file
from test_diffusers_format import LINEARS, config_of, flux_file, mixed, unet_file

from lora_squeeze import Ranks, compress, decompose, open_adapter, save_adapter, squeeze, verify
from lora_squeeze.conversion import convert
from lora_squeeze.errors import AdapterError
from lora_squeeze.formats import weights_size
from lora_squeeze.merging import merge
from lora_squeeze.provenance import provenance_of
from lora_squeeze.rewriting import scale_in_factors
from lora_squeeze.serving import check, fit
from lora_squeeze.verbs import choose_ranks, full_rank, outcome
from lora_squeeze.verdicts import judge

pytest.importorskip("diffusers")


def with_alphas(file, alpha=2.0, model=unet, part="unet", **lora):
    """Factors as diffusers names them, with an alpha tensor for each module."""
    state = {f"{part}.{key}": value for key, value in lora_state(with_lora(model(), **lora)).items()}
    alphas = {key.replace(".lora_A.weight", ".alpha"): torch.tensor(alpha) for key in state if ".lora_A." in key}
    return save(file, state, alphas)


def as_comfyui(file):
    """Module → the update that ComfyUI applies: alpha / rank · up · down, or without an alpha up · down."""
    tensors, found = load_file(file), {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            scale = float(tensors[f"{name}.alpha"]) / len(down) if f"{name}.alpha" in tensors else 1.0
            up = tensors[f"{name}.lora_B.weight"].double()
            found[name.partition(".")[2]] = scale * up.flatten(1) @ down.double().flatten(1)
    return found


def pipeline():
    """What of a pipeline load_lora_weights needs; the mixin is StableDiffusionPipeline's own."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    class Pipeline(StableDiffusionLoraLoaderMixin):
        components = {}  # noqa: RUF012
        hf_device_map = None
        text_encoder = None

        def __init__(self):
            self.unet = unet()

    return Pipeline()


def loaded(file):
    made = pipeline()
    made.load_lora_weights(str(file), adapter_name="default")
    return updates_in(made.unet)


def assert_same(found, expected, *, within=1e-6):
    assert found.keys() == expected.keys()
    assert max(relative(found[name], dense) for name, dense in expected.items()) < within


# --- ComfyUI does not read the header -----------------------------------------------------------------------------


def test_convert_puts_the_scale_of_the_header_into_the_factors(tmp_path):
    source = unet_file(tmp_path / "in", r=8, lora_alpha=4)
    (problem,) = check(open_adapter(source), "comfyui")
    assert "convert --to diffusers" in problem.what_to_do
    said = prints("convert", source, tmp_path / "out.safetensors", "--to", "diffusers")
    assert "the scale (0.5) goes into the factors" in said
    assert check(open_adapter(tmp_path / "out.safetensors"), "comfyui") == []
    assert_same(as_comfyui(tmp_path / "out.safetensors"), updates_in(load_unet(source)))
    assert_same(loaded(tmp_path / "out.safetensors"), updates_in(load_unet(source)))
    assert verify(tmp_path / "out.safetensors", source).passed


def test_an_adapter_without_scales_is_the_same_object(tmp_path):
    adapter = open_adapter(unet_file(tmp_path / "in"))
    assert convert(adapter, "diffusers") is scale_in_factors(adapter) is adapter


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lora", [{"lora_alpha": 3}, {"use_rslora": True}, {"lora_alpha": 3, "alpha_pattern": {"to_q": 4}}]
)
def test_what_is_squeezed_for_comfyui_has_no_scale_but_the_factors(tmp_path, rank, dtype, lora):
    source, output = unet_file(tmp_path / "in", dtype=dtype, **lora), tmp_path / "out.safetensors"
    prints("compress", source, output, "--rank", rank, "--for", "comfyui")
    assert check(open_adapter(output), "comfyui") == []
    verification = verify(output, source)
    assert verification.passed, verification
    before = updates_in(load_unet(source))
    within = 1e-5 if dtype == torch.float32 else 2e-2
    expected = {name: truncation(dense, rank) for name, dense in before.items()}
    for applied in (as_comfyui(output), loaded(output)):
        assert_same(applied, expected, within=within)


def test_a_merge_for_comfyui(tmp_path):
    one = unet_file(tmp_path / "one", r=8, lora_alpha=4)
    other = unet_file(tmp_path / "other", lora_alpha=12)
    output = tmp_path / "out.safetensors"
    prints("merge", one, other, output, "--for", "comfyui")
    a, b = (updates_in(load_unet(source)) for source in (one, other))
    assert_same(as_comfyui(output), {name: (a[name] + b[name]) / 2 for name in a}, within=1e-5)
    assert check(open_adapter(output), "comfyui") == []
    assert verify(output).passed


def test_a_merge_adds_up_factors_as_they_are(tmp_path):
    adapter = open_adapter(unet_file(tmp_path / "in", dtype=torch.bfloat16, lora_alpha=3))
    merged = merge([adapter, adapter])
    for name in adapter.layers:
        layer, both = adapter.load(name), merged.load(name)
        assert (
            relative(both.scale * both.up.double() @ both.down.double(), 0.75 * layer.up.double() @ layer.down.double())
            < 1e-6
        )


@torch.no_grad()
@pytest.mark.parametrize("how", ["compress", "convert"])
def test_trained_biases_go_the_way_of_the_scale(tmp_path, how):
    source, output = unet_file(tmp_path / "in", lora_alpha=3, lora_bias=True), tmp_path / "out.safetensors"
    if how == "convert":
        prints("convert", source, output, "--to", "diffusers")
    else:
        prints("compress", source, output, "--rank", 4, "--for", "comfyui")
    key = next(key for key in load_file(source) if key.endswith(".bias"))
    assert torch.allclose(load_file(output)[key], 0.75 * load_file(source)[key])
    assert load_file(source)[key].any()
    assert relative(unet_output(load_unet(output)), unet_output(load_unet(source))) < 1e-5
    assert verify(output, source).passed
    prints("compress", source, tmp_path / "any.safetensors", "--rank", 4)
    assert verify(tmp_path / "any.safetensors", source).passed


def test_a_bias_of_integers_or_of_no_layer(tmp_path):
    pair = {"unet.a.lora_A.weight": torch.ones(2, 4), "unet.a.lora_B.weight": torch.ones(4, 2)}
    alpha = {"unet.a.alpha": torch.tensor(1.0)}
    alone = save(tmp_path / "alone.safetensors", pair, alpha, {"unet.b.lora_B.bias": torch.ones(4)})
    save_adapter(convert(open_adapter(alone), "diffusers"), tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["unet.b.lora_B.bias"], torch.ones(4))
    whole = save(tmp_path / "whole.safetensors", pair, alpha, {"unet.a.lora_B.bias": torch.ones(4).short()})
    with pytest.raises(AdapterError, match=r"unet\.a\.lora_B\.bias.*I16"):
        convert(open_adapter(whole), "diffusers")


@pytest.mark.parametrize("scales", [(0.5, 0.5, None), (None, None, 0.5), (1.0, None, None)])
def test_alphas_of_some_layers(tmp_path, scales):
    """Of the layers without, ComfyUI takes the scale 1, whatever squeezing would give all layers."""
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for name, scale in zip("abc", scales, strict=True):
        tensors[f"unet.{name}.lora_A.weight"] = torch.randn(4, 12, generator=generator)
        tensors[f"unet.{name}.lora_B.weight"] = torch.randn(10, 4, generator=generator)
        if scale:
            tensors[f"unet.{name}.alpha"] = torch.tensor(4 * scale)
    source = save(tmp_path / "in.safetensors", tensors)
    assert check(open_adapter(source), "comfyui") == []
    squeeze(
        open_adapter(source),
        Ranks("mine", dict(zip(open_adapter(source).layers, (2, 3, 4), strict=True))),
        tmp_path / "out.safetensors",
        runtime="comfyui",
    )
    before = as_comfyui(source)
    expected = {name: truncation(before[name], rank) for name, rank in zip(before, (2, 3, 4), strict=True)}
    assert_same(as_comfyui(tmp_path / "out.safetensors"), expected, within=1e-5)


def test_sizes_and_verdicts_know_of_it(tmp_path):
    source = unet_file(tmp_path / "in", lora_alpha=3, use_rslora=True)
    found = decompose(open_adapter(source))
    plan = choose_ranks(found, "size=18kB", runtime="comfyui")
    squeeze(found, plan, tmp_path / "out.safetensors", runtime="comfyui")
    size = (tmp_path / "out.safetensors").stat().st_size
    assert size == outcome(found, plan, runtime="comfyui").file_bytes <= 18000
    verdict = next(one for one in judge(found.adapter, plan) if one.runtime == "comfyui")
    assert (verdict.loads, verdict.needs, verdict.padded_to) == ("fitted", ("--for comfyui",), 0)


def test_a_verdict_speaks_of_padding_only_where_ranks_are_padded(tmp_path):
    names = [f"lora_unet_down_blocks_{number}_resnets_0_conv1" for number in range(2)]
    source = save(tmp_path / "in.safetensors", *(kohya_pair(name, 10, 4, 12, alpha=4.0) for name in names))
    verdicts = judge(open_adapter(source), Ranks("mine", dict(zip(names, (1, 3), strict=True))))
    found = next(one for one in verdicts if one.runtime == "diffusers")
    assert (found.loads, found.needs, found.padded_to) == ("fitted", ("--for diffusers",), 0)


def test_fit_does_it_by_itself(tmp_path):
    source = unet_file(tmp_path / "in", dtype=torch.bfloat16, lora_alpha=3)
    adapter = open_adapter(source)
    assert {spec.scale for spec in fit(adapter, "diffusers").layers.values()} == {0.75}
    assert {spec.scale for spec in fit(adapter, "comfyui").layers.values()} == {1.0}
    fitted = fit(compress(adapter, full_rank(adapter)), "comfyui")
    assert check(fitted, "comfyui") == []
    save_adapter(fitted, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").stat().st_size == weights_size(fitted)
    assert verify(tmp_path / "out.safetensors", source).passed
    assert provenance_of(open_adapter(tmp_path / "out.safetensors")).scales == 1.0


# --- alpha tensors that pipelines refuse --------------------------------------------------------------------------


def test_stable_diffusion_refuses_alpha_tensors_and_check_says_so(tmp_path):
    source = with_alphas(tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        loaded(source)
    (problem,) = check(open_adapter(source), "diffusers")
    assert "unet.down_blocks.0.attentions.0.proj_in.alpha" in problem.what
    assert "--for diffusers" in problem.what_to_do
    assert check(open_adapter(source), "comfyui") == []


@pytest.mark.parametrize("alpha", [2.0, 4.0])
def test_convert_and_compress_make_stable_diffusion_load_them(tmp_path, alpha):
    source = with_alphas(tmp_path / "in.safetensors", alpha)
    before = as_comfyui(source)
    prints("convert", source, tmp_path / "converted.safetensors", "--to", "diffusers")
    assert_same(loaded(tmp_path / "converted.safetensors"), before)
    adapter = open_adapter(source)
    ranks = mixed(adapter)
    squeeze(adapter, ranks, tmp_path / "squeezed.safetensors", runtime="diffusers")
    expected = {name: truncation(dense, ranks.by_layer[f"unet.{name}"]) for name, dense in before.items()}
    assert_same(loaded(tmp_path / "squeezed.safetensors"), expected, within=1e-5)
    for made in ("converted", "squeezed"):
        written = open_adapter(tmp_path / f"{made}.safetensors")
        assert check(written, "diffusers") == check(written, "comfyui") == []
        assert verify(tmp_path / f"{made}.safetensors", source).passed


def test_an_alpha_that_goes_changes_no_bit_of_factors_that_keep_their_rank(tmp_path):
    source = with_alphas(tmp_path / "in.safetensors", 4.0)
    prints("compress", source, tmp_path / "out.safetensors", "--rank", 4, "--for", "diffusers")
    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    assert {key for key in before if not key.endswith(".alpha")} == set(after)
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


def test_without_a_runtime_alphas_stay(tmp_path):
    source = with_alphas(tmp_path / "in.safetensors")
    prints("compress", source, tmp_path / "out.safetensors", "--rank", 2)
    assert set(load_file(tmp_path / "out.safetensors")) == set(load_file(source))


def test_flux_refuses_alphas_beside_a_header_and_check_says_so(tmp_path):
    plain = flux_file(tmp_path / "plain.safetensors", alpha=2.0, target_modules=LINEARS)
    expected = updates_in(load_flux(plain))
    assert check(open_adapter(plain), "diffusers") == []
    header = {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.target_modules": LINEARS}
    source = save(tmp_path / "in.safetensors", load_file(plain), metadata={"lora_adapter_metadata": json.dumps(header)})
    with pytest.raises(ValueError, match="network_alphas"):
        load_flux(source)
    (problem,) = check(open_adapter(source), "diffusers")
    assert "beside a header" in problem.what
    for arguments in (("compress", "--rank", 4, "--for", "diffusers"), ("convert", "--to", "diffusers")):
        output = tmp_path / f"{arguments[0]}.safetensors"
        prints(arguments[0], source, output, *arguments[1:])
        assert_same(updates_in(load_flux(output)), expected, within=1e-5)
        assert check(open_adapter(output), "diffusers") == []
        assert verify(output, source).passed
        assert config_of(output)["transformer.lora_alpha"] == 4
