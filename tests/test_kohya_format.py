"""kohya files: alphas, CP convolutions, metadata and hashes; loaded by diffusers and by LyCORIS."""

import hashlib
import json
import struct

import pytest
import torch
from adapters import relative, truncate_in_place, truncation
from images import (
    kohya_pair,
    kohya_updates,
    load_unet,
    lora_state,
    save,
    unet,
    unet_output,
    updates_in,
    with_lora,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lora_squeeze import Ranks, compress, compress_adapter, open_adapter, save_adapter, squeeze
from lora_squeeze.errors import AdapterError, OutputError, RankError, UnsupportedAdapter
from lora_squeeze.formats import weights_size
from lora_squeeze.serving import check

A, B, C = "lora_unet_a", "lora_te_b", "lora_unet_conv"


def three_modules(dtype=torch.float32):
    return (
        kohya_pair(A, 20, 8, 16, alpha=4.0, dtype=dtype),
        kohya_pair(B, 12, 8, 18, alpha=4.0, dtype=dtype),
        kohya_pair(C, 10, 8, 6, kernel=(3, 3), alpha=4.0, dtype=dtype),
    )


def metadata_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def data_of(file):
    content = file.read_bytes()
    return content[8 + struct.unpack("<Q", content[:8])[0] :]


# --- the update ---------------------------------------------------------------------------------------------------


def test_mixed_ranks_write_alpha_as_scale_times_rank(tmp_path):
    source = save(tmp_path / "in.safetensors", *three_modules())
    squeeze(open_adapter(source), Ranks("mine", {A: 2, B: 5, C: 3}), tmp_path / "out.safetensors")

    written = load_file(tmp_path / "out.safetensors")
    assert {name: float(written[f"{name}.alpha"]) for name in (A, B, C)} == {A: 1.0, B: 2.5, C: 1.5}
    assert written[f"{C}.lora_down.weight"].shape == (3, 6, 3, 3)
    assert written[f"{C}.lora_up.weight"].shape == (10, 3, 1, 1)
    before, after = kohya_updates(source), kohya_updates(tmp_path / "out.safetensors")
    for name, rank in {A: 2, B: 5, C: 3}.items():
        assert relative(after[name], truncation(before[name], rank)) < 1e-6


@pytest.mark.parametrize(
    ("alpha", "kept"),
    [
        (torch.tensor(4, dtype=torch.int64), torch.float32),  # 4 · 2 / 8 = 1 would fit, 4 · 3 / 8 does not
        (torch.tensor(4.0, dtype=torch.float16), torch.float16),
        (torch.tensor(1.3046875, dtype=torch.bfloat16), torch.float32),
        (torch.tensor(1.3), torch.float32),
        (torch.tensor(4.0, dtype=torch.float64), torch.float64),
    ],
)
def test_alpha_keeps_its_dtype_unless_that_cannot_hold_it(tmp_path, alpha, kept):
    source = save(tmp_path / "in.safetensors", kohya_pair(A, 20, 8, 16, alpha=alpha))
    compress_adapter(source, tmp_path / "out.safetensors", 3)
    written = load_file(tmp_path / "out.safetensors")[f"{A}.alpha"]
    assert written.dtype == kept
    assert float(written) == pytest.approx(float(alpha) * 3 / 8, rel=1e-7)


def test_without_alpha_the_scale_is_one_and_none_is_written(tmp_path):
    source = save(tmp_path / "in.safetensors", kohya_pair(A, 20, 8, 16))
    assert open_adapter(source).layers[A].scale == 1.0
    compress_adapter(source, tmp_path / "out.safetensors", 3)
    assert f"{A}.alpha" not in load_file(tmp_path / "out.safetensors")


def test_where_only_some_have_an_alpha_every_update_stays(tmp_path):
    source = save(tmp_path / "in.safetensors", kohya_pair(A, 20, 8, 16), kohya_pair(B, 12, 8, 18, alpha=4.0))
    compress_adapter(source, tmp_path / "out.safetensors", 8)
    before, after = kohya_updates(source), kohya_updates(tmp_path / "out.safetensors")
    assert max(relative(after[name], before[name]) for name in before) < 1e-6


def test_at_full_rank_every_tensor_keeps_its_bits(tmp_path):
    extra = {"lora_unet_norm.diff": torch.randn(7).to(torch.float8_e4m3fn), f"{A}.dora_scale": torch.rand(20, 1)}
    source = save(tmp_path / "in.safetensors", *three_modules(torch.float16), extra)
    compress_adapter(source, tmp_path / "out.safetensors", 8)
    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (after[key].dtype, after[key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(
            after[key].view(torch.uint8 if tensor.ndim else tensor.dtype),
            tensor.view(torch.uint8 if tensor.ndim else tensor.dtype),
        )


def test_a_module_of_rank_zero_is_left_out_with_its_alpha(tmp_path):
    source = save(tmp_path / "in.safetensors", *three_modules())
    squeeze(open_adapter(source), Ranks("mine", {A: 0, B: 2, C: 2}), tmp_path / "out.safetensors")
    assert not any(key.startswith(A) for key in load_file(tmp_path / "out.safetensors"))


def test_a_module_with_a_dora_scale_cannot_be_left_out(tmp_path):
    source = save(tmp_path / "in.safetensors", *three_modules(), {f"{A}.dora_scale": torch.rand(20, 1)})
    adapter = open_adapter(source)
    assert any("DoRA" in note for note in adapter.notes)
    with pytest.raises(RankError, match="dora_scale"):
        compress(adapter, Ranks("mine", {A: 0, B: 2, C: 2}))


def test_a_cp_convolution_is_folded_and_says_so(tmp_path):
    generator = torch.Generator().manual_seed(0)
    parts = {
        f"{C}.lora_down.weight": torch.randn(4, 6, 1, 1, generator=generator),
        f"{C}.lora_mid.weight": torch.randn(4, 4, 3, 3, generator=generator),
        f"{C}.lora_up.weight": torch.randn(10, 4, 1, 1, generator=generator),
        f"{C}.alpha": torch.tensor(2.0),
    }
    source = save(tmp_path / "in.safetensors", parts)
    before = kohya_updates(source)[C]
    adapter = open_adapter(source)
    assert any("lora_mid" in note for note in adapter.notes)
    assert (adapter.layers[C].in_features, adapter.layers[C].kernel) == (54, (3, 3))
    for rank in (4, 2):
        out = tmp_path / f"{rank}.safetensors"
        compress_adapter(source, out, rank)
        assert f"{C}.lora_mid.weight" not in load_file(out)
        assert relative(kohya_updates(out)[C], truncation(before, rank)) < 1e-6


# --- metadata -----------------------------------------------------------------------------------------------------


def test_metadata_is_kept_and_what_squeezing_changes_is_updated(tmp_path):
    metadata = {
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_tag_frequency": '{"a": 1}',
        "sshs_model_hash": "ab" * 32,
        "sshs_legacy_hash": "12345678",
        "modelspec.hash_sha256": "0x" + "cd" * 32,
        "ss_network_args": json.dumps({"conv_dim": "8", "conv_alpha": "4", "preset": "full"}),
    }
    source = save(tmp_path / "in.safetensors", *three_modules(), metadata=metadata)
    adapter = open_adapter(source)
    assert any("sshs_legacy_hash" in note for note in adapter.notes)
    out = tmp_path / "out.safetensors"
    squeezed = compress(adapter, Ranks("mine", {A: 2, B: 2, C: 3}))
    save_adapter(squeezed, out)

    found = metadata_of(out)
    assert out.stat().st_size == weights_size(squeezed)
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", "1.0")
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "1.5", "preset": "full"}
    assert found["ss_tag_frequency"] == '{"a": 1}'
    digest = hashlib.sha256(data_of(out)).hexdigest()
    assert found["sshs_model_hash"] == digest
    assert found["modelspec.hash_sha256"] == "0x" + digest
    assert "sshs_legacy_hash" not in found
    assert json.loads(found["lora_squeeze"])["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


def test_mixed_ranks_are_called_dynamic_as_sd_scripts_does(tmp_path):
    source = save(
        tmp_path / "in.safetensors", *three_modules(), metadata={"ss_network_dim": "8", "ss_network_alpha": "4"}
    )
    squeeze(open_adapter(source), Ranks("mine", {A: 2, B: 5, C: 3}), tmp_path / "out.safetensors")
    found = metadata_of(tmp_path / "out.safetensors")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "Dynamic")


# --- loaded by the libraries --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A file made by diffusers' own converter to kohya's format."""
    pytest.importorskip("diffusers")
    from diffusers.utils import convert_state_dict_to_kohya

    state = {f"unet.{key}": tensor for key, tensor in lora_state(with_lora(unet())).items()}
    return save(tmp_path_factory.mktemp("kohya") / "in.safetensors", convert_state_dict_to_kohya(state))


@torch.no_grad()
def test_diffusers_gives_the_output_of_the_exact_truncation(tmp_path, converted):
    compress_adapter(converted, tmp_path / "out.safetensors", 2)
    expected = unet_output(truncate_in_place(load_unet(converted).double(), 2))
    assert relative(unet_output(load_unet(tmp_path / "out.safetensors")), expected) < 1e-6
    assert relative(unet_output(load_unet(converted)), expected) > 1e-3


def test_diffusers_applies_mixed_ranks_if_they_were_made_for_it(tmp_path, converted):
    adapter = open_adapter(converted)
    ranks = Ranks("mine", {name: 1 + position % 3 for position, name in enumerate(adapter.layers)})
    squeeze(adapter, ranks, tmp_path / "any.safetensors")
    squeeze(adapter, ranks, tmp_path / "fit.safetensors", runtime="diffusers")
    before, after = updates_in(load_unet(converted)), updates_in(load_unet(tmp_path / "fit.safetensors"))
    for name, dense in before.items():
        rank = ranks.by_layer["lora_unet_" + name.replace(".", "_")]
        assert relative(after[name], truncation(dense, rank)) < 1e-5
    assert check(open_adapter(tmp_path / "fit.safetensors"), "diffusers") == []
    (problem,) = check(open_adapter(tmp_path / "any.safetensors"), "diffusers")
    assert "alpha" in problem.what
    # ... and it is a fact, not a rumour, that diffusers misreads the other file
    with pytest.warns(RuntimeWarning, match="alpha_pattern"):
        misread = updates_in(load_unet(tmp_path / "any.safetensors"))
    assert max(relative(misread[name], after[name]) for name in after) > 0.1
    assert check(open_adapter(tmp_path / "any.safetensors"), "comfyui") == []


class _Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 10, 1)
        self.last = nn.Linear(10, 6)

    def forward(self, image):
        return self.last(self.second(self.first(image).relu()).mean((-1, -2)))


@pytest.mark.parametrize("options", [{}, {"use_tucker": True}, {"rs_lora": True}], ids=["locon", "tucker", "rs_lora"])
@torch.no_grad()
def test_lycoris_gives_the_output_of_the_exact_truncation(tmp_path, options):
    lycoris = pytest.importorskip("lycoris")

    def network():
        torch.manual_seed(0)
        return _Network()

    lycoris.LycorisNetwork.apply_preset({"target_name": [".*"], "target_module": []})
    made = lycoris.create_lycoris(
        network(), 1.0, linear_dim=4, linear_alpha=2.0, conv_dim=4, conv_alpha=2.0, algo="lora", **options
    )
    made.apply_to()
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.5
    source = tmp_path / "in.safetensors"
    save(source, dict(made.state_dict()))

    def output(file, *, truncated_to=None):
        model = network()
        if truncated_to is None:
            lycoris.create_lycoris_from_weights(1.0, str(file), model)[0].merge_to(1.0)
        else:
            for name, dense in kohya_updates(file).items():
                weight = model.get_submodule(name.removeprefix("lycoris_")).weight
                weight += truncation(dense, truncated_to).reshape(weight.shape)
        return model(torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)))

    assert len(open_adapter(source).layers) == 3
    compress_adapter(source, tmp_path / "out.safetensors", 2)
    assert relative(output(source), output(source, truncated_to=4)) < 1e-5  # read as LyCORIS reads it
    assert relative(output(tmp_path / "out.safetensors"), output(source, truncated_to=2)) < 1e-5


# --- errors -------------------------------------------------------------------------------------------------------


def broken(change):
    tensors = kohya_pair(A, 20, 8, 16, alpha=4.0)
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.pop(f"{A}.lora_up.weight"), AdapterError, f"{A}.lora_up.weight"),
        (lambda t: t.pop(f"{A}.lora_down.weight"), AdapterError, f"{A}.lora_down.weight"),
        (lambda t: t.update({f"{A}.lora_up.weight": torch.ones(20, 7)}), AdapterError, "do not fit"),
        (lambda t: t.update({f"{A}.lora_up.weight": torch.ones(20)}), AdapterError, r"shape \[20\]"),
        (lambda t: t.update({f"{A}.lora_mid.weight": torch.ones(8, 8, 3, 3)}), AdapterError, "lora_mid"),
        (lambda t: t.update({f"{A}.alpha": torch.ones(3)}), AdapterError, "alpha"),
        (lambda t: t.update({f"{A}.alpha": torch.tensor(float("nan"))}), AdapterError, "alpha"),
        (lambda t: t.update({f"{A}.alpha": torch.tensor(True)}), AdapterError, "BOOL"),
        (lambda t: t.update({f"{A}.lora_down.weight": torch.ones(8, 16, dtype=torch.int8)}), AdapterError, "I8"),
        (lambda t: t.update({f"{B}.hada_w1_a": torch.ones(2, 2)}), UnsupportedAdapter, "LoHa, which is not LoRA"),
        (lambda t: t.update({f"{B}.lokr_w1": torch.ones(2, 2)}), UnsupportedAdapter, "LoKr, which is not LoRA"),
        (lambda t: t.update({f"{A}.lora_down.weight": torch.full((8, 16), float("inf"))}), AdapterError, A),
    ],
)
def test_errors_name_file_and_key(tmp_path, change, error, words):
    file = save(tmp_path / "in.safetensors", broken(change))
    with pytest.raises(error, match=words) as caught:
        compress_adapter(file, tmp_path / "out.safetensors", 2)
    assert str(file) in str(caught.value) or "layer" in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors"}


def test_damaged_files_are_named(tmp_path):
    file = save(tmp_path / "in.safetensors", *three_modules())
    content = file.read_bytes()
    for damaged in (content[:-100], content[:20], b"", struct.pack("<Q", 1 << 60) + content[8:]):
        file.write_bytes(damaged)
        with pytest.raises(AdapterError, match=r"in\.safetensors"):
            open_adapter(file)


def test_files_without_lora_and_folders_with_several_files_are_refused(tmp_path):
    save(tmp_path / "model.safetensors", {"weight": torch.ones(2, 2)})
    with pytest.raises(AdapterError, match="no adapter"):
        open_adapter(tmp_path / "model.safetensors")
    save(tmp_path / "other.safetensors", {"weight": torch.ones(2, 2)})
    with pytest.raises(AdapterError, match="holds 2"):
        open_adapter(tmp_path)


def test_the_name_of_a_file_does_not_say_what_it_is(tmp_path):
    file = save(tmp_path / "adapter_model.safetensors", *three_modules())
    assert open_adapter(file).format == open_adapter(tmp_path).format == "kohya"


def test_a_dtype_that_nobody_knows_names_file_and_key(tmp_path):
    file = save(tmp_path / "in.safetensors", {"odd": torch.ones(2), "weight": torch.ones(2, dtype=torch.float16)})
    file.write_bytes(file.read_bytes().replace(b'"F16"', b'"X16"'))
    with pytest.raises(AdapterError, match=r"in\.safetensors: 'weight' has dtype X16"):
        open_adapter(file)


def test_unknown_tensors_are_kept_and_reported(tmp_path):
    source = save(tmp_path / "in.safetensors", *three_modules(), {"emb_params": torch.ones(3, dtype=torch.int16)})
    result = compress_adapter(source, tmp_path / "out.safetensors", 2)
    assert any("emb_params" in note for note in result.notes)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["emb_params"], torch.ones(3, dtype=torch.int16))


# --- the output is a file -----------------------------------------------------------------------------------------


def test_outputs_that_cannot_be(tmp_path):
    source = save(tmp_path / "in.safetensors", *three_modules())
    (tmp_path / "folder").mkdir()
    for output, words in {
        "in.safetensors": "same file",
        "folder": "is a folder",
        "out": r"must end in \.safetensors",
        "in.safetensors/out.safetensors": "inside the source",
    }.items():
        with pytest.raises(OutputError, match=words):
            compress_adapter(source, tmp_path / output, 2, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "in.safetensors"]


def test_an_existing_file_is_replaced_only_if_asked_and_only_by_a_whole_one(tmp_path):
    source = save(tmp_path / "in.safetensors", *three_modules())
    out = save(tmp_path / "out.safetensors", kohya_pair(A, 20, 8, 16), {})
    mine = out.read_bytes()
    with pytest.raises(OutputError, match="already exists"):
        compress_adapter(source, out, 2)
    bad = save(tmp_path / "bad.safetensors", kohya_pair(A, 20, 8, 16), {})
    content = bytearray(bad.read_bytes())
    content[-4:] = struct.pack("<f", float("nan"))
    bad.write_bytes(content)
    with pytest.raises(AdapterError):
        compress_adapter(bad, out, 2, overwrite=True)
    assert out.read_bytes() == mine
    compress_adapter(source, out, 2, overwrite=True)
    assert open_adapter(out).rank == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors", "in.safetensors", "out.safetensors"]
