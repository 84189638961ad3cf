"""check judges the file: what reading puts right may be what a runtime stumbles over, and what is written is plain."""

import re

import pytest
import torch
from adapters import (
    BERT,
    CONFIG,
    LLAMA,
    PREFIX,
    WEIGHTS,
    edit_config,
    edit_tensors,
    effect,
    load,
    make_adapter,
    relative,
    updates,
)
from commands import invoke, prints
from images import kohya_pair, save
from loaders import LOADERS, NotLoadedError, every_loader, same_updates
from safetensors.torch import load_file
from test_adalora import make as make_adalora
from test_adalora import updates as adalora_updates

from lora_squeeze import compress_adapter, open_adapter, save_adapter, verify
from lora_squeeze.conversion import convert
from lora_squeeze.errors import AdapterError
from lora_squeeze.merging import merge
from lora_squeeze.provenance import provenance_of
from lora_squeeze.serving import RUNTIMES, check

FOR_PEFT = ("peft", "vllm", "sglang", "llamacpp")
LOADED_BY_ALL = {runtime: [] for runtime in FOR_PEFT}


def renamed(folder, change):
    edit_tensors(folder, lambda tensors: [tensors.__setitem__(change(key), tensors.pop(key)) for key in list(tensors)])
    return folder


def bare(folder):
    return renamed(folder, lambda key: key.removeprefix(PREFIX))


def named(folder, name="default"):
    return renamed(folder, lambda key: re.sub(r"(lora_[AB])\.weight$", rf"\1.{name}.weight", key))


def with_odd_ranks(folder):
    edit_config(folder, init_lora_weights="orthogonal", r=7)
    edit_tensors(
        folder, lambda t: t.update({key: one[:7] if "lora_A" in key else one[:, :7] for key, one in t.items()})
    )
    return folder


def without_peft_type(folder):
    edit_config(folder, peft_type=...)
    return folder


# Made by → what is said of it, and the runtimes that load the file itself.
FILES = {
    "plain": (make_adapter, "", {"peft", "vllm", "sglang", "llamacpp"}),
    "AdaLoRA": (make_adalora, "it is AdaLoRA", {"peft"}),
    "AdaLoRA of init_r 12, r 8": (lambda folder: make_adalora(folder, init_r=12, r=8), "it is AdaLoRA", {"peft"}),
    "bare keys": (
        lambda folder: bare(make_adapter(folder)),
        "12 keys of factors do not begin with base_model.model.",
        {"vllm", "sglang", "llamacpp"},
    ),
    "named keys": (lambda folder: named(make_adapter(folder)), "adapter name 'default'", {"sglang"}),
    "no peft_type": (
        lambda folder: without_peft_type(make_adapter(folder)),
        "adapter_config.json has no peft_type",
        {"vllm", "llamacpp"},
    ),
    "odd orthogonal": (
        lambda folder: with_odd_ranks(make_adapter(folder)),
        "has the odd rank 7",
        {"vllm", "sglang", "llamacpp"},
    ),
}
EVERY_FILE = pytest.mark.parametrize(("make", "said", "loaded_by"), FILES.values(), ids=FILES)


@EVERY_FILE
def test_check_judges_the_file_and_gives_one_reason(tmp_path, make, said, loaded_by):
    adapter = open_adapter(make(tmp_path / "adapter"))
    problems = {runtime: check(adapter, runtime) for runtime in FOR_PEFT}
    assert {runtime for runtime, found in problems.items() if not found} == loaded_by
    for found in filter(None, problems.values()):
        (problem,) = found
        assert said in problem.what
        assert "convert --to peft" in problem.what_to_do


@every_loader
@EVERY_FILE
def test_a_problem_is_found_exactly_where_the_loader_refuses_the_file(tmp_path, make, said, loaded_by, runtime):
    folder = make(tmp_path / "adapter")
    try:
        LOADERS[runtime](folder)
        loaded = True
    except NotLoadedError:
        loaded = False
    assert (not check(open_adapter(folder), runtime)) == loaded


def test_peft_leaves_factors_without_the_prefix_at_zero_and_under_another_name_too(tmp_path):
    for change in (bare, lambda folder: named(folder, "mine")):
        folder = change(make_adapter(tmp_path / "adapter"))
        assert all(update.count_nonzero() == 0 for update in updates(LLAMA, folder).values())


@pytest.mark.parametrize("case", ["no peft_type", "odd orthogonal"])
def test_peft_refuses_what_check_says_it_refuses(tmp_path, case):
    folder = FILES[case][0](tmp_path / "adapter")
    with pytest.raises((KeyError, ValueError), match=r"peft_type|even"):
        load(LLAMA, folder)


@pytest.mark.parametrize("how", ["squeezed", "converted", "saved"])
@pytest.mark.parametrize("case", [case for case in FILES if case != "plain"])
def test_what_is_written_is_loaded_by_all_with_the_update_of_the_file(tmp_path, case, how):
    source, out = FILES[case][0](tmp_path / "adapter"), tmp_path / "out"
    if how == "squeezed":
        compress_adapter(source, out, open_adapter(source).rank)
    elif how == "converted":
        prints("convert", source, out, "--to", "peft")
        assert provenance_of(open_adapter(out)).policy == "convert to peft"
        assert verify(out, source).passed
    else:
        save_adapter(open_adapter(source), out)
    written = open_adapter(out)
    assert written.deviations == {}
    assert {runtime: check(written, runtime) for runtime in FOR_PEFT} == LOADED_BY_ALL
    by_peft = adalora_updates(out) if "AdaLoRA" in case else updates(LLAMA, out)
    original = open_adapter(source)
    for name, update in by_peft.items():
        layer = original.load(name)
        assert relative(update, layer.scale * layer.up.double() @ layer.down.double()) < 1e-5
    for load_by in LOADERS.values():
        assert same_updates(load_by(out), by_peft, tolerance=1e-5)


@pytest.mark.parametrize("case", FILES)
def test_merging_and_the_other_formats_start_from_what_was_put_right(tmp_path, case):
    adapter = open_adapter(FILES[case][0](tmp_path / "adapter"))
    assert merge([adapter, adapter]).deviations == {}


def test_for_a_runtime_that_stumbles_over_the_source_it_is_squeezed_all_the_same(tmp_path):
    source = named(bare(make_adapter(tmp_path / "adapter")))
    prints("compress", source, tmp_path / "out", "--rank", 4, "--for", "vllm")
    assert prints("check", tmp_path / "out", "--for", "vllm").startswith(f"{tmp_path / 'out'}: vllm loads it")


def test_the_command_says_what_and_what_to_do(tmp_path):
    source = bare(make_adapter(tmp_path / "adapter"))
    said = invoke("check", source, "--for", "peft")
    assert said.exit_code == 1
    assert "first: 'model.layers.0.mlp.down_proj.lora_A.weight'" in said.output
    assert "such factors are not found, and stay at zero" in said.output
    assert "convert --to peft" in said.output
    assert invoke("check", source, "--for", "vllm").exit_code == 0


# --- the prefix -------------------------------------------------------------------------------------------------


def test_a_note_says_that_the_prefix_was_repaired(tmp_path):
    source = bare(make_adapter(tmp_path / "adapter"))
    said = "12 keys of factors do not begin with base_model.model.; they are written with it, as PEFT loads them"
    for adapter in (open_adapter(source), compress_adapter(source, tmp_path / "out", 4)):
        assert any(note.startswith(said) for note in adapter.notes)
    assert said in re.sub(r"\s+", " ", prints("show", source))
    assert not any("do not begin" in note for note in open_adapter(tmp_path / "out").notes)


def test_one_key_without_the_prefix_is_enough(tmp_path):
    key = f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight"
    source = renamed(make_adapter(tmp_path / "adapter"), lambda one: one.removeprefix(PREFIX) if one == key else one)
    assert check(open_adapter(source), "peft")[0].what.startswith(f"a key does not begin with {PREFIX} (first: 'model.")


@pytest.mark.parametrize(
    ("base", "lora"),
    [(LLAMA, {"use_dora": True}), (BERT, {"modules_to_save": ["classifier"]}), (BERT, {"lora_bias": True})],
    ids=["magnitudes", "modules_to_save", "lora_bias"],
)
def test_what_belongs_to_the_factors_gets_the_prefix_too(tmp_path, base, lora):
    whole = make_adapter(tmp_path / "whole", base, **lora)
    source = bare(make_adapter(tmp_path / "adapter", base, **lora))
    save_adapter(open_adapter(source), tmp_path / "out")
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(whole / WEIGHTS).keys()
    assert relative(effect(base, tmp_path / "out"), effect(base, whole)) < 1e-6


def test_a_tensor_of_unknown_purpose_stays_under_its_own_key(tmp_path):
    source = bare(make_adapter(tmp_path / "adapter"))
    edit_tensors(source, lambda tensors: tensors.update({"odd.thing": torch.ones(2)}))
    assert [tensor.key for tensor in open_adapter(source).pass_through] == ["odd.thing"]


def test_the_same_tensor_with_the_prefix_and_without_is_refused(tmp_path):
    source = bare(make_adapter(tmp_path / "adapter", BERT, modules_to_save=["classifier"]))
    edit_tensors(source, lambda tensors: tensors.update({f"{PREFIX}classifier.bias": torch.ones(3)}))
    with pytest.raises(AdapterError, match=rf"{WEIGHTS}.*classifier\.bias.*are the same tensor"):
        open_adapter(source)


def test_magnitudes_under_the_key_of_a_module_are_those_of_peft(tmp_path):
    source = make_adapter(tmp_path / "adapter", use_dora=True)
    whole = effect(LLAMA, source)
    renamed(source, lambda key: f"{key}.weight" if key.endswith("lora_magnitude_vector") else key)
    assert relative(effect(LLAMA, source), whole) < 1e-6
    adapter = open_adapter(source)
    assert adapter.deviations == {}
    save_adapter(adapter, tmp_path / "out")
    assert relative(effect(LLAMA, tmp_path / "out"), whole) < 1e-6


def test_a_configuration_gets_its_peft_type(tmp_path):
    source = without_peft_type(make_adapter(tmp_path / "adapter"))
    save_adapter(open_adapter(source), tmp_path / "out")
    assert '"peft_type": "LORA"' in (tmp_path / "out" / CONFIG).read_text()


def test_pickled_weights_are_loaded_by_all(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    torch.save(load_file(source / WEIGHTS), source / "adapter_model.bin")
    (source / WEIGHTS).unlink()
    assert {runtime: check(open_adapter(source), runtime) for runtime in FOR_PEFT} == LOADED_BY_ALL
    assert all(update.count_nonzero() for update in updates(LLAMA, source).values())


# --- files of image generation ----------------------------------------------------------------------------------

UNET = "lora_unet_mid_block_resnets_0_conv1"


def test_diffusers_drops_the_dora_scale_of_a_kohya_file(tmp_path):
    scale = {f"{UNET}.dora_scale": torch.ones(8, 1)}
    source = save(tmp_path / "in.safetensors", kohya_pair(UNET, 8, 4, 6), scale)
    (problem,) = check(open_adapter(source), "diffusers")
    assert "dora_scale" in problem.what
    assert "convert --to diffusers" in problem.what_to_do
    assert check(open_adapter(source), "comfyui") == []
    assert check(convert(open_adapter(source), "diffusers"), "diffusers") == []


def test_diffusers_refuses_a_convolution_of_three_factors_which_is_written_as_two(tmp_path):
    tensors = {
        f"{UNET}.lora_down.weight": torch.randn(4, 6, 1, 1),
        f"{UNET}.lora_mid.weight": torch.randn(4, 4, 3, 3),
        f"{UNET}.lora_up.weight": torch.randn(8, 4, 1, 1),
        f"{UNET}.alpha": torch.tensor(4.0),
    }
    source = save(tmp_path / "in.safetensors", tensors)
    (problem,) = check(open_adapter(source), "diffusers")
    assert "lora_mid" in problem.what
    assert check(open_adapter(source), "comfyui") == []
    prints("convert", source, tmp_path / "out.safetensors", "--to", "kohya")
    assert verify(tmp_path / "out.safetensors", source).passed
    assert check(open_adapter(tmp_path / "out.safetensors"), "diffusers") == []


def test_every_runtime_that_stumbles_says_over_what(tmp_path):
    assert all(len(why) > 10 for runtime in RUNTIMES.values() for why in runtime.stumbles.values())
