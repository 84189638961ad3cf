"""verify: a file is what its header says, or the check that fails says why."""

import json
import shutil

import pytest
import torch
from adapters import CONFIG, LLAMA, PREFIX, WEIGHTS, edit_config, make_adapter, pair, updates, write_raw
from click.testing import CliRunner
from images import kohya_pair, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_squeeze import (
    compress,
    compress_adapter,
    decompose,
    open_adapter,
    save_adapter,
    squeeze,
    verify,
)
from lora_squeeze.cli import main
from lora_squeeze.conversion import convert
from lora_squeeze.errors import AdapterError
from lora_squeeze.merging import merge
from lora_squeeze.policies import energy
from lora_squeeze.provenance import provenance_of
from lora_squeeze.records import Ranks, Verification
from lora_squeeze.verbs import full_rank


def failed(verification: Verification) -> dict[str, str]:
    assert verification.passed == all(check.passed for check in verification.checks)
    return {check.name: check.found for check in verification.checks if not check.passed}


def change(file, edit, **metadata):
    """Edit a file's tensors; its header stays as it was, but for these entries."""
    with safe_open(file, framework="pt") as opened:
        header = {**opened.metadata(), **metadata}
    tensors = load_file(file)
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata=header)


@pytest.fixture
def source(tmp_path):
    return make_adapter(tmp_path / "source", alpha_pattern={"v_proj": 3}, modules_to_save=["lm_head"])


@pytest.fixture
def output(tmp_path, source):
    compress_adapter(source, tmp_path / "out", 3)
    return tmp_path / "out"


def test_what_was_written_passes_alone_and_against_its_source(source, output):
    alone, both = verify(output), verify(output, source)
    assert failed(alone) == failed(both) == {}
    assert alone.loss is None
    assert {check.name for check in alone.checks} < {check.name for check in both.checks}


def test_the_loss_is_that_of_the_dense_updates(source, output):
    loss = verify(output, source).loss
    before, after = updates(LLAMA, source), updates(LLAMA, output)
    for layer in loss.layers:
        name = layer.spectrum.name
        error = float((before[name] - after[name]).norm() / before[name].norm())
        assert layer.relative_error == pytest.approx(error, rel=1e-5)
        assert layer.rank == 3
    total = sum(matrix.norm() ** 2 for matrix in before.values())
    lost = sum((before[name] - after[name]).norm() ** 2 for name in before)
    assert loss.relative_error == pytest.approx(float((lost / total) ** 0.5), rel=1e-5)


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16"])
def test_the_loss_is_the_one_that_compress_reported(tmp_path, source, dtype):
    written = compress_adapter(source, tmp_path / "out", 3, dtype=dtype)
    loss = verify(tmp_path / "out", source).loss
    assert loss.relative_error == pytest.approx(written.relative_error, rel=1e-4)
    assert [layer.relative_error for layer in loss.layers] == pytest.approx(
        [layer.relative_error for layer in written.layers], rel=1e-3
    )


def test_a_changed_number_is_found(source, output):
    change(output / WEIGHTS, lambda tensors: next(iter(tensors.values())).view(-1)[:1].add_(1e-3))
    assert set(failed(verify(output))) == {"tensors"}


def test_another_order_in_the_file_is_no_change(output):
    file = output / WEIGHTS
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    save_file(dict(reversed(load_file(file).items())), file, metadata=header)
    assert failed(verify(output)) == {}


def test_nan_is_found_and_named(source, output):
    change(output / WEIGHTS, lambda tensors: tensors[f"{PREFIX}{LAYER}.lora_A.weight"].fill_(torch.nan))
    found = failed(verify(output, source))
    assert found.keys() == {"finite", "tensors"}
    assert LAYER in found["finite"]


LAYER = "model.layers.0.self_attn.q_proj"


def test_another_scale_is_found_and_named(source, output):
    edit_config(output, lora_alpha=1)
    assert failed(verify(output)).keys() == {"scales"}
    assert failed(verify(output, source)).keys() == {"scales", "error"}


def test_another_rank_in_the_header_is_found(output):
    with safe_open(output / WEIGHTS, framework="pt") as opened:
        stated = json.loads(opened.metadata()["lora_squeeze"])
    change(output / WEIGHTS, lambda _: None, lora_squeeze=json.dumps({**stated, "ranks": 5}))
    assert "the header says 5" in failed(verify(output))["ranks"]
    change(output / WEIGHTS, lambda _: None, lora_squeeze=json.dumps({**stated, "ranks": 2}))
    assert "the header says 2" in failed(verify(output))["ranks"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"ranks": "many"}', "[" * 5000])
def test_a_damaged_provenance_is_found(output, text):
    change(output / WEIGHTS, lambda _: None, lora_squeeze=text)
    assert failed(verify(output)).keys() == {"provenance"}


def test_an_adapter_that_was_not_squeezed_has_no_provenance(source):
    assert failed(verify(source)).keys() == {"provenance"}
    assert verify(source, source).loss.relative_error == 0


def test_another_source_is_found(tmp_path, output):
    other = make_adapter(tmp_path / "other", seed=1, alpha_pattern={"v_proj": 3}, modules_to_save=["lm_head"])
    found = failed(verify(output, other))
    assert found.keys() == {"source", "carried over"}
    assert "lm_head" in found["carried over"]


def test_a_source_of_other_shapes_is_found(tmp_path, output):
    other = write_raw(tmp_path / "other", pair(LAYER, 6, 4, 5))
    verification = verify(output, other)
    assert verification.loss is None
    assert "not in the source" in failed(verification)["layers"]


def test_a_changed_tensor_beside_the_factors_is_found(source, output):
    key = next(key for key in load_file(output / WEIGHTS) if "lm_head" in key)
    change(output / WEIGHTS, lambda tensors: tensors[key].neg_())
    found = failed(verify(output, source))
    assert found.keys() == {"tensors", "carried over"}
    assert key in found["carried over"]


def test_a_changed_field_of_the_configuration_is_found(source, output):
    edit_config(output, task_type="SEQ_CLS")
    assert failed(verify(output, source)) == {"configuration": "not as in the source: 'task_type'"}


def test_layers_left_out_count_as_lost(tmp_path, source):
    decomposition = decompose(open_adapter(source))
    plan = energy(decomposition.spectra, 0.3)
    plan = Ranks("by hand", {**plan.by_layer, LAYER: 0})
    for start in (decomposition, decomposition.adapter):
        written = squeeze(start, plan, tmp_path / "out", overwrite=True)
        verification = verify(tmp_path / "out", source)
        assert failed(verification) == {}
        assert verification.loss.relative_error == pytest.approx(written.relative_error, rel=1e-6)
        (gone,) = [layer for layer in verification.loss.layers if layer.spectrum.name == LAYER]
        assert (gone.rank, gone.relative_error) == (0, 1.0)


def test_layers_padded_for_a_runtime_have_the_rank_that_is_stated(tmp_path):
    source = write_raw(tmp_path / "source", {**pair("a.q_proj", 6, 4, 5), **pair("a.v_proj", 7, 4, 5)})
    plan = Ranks("by hand", {"a.q_proj": 2, "a.v_proj": 3})
    squeeze(open_adapter(source), plan, tmp_path / "out", runtime="sglang")
    assert open_adapter(tmp_path / "out").layers["a.q_proj"].rank in (2, 3)
    assert failed(verify(tmp_path / "out", source)) == {}


def test_a_source_that_was_squeezed_in_turn_is_an_ancestor(tmp_path, source, output):
    compress_adapter(output, tmp_path / "again", 2)
    assert failed(verify(tmp_path / "again", output)) == {}
    assert failed(verify(tmp_path / "again", source)) == {}


@pytest.mark.parametrize("chain", ["squeezed twice", "squeezed, then converted", "merged, then converted"])
def test_what_is_saved_only_at_the_end_of_a_chain_says_all_that_was_done(tmp_path, chain):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    path = save(tmp_path / "in.safetensors", kohya_pair(name, 8, 4, 6, alpha=2.0))
    source = open_adapter(path)
    first = merge([source, source]) if chain.startswith("merged") else compress(source, Ranks("first=3", {name: 3}))
    last = compress(first, Ranks("second=2", {name: 2})) if chain == "squeezed twice" else convert(first, "diffusers")
    save_adapter(last, tmp_path / "out.safetensors")

    written = open_adapter(tmp_path / "out.safetensors")
    made = provenance_of(written)
    assert (
        made.policy
        == {
            "squeezed twice": "first=3; second=2",
            "squeezed, then converted": "first=3; convert to diffusers",
            "merged, then converted": "convert to diffusers",
        }[chain]
    )
    assert made.ancestors == ()
    if chain == "merged, then converted":
        (digest,) = {part["sha256"] for part in json.loads(written.metadata["lora_squeeze_merge"])}
        assert digest == source.sha256()
    else:
        assert made.source_sha256 == source.sha256()
        assert failed(verify(tmp_path / "out.safetensors", path)) == {}


@pytest.fixture
def parts(tmp_path):
    return [make_adapter(tmp_path / name, seed=seed, r=r) for name, seed, r in (("a", 1, 8), ("b", 2, 4), ("c", 3, 8))]


@pytest.fixture
def merged(tmp_path, parts):
    found = merge([open_adapter(part) for part in parts[:2]], (0.7, -0.3))
    squeeze(found, full_rank(found), tmp_path / "merged")
    return tmp_path / "merged"


def test_a_merge_is_verified_against_each_of_its_sources(tmp_path, parts, merged):
    compress_adapter(merged, tmp_path / "squeezed", 2)
    for output in (merged, tmp_path / "squeezed"):
        for source, weight in zip(parts, ("0.7", "-0.3"), strict=False):
            verification = verify(output, source)
            assert failed(verification) == {}
            assert f"one of 2 that were merged, with weight {weight};" in verification.checks[-1].found
            assert verification.loss is None
            assert {check.name for check in verification.checks}.isdisjoint({"layers", "carried over", "error"})
        found = failed(verify(output, parts[2]))
        assert found.keys() == {"source"}
        assert "this is a merge of" in found["source"]
    against_the_sum = verify(tmp_path / "squeezed", merged)
    assert failed(against_the_sum) == {}
    assert against_the_sum.loss is not None
    result = CliRunner().invoke(main, ["verify", str(merged), str(parts[0]), "--layers"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("text", ['[{"sha256": "00", "weight": 1}]', "[1]", "", "{}"])
def test_a_statement_of_sources_that_was_changed_is_none(parts, merged, text):
    change(merged / WEIGHTS, lambda _: None, lora_squeeze_merge=text)
    assert "source" in failed(verify(merged, parts[0]))


def test_a_saved_copy_keeps_its_provenance(tmp_path, source, output):
    save_adapter(open_adapter(output), tmp_path / "copy")
    assert failed(verify(tmp_path / "copy", source)) == {}


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_every_format_and_every_conversion(tmp_path, to):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    source = save(tmp_path / "in.safetensors", kohya_pair(name, 8, 4, 6, alpha=2.0))
    squeezed = tmp_path / "squeezed.safetensors"
    compress_adapter(source, squeezed, 2)
    assert failed(verify(squeezed, source)) == {}
    converted = tmp_path / ("peft" if to == "peft" else "converted.safetensors")
    save_adapter(convert(open_adapter(squeezed), to), converted)
    assert failed(verify(converted)) == {}
    if to != "kohya":  # that is a copy, with the provenance of the file it is copied from
        assert failed(verify(converted, squeezed)) == {}
    verification = verify(converted, source)
    assert failed(verification) == {}
    assert verification.loss.relative_error == pytest.approx(verify(squeezed, source).loss.relative_error, rel=1e-5)


def test_the_command_prints_checks_and_exits_with_their_verdict(source, output):
    good = CliRunner().invoke(main, ["verify", str(output), str(source)])
    assert good.exit_code == 0
    assert "FAILED" not in good.stdout
    assert "Retained variance" in good.stdout
    edit_config(output, lora_alpha=1)
    bad = CliRunner().invoke(main, ["verify", str(output)])
    assert bad.exit_code == 1
    assert "FAILED  scales" in bad.stdout


def test_the_command_prints_json(source, output):
    result = CliRunner().invoke(main, ["verify", str(output), str(source), "--json"])
    record = json.loads(result.stdout)
    assert (record["record"], record["passed"]) == ("Verification", True)
    assert record["retained_variance"] == pytest.approx(1 - record["relative_error"] ** 2)
    assert len(record["loss"]["layers"]) == len(open_adapter(source).layers)
    assert all(check["passed"] for check in record["checks"])


def test_a_file_that_cannot_be_opened_is_an_error(output):
    (output / WEIGHTS).write_bytes((output / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(AdapterError, match="not a sound safetensors file"):
        verify(output)
    shutil.rmtree(output)
    result = CliRunner().invoke(main, ["verify", str(output)])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")


def test_the_config_file_is_not_what_the_hash_is_of(output):
    (output / CONFIG).write_text((output / CONFIG).read_text() + "\n")
    assert failed(verify(output)) == {}
