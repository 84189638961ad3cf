"""Weighted sums of adapters: exact, lazy, like the first; refused by name where there is no sum."""

import json

import pytest
import torch
from adapters import (
    BASES,
    CONVOLUTIONS,
    GPT2,
    LLAMA,
    LLAMA_EMBEDDING,
    WEIGHTS,
    edit_config,
    edit_tensors,
    effect,
    load,
    lora_modules,
    make_adapter,
    pair,
    read_config,
    relative,
    truncation,
    updates,
    write_raw,
)
from click.testing import CliRunner
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from lora_squeeze import decompose, fixed, open_adapter, save_adapter, squeeze
from lora_squeeze.cli import main
from lora_squeeze.conversion import convert
from lora_squeeze.errors import AdapterError, LoraSqueezeError, OutputError, SettingsError, UnsupportedAdapter
from lora_squeeze.formats.hashing import sha256_of_file
from lora_squeeze.merging import merge
from lora_squeeze.provenance import provenance_of
from lora_squeeze.verbs import choose_ranks, full_rank
from lora_squeeze.verification import verify


def two(tmp_path, base=LLAMA, *, second=None, **lora):
    """Two adapters of different rank, alpha and weights."""
    first = make_adapter(tmp_path / "a", base, seed=1, **lora)
    return first, make_adapter(tmp_path / "b", base, seed=2, **{"r": 4, "lora_alpha": 4, **lora, **(second or {})})


def write(adapters, output, *, weights=None, rank=None, **options):
    merged = merge([open_adapter(path) for path in adapters], weights, **options)
    plan = full_rank(merged) if rank is None else fixed(merged.layers.values(), rank)
    return squeeze(merged, plan, output)


def dense_sum(base, adapters, weights):
    parts = [updates(base, path) for path in adapters]
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: sum(weight * part[name] for weight, part in zip(weights, parts, strict=True) if name in part)
        for name in names
    }


def dense_product(module, adapter):
    return module.lora_B[adapter].weight.detach().double() @ module.lora_A[adapter].weight.detach().double()


@pytest.mark.parametrize("name", BASES)
def test_at_full_rank_it_is_the_sum(tmp_path, name):
    base = BASES[name]
    adapters = two(tmp_path, base)
    write(adapters, tmp_path / "out", weights=(0.7, -0.3), keep_first=True)
    expected, found = dense_sum(base, adapters, (0.7, -0.3)), updates(base, tmp_path / "out")
    assert found.keys() == expected.keys()
    assert max(relative(found[layer], expected[layer]) for layer in found) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_at_a_lower_rank_it_is_the_truncation_of_the_dense_sum(tmp_path, dtype):
    adapters = two(tmp_path, dtype=dtype)
    compression = write(adapters, tmp_path / "out", weights=(0.7, 0.3), rank=3)
    found, tolerance = updates(LLAMA, tmp_path / "out"), 1e-2 if dtype is torch.bfloat16 else 1e-6
    for layer, dense in dense_sum(LLAMA, adapters, (0.7, 0.3)).items():
        assert relative(found[layer], truncation(dense, 3)) < tolerance
    errors = {one.spectrum.name: one.relative_error for one in compression.layers}
    for layer, dense in dense_sum(LLAMA, adapters, (0.7, 0.3)).items():
        assert errors[layer] == pytest.approx(relative(found[layer], dense), rel=1e-4)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {dtype}


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}], ids=str)
def test_it_agrees_with_pefts_own_weighted_adapter(tmp_path, lora):
    first, second = two(tmp_path, second={"rank_pattern": {"v_proj": 2}}, **lora)
    model = PeftModel.from_pretrained(LLAMA.build(), str(first), adapter_name="a")
    model.load_adapter(str(second), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "sum", combination_type="svd", svd_rank=5)
    # Without its scale: that is meant to be 1, but PEFT leaves it at √rank for rsLoRA.
    theirs = {name: dense_product(module, "sum") for name, module in lora_modules(model)}

    write((first, second), tmp_path / "out", weights=(0.7, 0.3), rank=5)

    ours = updates(LLAMA, tmp_path / "out")
    assert ours.keys() == theirs.keys()
    assert max(relative(ours[layer], theirs[layer]) for layer in ours) < 1e-5


def test_the_default_is_the_average(tmp_path):
    adapters = (*two(tmp_path), make_adapter(tmp_path / "c", seed=3, r=2))
    write(adapters, tmp_path / "out")
    expected, found = dense_sum(LLAMA, adapters, (1 / 3,) * 3), updates(LLAMA, tmp_path / "out")
    assert max(relative(found[layer], expected[layer]) for layer in found) < 1e-6
    assert {spec.rank for spec in open_adapter(tmp_path / "out").layers.values()} == {8 + 4 + 2}


def test_an_adapter_minus_itself_is_nothing_and_no_nan(tmp_path):
    source = make_adapter(tmp_path / "a")
    merged = merge([open_adapter(source)] * 2, (1, -1))
    spectra = decompose(merged).spectra
    scale = max(decompose(open_adapter(source)).spectra[0].singular_values)
    assert max(max(spectrum.singular_values) for spectrum in spectra) < 1e-7 * scale
    squeeze(merged, fixed(spectra, 2), tmp_path / "out")
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / WEIGHTS).values())


def test_the_sum_of_high_ranks_has_at_most_the_rank_of_its_matrices(tmp_path):
    adapters = (make_adapter(tmp_path / "a", r=24, seed=1), make_adapter(tmp_path / "b", r=24, seed=2))
    write(adapters, tmp_path / "out", weights=(1, 1))
    layers = open_adapter(tmp_path / "out").layers
    assert {spec.rank for spec in layers.values()} == {16, 32}  # v_proj has 16 outputs, the others at least 32
    expected, found = dense_sum(LLAMA, adapters, (1, 1)), updates(LLAMA, tmp_path / "out")
    assert max(relative(found[layer], expected[layer]) for layer in found) < 1e-6


def test_modules_that_only_some_adapt(tmp_path):
    first = make_adapter(tmp_path / "a", seed=1, target_modules=["q_proj"])
    second = make_adapter(tmp_path / "b", seed=2, target_modules=r".*layers\.1.*(q_proj|down_proj)")
    compression = write((first, second), tmp_path / "out", weights=(1, 2))
    expected, found = dense_sum(LLAMA, (first, second), (1, 2)), updates(LLAMA, tmp_path / "out")
    assert found.keys() == expected.keys()
    assert len(found) == 3
    assert max(relative(found[layer], expected[layer]) for layer in found) < 1e-6
    assert any("does not adapt 1 of the 3 layers" in note for note in compression.notes)
    # PEFT makes exactly these modules, and finds a tensor for each.
    assert set(read_config(tmp_path / "out")["target_modules"]) == set(found)
    assert {name for name, _ in lora_modules(load(LLAMA, tmp_path / "out"))} == set(found)


def test_embeddings_and_linear_layers_together(tmp_path):
    first = make_adapter(tmp_path / "a", LLAMA_EMBEDDING, seed=1, target_modules=["embed_tokens"])
    second = make_adapter(tmp_path / "b", LLAMA_EMBEDDING, seed=2, target_modules=["q_proj", "embed_tokens"], r=3)
    write((first, second), tmp_path / "out", weights=(1, 0.5))
    expected, found = dense_sum(LLAMA_EMBEDDING, (first, second), (1, 0.5)), updates(LLAMA_EMBEDDING, tmp_path / "out")
    assert found.keys() == expected.keys()
    assert max(relative(found[layer], expected[layer]) for layer in found) < 1e-6


def test_policies_choose_ranks_for_a_sum_as_for_any_adapter(tmp_path):
    merged = merge([open_adapter(path) for path in two(tmp_path)], (0.7, 0.3))
    decomposition = decompose(merged)
    ranks = choose_ranks(decomposition, "params=0.25")
    compression = squeeze(decomposition, ranks, tmp_path / "out")
    assert compression.parameters_after <= 0.25 * compression.parameters_before
    assert compression.parameters_before == sum(spec.parameters for spec in merged.layers.values())


def test_other_formats_become_that_of_the_first(tmp_path):
    names = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in")
    parts = [
        write_raw(
            tmp_path / f"peft {seed}", pair(names[0], 6, 4, 5, seed=seed) | pair(names[1], 7, 4, 8, seed=seed + 9)
        )
        for seed in (1, 2)
    ]
    save_adapter(convert(open_adapter(parts[1]), "kohya"), tmp_path / "b.safetensors")
    save_adapter(convert(open_adapter(parts[0]), "kohya"), tmp_path / "a.safetensors")
    for first, second in ((parts[0], tmp_path / "b.safetensors"), (tmp_path / "a.safetensors", parts[1])):
        merged = merge([open_adapter(first), open_adapter(second)], (1, 3))
        expected = merge([open_adapter(part) for part in parts], (1, 3))
        assert merged.format == open_adapter(first).format
        for ours, theirs in zip(merged.layers, expected.layers, strict=True):
            one, other = merged.load(ours), expected.load(theirs)
            assert relative(one.scale * one.up @ one.down, other.scale * other.up @ other.down) < 1e-6


def test_the_rest_is_the_firsts(tmp_path):
    first, second = two(tmp_path)
    (first / "tokenizer.json").write_text('{"of": "a"}')
    (second / "tokenizer.json").write_text('{"of": "b"}')
    edit_config(first, task_type="CAUSAL_LM", revision="main")
    write((first, second), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"of": "a"}'
    config = read_config(tmp_path / "out")
    assert config["revision"] == "main"
    assert sorted(config["target_modules"]) == sorted(read_config(first)["target_modules"])


def test_the_file_says_what_it_was_made_of(tmp_path):
    adapters = two(tmp_path)
    write(adapters, tmp_path / "out", weights=(0.75, 0.25), rank=2)
    with safe_open(tmp_path / "out" / WEIGHTS, "pt") as file:
        sources = json.loads(file.metadata()["lora_squeeze_merge"])
        squeezed = json.loads(file.metadata()["lora_squeeze"])
    assert sources == [
        {"sha256": sha256_of_file(path / WEIGHTS), "weight": weight}
        for path, weight in zip(adapters, (0.75, 0.25), strict=True)
    ]
    assert squeezed["policy"] == "fixed=2"
    assert set(squeezed["source_sha256"]) != {"0"}


def test_a_merge_is_verified_and_no_descendant_of_the_first(tmp_path):
    adapters = two(tmp_path)
    write(adapters[:1], tmp_path / "squeezed", rank=5)
    write((tmp_path / "squeezed", adapters[1]), tmp_path / "out", rank=4)
    verification = verify(tmp_path / "out")
    assert all(check.passed for check in verification.checks), verification
    assert provenance_of(open_adapter(tmp_path / "out")).ancestors == ()


def test_the_same_head_is_kept_and_a_differing_one_is_named(tmp_path):
    base = BASES["bert"]
    first, second = two(tmp_path, base)
    with pytest.raises(AdapterError, match=r"classifier.*differs between .*a and .*b.*--keep-first"):
        merge([open_adapter(first), open_adapter(second)])
    write((first, second), tmp_path / "out", keep_first=True)
    saved, own = load_file(tmp_path / "out" / WEIGHTS), load_file(first / WEIGHTS)
    heads = [key for key in own if "classifier" in key]
    assert heads
    assert all(torch.equal(saved[key], own[key]) for key in heads)
    edit_tensors(second, lambda tensors: tensors.update({key: own[key] for key in heads}))
    write((first, second), tmp_path / "same")
    assert all(torch.equal(load_file(tmp_path / "same" / WEIGHTS)[key], own[key]) for key in heads)


def test_a_head_that_only_another_has_is_loaded_by_peft(tmp_path):
    first, second = two(tmp_path, second={"modules_to_save": ["lm_head"]})
    merged = merge([open_adapter(first), open_adapter(second)])
    assert any("only other adapters have" in note for note in merged.notes)
    squeeze(merged, full_rank(merged), tmp_path / "out")
    head = load(LLAMA, tmp_path / "out").base_model.model.lm_head.modules_to_save["default"].weight
    (own,) = [tensor for key, tensor in load_file(second / WEIGHTS).items() if "lm_head" in key]
    assert torch.equal(head.float(), own)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    ("base", "trained"),
    [(LLAMA, {"trainable_token_indices": [4, 29]}), (GPT2, {"bias": "all"})],
    ids=["tokens", "biases"],
)
def test_what_only_one_has_trained_besides_is_applied(tmp_path, base, trained, order):
    adapters = two(tmp_path, base, second=trained)
    output = tmp_path / "out"
    write([adapters[place] for place in order], output, weights=order)
    assert relative(effect(base, output), effect(base, adapters[1])) < 1e-6


def test_embeddings_of_other_tokens_are_refused(tmp_path):
    first, second = two(tmp_path, trainable_token_indices=[4, 29])
    (key,) = [key for key in load_file(first / WEIGHTS) if "token_adapter" in key]
    edit_tensors(second, lambda tensors: tensors.update({key: load_file(first / WEIGHTS)[key]}))
    merge([open_adapter(first), open_adapter(second)])
    edit_config(second, trainable_token_indices=[4, 30])
    with pytest.raises(UnsupportedAdapter, match=r"'trainable_token_indices' differs between .*a and .*b"):
        merge([open_adapter(first), open_adapter(second)], keep_first=True)


# --- what has no sum ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "named"),
    [({"use_dora": True}, "lora_magnitude_vector.*DoRA"), ({"lora_bias": True}, r"lora_B\.bias.*lora_bias")],
    ids=["DoRA", "lora_bias"],
)
def test_what_has_no_sum_is_refused_by_name(tmp_path, lora, named):
    first, second = two(tmp_path, second=lora)
    with pytest.raises(UnsupportedAdapter, match=rf"b: .*{named}"):
        merge([open_adapter(first), open_adapter(second)])


def test_other_base_models_are_an_error_unless_allowed(tmp_path):
    first, second = two(tmp_path)
    edit_config(first, base_model_name_or_path="org/one")
    edit_config(second, base_model_name_or_path="org/two")
    adapters = [open_adapter(first), open_adapter(second)]
    with pytest.raises(AdapterError, match=r"b is for the base model 'org/two', .*a for 'org/one'.*--allow-other-base"):
        merge(adapters)
    assert merge(adapters, allow_other_base=True).rank == 12


def test_layers_of_other_shapes_are_named(tmp_path):
    first = write_raw(tmp_path / "a", pair("layer", 6, 4, 5))
    second = write_raw(tmp_path / "b", pair("layer", 7, 4, 5))
    with pytest.raises(AdapterError, match=r"'layer' is linear 6×5 in .*a and linear 7×5 in .*b"):
        merge([open_adapter(first), open_adapter(second)])


def test_adapters_for_other_tokens_are_refused(tmp_path):
    first, second = two(tmp_path)
    edit_config(second, alora_invocation_tokens=[1, 2])
    with pytest.raises(UnsupportedAdapter, match="alora_invocation_tokens"):
        merge([open_adapter(first), open_adapter(second)])


def test_names_that_do_not_map_are_an_error(tmp_path):
    _, second = two(tmp_path)
    parts = write_raw(tmp_path / "unet", pair("mid_block.attentions.0.proj_in", 7, 4, 8))
    save_adapter(convert(open_adapter(parts), "kohya"), tmp_path / "k.safetensors")
    with pytest.raises(LoraSqueezeError):
        merge([open_adapter(tmp_path / "k.safetensors"), open_adapter(second)])


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3), (0, 0), (float("nan"), 1), (float("inf"), 1)], ids=str)
def test_weights_that_make_no_sense(tmp_path, weights):
    adapters = [open_adapter(path) for path in two(tmp_path)]
    with pytest.raises(SettingsError, match="weights"):
        merge(adapters, weights)


def test_nothing_to_merge():
    with pytest.raises(SettingsError, match="no adapter"):
        merge([])


# --- the command --------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(main, ["merge", *map(str, arguments)])


def test_the_command_of_the_readme(tmp_path):
    first, second = two(tmp_path)
    done = run(first, second, "--weights", "0.7,0.3", "--rank", 3, tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.output)
    assert record["parameters_before"] == open_adapter(first).parameters + open_adapter(second).parameters
    assert record["source"] == f"0.7·{first} + 0.3·{second}"
    assert record["bytes_after"] == (tmp_path / "out" / WEIGHTS).stat().st_size < record["bytes_before"]
    found = updates(LLAMA, tmp_path / "out")
    for layer, dense in dense_sum(LLAMA, (first, second), (0.7, 0.3)).items():
        assert relative(found[layer], truncation(dense, 3)) < 1e-6


@pytest.mark.parametrize(("weights", "shares"), [("average", (0.5, 0.5)), ("sum", (1, 1))])
def test_average_and_sum(tmp_path, weights, shares):
    adapters = two(tmp_path, CONVOLUTIONS)
    assert run(*adapters, tmp_path / "out", "--weights", weights).exit_code == 0
    expected, found = dense_sum(CONVOLUTIONS, adapters, shares), updates(CONVOLUTIONS, tmp_path / "out")
    assert max(relative(found[layer], expected[layer]) for layer in found) < 1e-6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--weights", "a,b"], "neither average nor sum"),
        (["--weights", "1"], "2 adapters need as many weights"),
        (["--rank", "2", "--retain", "0.9"], "contradict"),
        (["--max-rank", "2"], "that they limit"),
        (["--policy", "fixed=2", "--policy", "fixed=3"], "one --policy"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(tmp_path, options, said):
    done = run(*two(tmp_path), tmp_path / "out", *options)
    assert done.exit_code != 0
    assert said in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["a", "b", "b/inside"])
def test_no_source_is_overwritten(tmp_path, place):
    adapters = two(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = run(*adapters, tmp_path / place, "--overwrite")
    assert done.exit_code == 1
    assert "source" in done.output
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_default_keeps_everything_and_one_adapter_may_be_scaled(tmp_path):
    source = make_adapter(tmp_path / "a")
    assert run(source, tmp_path / "out", "--weights", "2").exit_code == 0
    found = updates(LLAMA, tmp_path / "out")
    assert max(relative(found[layer], 2 * dense) for layer, dense in updates(LLAMA, source).items()) < 1e-6
    with pytest.raises(OutputError):
        save_adapter(open_adapter(source), tmp_path / "out")
