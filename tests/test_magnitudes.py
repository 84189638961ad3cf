"""DoRA's magnitudes fitted with the base weights: against dense float64 algebra, and as PEFT and LyCORIS apply them."""

import json

import pytest
import torch
from adapters import (
    CONVOLUTIONS,
    GPT2,
    LLAMA,
    LLAMA_EMBEDDING,
    PREFIX,
    WEIGHTS,
    edit_tensors,
    effect,
    lora_modules,
    make_adapter,
    relative,
    snapshot,
    write_raw,
)
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from lora_squeeze import Ranks, compress_adapter, open_adapter, squeeze, verify
from lora_squeeze.cli import main
from lora_squeeze.errors import AdapterError, SettingsError, UnsupportedAdapter

BASES = {"linear": LLAMA, "fan_in_fan_out": GPT2, "convolutions and embeddings": CONVOLUTIONS}


def save_base(base, folder, *, dtype=torch.float32, names=lambda name: name):
    """The base model's weights, a file a folder, as transformers names them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {names(name): tensor.to(dtype).contiguous() for name, tensor in base.build().state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def merged(base, folder):
    """Module → the weight that PEFT applies, its rows what the norms belong to, in float64."""
    model = PeftModel.from_pretrained(base.build(), str(folder)).double()
    adapted = dict(lora_modules(model))
    model.merge_adapter()
    return {name: as_rows(module) for name, module in adapted.items()}


def as_rows(module):
    weight = module.get_base_layer().weight.data.double()
    transposed = isinstance(module.get_base_layer(), nn.Embedding) or getattr(module, "fan_in_fan_out", False)
    return weight.T if transposed else weight.flatten(1)


def distance(base, one, other):
    """‖D − D'‖ / ‖D − W‖ over all layers of two adapters, densely."""
    first, second = merged(base, one), merged(base, other)
    model = PeftModel.from_pretrained(base.build(), str(one)).double()
    weights = {name: as_rows(module) for name, module in lora_modules(model)}
    lost, update = (
        sum(float((first[name] - against[name]).square().sum()) for name in first) for against in (second, weights)
    )
    return (lost / update) ** 0.5


@pytest.fixture(params=BASES.values(), ids=BASES)
def case(request, tmp_path):
    base = request.param
    source = make_adapter(tmp_path / "adapter", base, use_dora=True)
    return base, source, save_base(base, tmp_path / "base")


def test_every_row_is_the_projection_of_the_old_weight_on_the_new_direction(case, tmp_path):
    base, source, weights = case
    compress_adapter(source, tmp_path / "kept", 2)
    compress_adapter(source, tmp_path / "out", 2, base=weights)

    before, kept, after = merged(base, source), merged(base, tmp_path / "kept"), merged(base, tmp_path / "out")
    for name, old in before.items():
        new = torch.nn.functional.normalize(kept[name], dim=1)
        best = (old * new).sum(1, keepdim=True) * new
        assert relative(after[name], best) < 1e-6
        assert relative(after[name], old) < relative(kept[name], old)


def test_the_errors_reported_are_those_of_the_weights_that_peft_applies(case, tmp_path):
    base, source, weights = case
    compress_adapter(source, tmp_path / "kept", 2)
    compression = compress_adapter(source, tmp_path / "out", 2, base=weights)

    assert compression.dora.layers == len(compression.layers)
    assert compression.dora.relative_error == pytest.approx(distance(base, source, tmp_path / "out"), rel=1e-4)
    assert compression.dora.relative_error_if_kept == pytest.approx(distance(base, source, tmp_path / "kept"), rel=1e-4)
    assert json.loads(compression.to_json())["dora"]["layers"] == len(compression.layers)
    assert any("fitted" in note for note in compression.notes)
    assert not any("kept" in note for note in compression.notes)


def test_only_the_magnitudes_differ_from_what_is_written_without_the_base(case, tmp_path):
    _, source, weights = case
    compress_adapter(source, tmp_path / "kept", 2)
    compress_adapter(source, tmp_path / "out", 2, base=weights)
    kept, fitted = load_file(tmp_path / "kept" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert {key for key, tensor in kept.items() if not torch.equal(fitted[key], tensor)} == {
        key for key in kept if "magnitude" in key
    }
    assert all((fitted[key].dtype, fitted[key].shape) == (tensor.dtype, tensor.shape) for key, tensor in kept.items())


def test_layers_that_keep_their_rank_keep_every_bit(case, tmp_path):
    _, source, weights = case
    adapter = open_adapter(source)
    first = next(iter(adapter.layers))
    plan = Ranks("mine", {name: 8 if name == first else 2 for name in adapter.layers})
    squeeze(adapter, plan, tmp_path / "out", base=weights)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    own = [key for key in before if key.startswith(f"{PREFIX}{first}.")]
    assert len(own) == 3
    assert all(torch.equal(before[key], after[key]) for key in own)

    compression = compress_adapter(source, tmp_path / "all", 8, base=weights)
    assert compression.dora.relative_error < 1e-7
    assert all(torch.equal(tensor, load_file(tmp_path / "all" / WEIGHTS)[key]) for key, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision(tmp_path, dtype):
    source = make_adapter(tmp_path / "adapter", LLAMA, use_dora=True, dtype=dtype)
    weights = save_base(LLAMA, tmp_path / "base", dtype=dtype)
    compression = compress_adapter(source, tmp_path / "out", 3, base=weights)
    assert 0 < compression.dora.relative_error < 1
    magnitudes = {key: t for key, t in load_file(tmp_path / "out" / WEIGHTS).items() if "magnitude" in key}
    assert {tensor.dtype for tensor in magnitudes.values()} == {dtype}


def test_replicated_layers_are_found_under_their_own_names(tmp_path):
    lora = {"use_dora": True, "layer_replication": [[0, 2], [1, 2]]}
    source, weights = make_adapter(tmp_path / "adapter", LLAMA, **lora), save_base(LLAMA, tmp_path / "base")
    kept, fitted = (
        compress_adapter(source, tmp_path / name, 2, base=base) for name, base in (("kept", None), ("fitted", weights))
    )
    assert kept.dora is None
    assert fitted.dora.relative_error < fitted.dora.relative_error_if_kept
    exact = effect(LLAMA, source)
    kept_effect, fitted_effect = (effect(LLAMA, tmp_path / name) for name in ("kept", "fitted"))
    assert relative(fitted_effect, exact) < 1.05 * relative(kept_effect, exact)


# --- where the weights are ----------------------------------------------------------------------------------------


def test_a_sharded_model_a_single_file_and_a_folder_give_the_same(tmp_path):
    source = make_adapter(tmp_path / "adapter", LLAMA, use_dora=True)
    folder = save_base(LLAMA, tmp_path / "base")
    LLAMA.build().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    written = []
    for number, base in enumerate((folder, folder / "model.safetensors", tmp_path / "sharded")):
        compress_adapter(source, tmp_path / str(number), 2, base=base)
        written.append((tmp_path / str(number) / WEIGHTS).read_bytes())
    assert len(set(written)) == 1


NAMES = {
    "without the class's prefix": lambda name: name.removeprefix("model."),
    "with another prefix": lambda name: f"language_model.{name}",
    "in another order": lambda name: name.replace("model.layers", "model.language_model.layers"),
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_names_that_differ_at_the_beginning_are_found(tmp_path, names):
    source = make_adapter(tmp_path / "adapter", LLAMA, use_dora=True)
    compress_adapter(source, tmp_path / "a", 2, base=save_base(LLAMA, tmp_path / "base"))
    compress_adapter(source, tmp_path / "b", 2, base=save_base(LLAMA, tmp_path / "other", names=names))
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_weights_are_read_a_block_at_a_time(tmp_path, monkeypatch):
    source, weights = make_adapter(tmp_path / "a", LLAMA_EMBEDDING, use_dora=True), save_base(LLAMA, tmp_path / "base")
    compress_adapter(source, tmp_path / "whole", 2, base=weights)
    monkeypatch.setattr("lora_squeeze.formats.base_weights._BLOCK_BYTES", 700)
    compress_adapter(source, tmp_path / "blocks", 2, base=weights)
    whole, blocks = load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "blocks" / WEIGHTS)
    assert all(torch.allclose(blocks[key], tensor, rtol=1e-6) for key, tensor in whole.items())


# --- errors -------------------------------------------------------------------------------------------------------


def change(tensors, key, value):
    tensors[key] = value


Q0 = "model.layers.0.self_attn.q_proj"
BROKEN = {
    "a weight is missing": (lambda t: t.pop(f"{Q0}.weight"), f"no weight of '{Q0}' .it has 'lm_head'"),
    "another model": (lambda t: change(t, f"{Q0}.weight", torch.ones(16, 32)), r"q_proj.*\[16, 32\].*32 outputs"),
    "8-bit": (lambda t: change(t, f"{Q0}.weight", torch.ones(32, 32, dtype=torch.int8)), "I8.*quantised"),
    "GPTQ": (lambda t: change(t, f"{Q0}.qweight", t.pop(f"{Q0}.weight").int()), "only quantised ones"),
    "names that are not unique": (
        lambda t: t.update({f"{one}.{Q0}.weight": t[f"{Q0}.weight"] for one in "ab"}) or t.pop(f"{Q0}.weight"),
        f"'{Q0}' could be a.{Q0} or b.{Q0}",
    ),
}


@pytest.mark.parametrize(("how", "message"), BROKEN.values(), ids=BROKEN)
def test_weights_that_do_not_fit_are_named_before_anything_is_written(tmp_path, how, message):
    source = make_adapter(tmp_path / "adapter", LLAMA, use_dora=True)
    file = save_base(LLAMA, tmp_path / "base") / "model.safetensors"
    tensors = load_file(file)
    how(tensors)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file)
    with pytest.raises(AdapterError, match=message):
        compress_adapter(source, tmp_path / "out", 2, base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_folders_without_weights_and_damaged_indices_are_named(tmp_path):
    source = make_adapter(tmp_path / "adapter", LLAMA, use_dora=True)
    (tmp_path / "empty").mkdir()
    for base, words in ((tmp_path / "nowhere", "no such file"), (tmp_path / "empty", "holds no .safetensors")):
        with pytest.raises(AdapterError, match=words):
            compress_adapter(source, tmp_path / "out", 2, base=base)
    for text in ("{", "[]", '{"weight_map": 3}'):
        (tmp_path / "empty" / "model.safetensors.index.json").write_text(text)
        with pytest.raises(AdapterError, match=r"index\.json.*no index"):
            compress_adapter(source, tmp_path / "out", 2, base=tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shard.safetensors"}}')
    with pytest.raises(AdapterError, match=r"shard\.safetensors: no such file"):
        compress_adapter(source, tmp_path / "out", 2, base=tmp_path / "empty")


def test_base_weights_for_an_adapter_without_magnitudes_are_an_error(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    with pytest.raises(SettingsError, match="no DoRA magnitudes"):
        compress_adapter(source, tmp_path / "out", 2, base=save_base(LLAMA, tmp_path / "base"))


def test_magnitudes_of_another_shape_and_of_parts_are_refused(tmp_path):
    tensors = {"layer.lora_A.weight": torch.ones(4, 5), "layer.lora_B.weight": torch.ones(6, 4)}
    source = write_raw(tmp_path / "a", {**tensors, "layer.lora_magnitude_vector": torch.ones(5)}, use_dora=True)
    save_file({"layer.weight": torch.ones(6, 5)}, tmp_path / "base.safetensors")
    with pytest.raises(AdapterError, match=r"lora_magnitude_vector.*\[5\].*6 outputs"):
        compress_adapter(source, tmp_path / "out", 2, base=tmp_path / "base.safetensors")
    grouped = {"conv.lora_A.weight": torch.ones(4, 3, 3), "conv.lora_B.weight": torch.ones(6, 2, 1)}
    source = write_raw(tmp_path / "b", {**grouped, "conv#0.lora_magnitude_vector": torch.ones(6)}, use_dora=True)
    with pytest.raises(UnsupportedAdapter, match="part of a module"):
        compress_adapter(source, tmp_path / "out", 1, base=tmp_path / "base.safetensors")


# --- the command line ---------------------------------------------------------------------------------------------


def test_command_and_settings(tmp_path):
    source, base = make_adapter(tmp_path / "adapter", LLAMA, use_dora=True), save_base(LLAMA, tmp_path / "base")
    arguments = ["compress", str(source), str(tmp_path / "out"), "--rank", "2", "--base", str(base)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "DoRA's weights" in result.output
    assert "with the magnitudes kept" in result.output

    file = tmp_path / "squeeze.toml"
    paths = f"adapter_path = '{source}'\noutput_path = '{tmp_path / 'toml'}'\nbase_path = '{base}'"
    file.write_text(f"[squeeze]\n{paths}\ncompress_to = 2\n")
    result = CliRunner().invoke(main, ["run", str(file)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "toml" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_fitted_magnitudes_are_stated_and_verified_against_the_source(tmp_path):
    weights = save_base(LLAMA, tmp_path / "base")
    source = make_adapter(tmp_path / "adapter", use_dora=True)
    compress_adapter(source, tmp_path / "out", 2, base=weights)
    verification = verify(tmp_path / "out", source)
    assert verification.passed, verification.checks
    (carried,) = [check for check in verification.checks if check.name == "carried over"]
    assert "6 magnitudes fitted to the base weights" in carried.found

    compress_adapter(source, tmp_path / "kept", 2)
    edit_tensors(tmp_path / "kept", lambda tensors: tensors[next(k for k in tensors if "magnitude" in k)].mul_(2))
    assert not verify(tmp_path / "kept", source).passed  # nothing was fitted there
