"""Ranks by layer: the patterns that are written, squeezing twice, and plans that are refused."""

import math

import pytest
import torch
from adapters import (
    BERT,
    CONVOLUTIONS,
    LLAMA,
    PREFIX,
    WEIGHTS,
    edit_tensors,
    load,
    lora_modules,
    make_adapter,
    pair,
    read_config,
    relative,
    snapshot,
    truncation,
    write_raw,
)
from plans import (
    SCALES,
    check_against_dense_truncation,
    deltas_of,
    own_ranks,
    random_plan,
    squeezed,
)
from safetensors.torch import load_file

from lora_squeeze import Ranks, decompose, open_adapter, squeeze
from lora_squeeze.errors import RankError
from lora_squeeze.policies import para_rank

# --- the patterns themselves ------------------------------------------------------------------------------------


def patterns(folder):
    config = read_config(folder)
    return config["rank_pattern"], config["alpha_pattern"]


@pytest.mark.parametrize("root", [False, True])
def test_a_module_type_with_one_rank_needs_one_key(tmp_path, root):
    source = make_adapter(tmp_path / "adapter", use_rslora=root)
    by_type = {"q_proj": 3, "v_proj": 5, "down_proj": 8}
    squeezed(source, {name: by_type[name.rpartition(".")[2]] for name in own_ranks(source)}, tmp_path / "out")
    ranks, alphas = patterns(tmp_path / "out")
    assert ranks == {"q_proj": 3, "v_proj": 5}
    scale = 16 / (math.sqrt(8) if root else 8)
    assert alphas == pytest.approx({key: scale * (math.sqrt(rank) if root else rank) for key, rank in ranks.items()})


def test_uniform_ranks_need_no_key_at_all(tmp_path):
    source = make_adapter(tmp_path / "adapter", rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 5})
    squeezed(source, dict.fromkeys(own_ranks(source), 3), tmp_path / "out")
    assert patterns(tmp_path / "out") == ({}, {})


def test_a_type_that_was_left_out_in_part_still_needs_one_key(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    plan = {name: 0 if "0.self_attn.v_proj" in name else 3 if "v_proj" in name else 6 for name in own_ranks(source)}
    squeezed(source, plan, tmp_path / "out")
    ranks, alphas = patterns(tmp_path / "out")
    assert list(ranks.values()) == [3]
    assert ranks.keys() == alphas.keys()


def test_single_layers_are_named_anchored_and_escaped(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    plan = {name: 3 if name == "model.layers.1.self_attn.v_proj" else 6 for name in own_ranks(source)}
    squeezed(source, plan, tmp_path / "out")
    ranks, alphas = patterns(tmp_path / "out")
    assert ranks == {r"^model\.layers\.1\.self_attn\.v_proj": 3}
    assert alphas == {r"^model\.layers\.1\.self_attn\.v_proj": 6}


@pytest.mark.parametrize("seed", range(4))
def test_no_layer_is_named_without_need(tmp_path, seed):
    source = make_adapter(tmp_path / "adapter", target_modules=r".*_proj")
    plan = random_plan(own_ranks(source), seed=seed)
    squeezed(source, plan, tmp_path / "out")
    ranks, alphas = patterns(tmp_path / "out")
    largest = max(plan.values())
    assert len(ranks) <= sum(0 < rank < largest for rank in plan.values())
    assert ranks.keys() == alphas.keys()
    assert largest not in ranks.values()


@pytest.mark.parametrize("scaled", SCALES.values(), ids=SCALES)
def test_a_reader_of_tensors_that_ignores_the_patterns_applies_the_same_updates(tmp_path, scaled):
    source = make_adapter(tmp_path / "adapter", **scaled)
    plan = squeezed(source, random_plan(own_ranks(source), seed=3), tmp_path / "out")
    config, tensors = read_config(tmp_path / "out"), load_file(tmp_path / "out" / WEIGHTS)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    before = deltas_of(LLAMA, source)
    for name, rank in plan.items():
        if rank:
            down, up = (tensors[f"{PREFIX}{name}.lora_{factor}.weight"].double() for factor in "AB")
            assert down.shape[0] == up.shape[1] == rank
            assert relative(scale * up @ down, truncation(before[name], rank)) <= 1e-5


# --- again, and the other way round -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora", [{}, {"target_modules": r".*_proj", "use_rslora": True, "exclude_modules": ["k_proj"]}]
)
def test_a_squeezed_adapter_can_be_squeezed_again(tmp_path, lora):
    source = make_adapter(tmp_path / "adapter", alpha_pattern={"v_proj": 3}, **lora)
    first = squeezed(source, random_plan(own_ranks(source), seed=5), tmp_path / "first")
    second = squeezed(
        tmp_path / "first",
        random_plan([name for name, rank in first.items() if rank], seed=6),
        tmp_path / "second",
    )
    assert 0 in first.values()
    assert 0 in second.values()
    check_against_dense_truncation(LLAMA, source, tmp_path / "second", dict.fromkeys(first, 0) | second, tolerance=2e-5)


def test_squeezing_to_the_ranks_it_has_changes_no_tensor(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    squeezed(source, random_plan(own_ranks(source), seed=5), tmp_path / "first")
    squeezed(tmp_path / "first", own_ranks(tmp_path / "first"), tmp_path / "second")
    first, second = (load_file(tmp_path / folder / WEIGHTS) for folder in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert read_config(tmp_path / "first") == read_config(tmp_path / "second")


def test_a_decomposition_writes_the_same_file(tmp_path):
    source = make_adapter(tmp_path / "adapter", alpha_pattern={"v_proj": 3})
    decomposition = decompose(open_adapter(source))
    plan = para_rank(decomposition.spectra, 0.3)
    squeeze(decomposition, plan, tmp_path / "one")
    squeeze(open_adapter(source), plan, tmp_path / "two")
    assert 0 in plan.by_layer.values()
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_what_was_left_out_is_reported(tmp_path):
    source = make_adapter(tmp_path / "adapter", alpha_pattern={"v_proj": 3})
    plan = random_plan(own_ranks(source), seed=1)
    assert 0 in plan.values()
    zero = f"{PREFIX}model.layers.0.mlp.down_proj.lora_B.weight"
    edit_tensors(source, lambda tensors: tensors[zero].zero_())
    plan["model.layers.0.mlp.down_proj"] = 0

    compression = squeeze(open_adapter(source), Ranks("by hand", plan), tmp_path / "out")

    before, after = deltas_of(LLAMA, source), deltas_of(LLAMA, tmp_path / "out")
    assert [layer.spectrum.name for layer in compression.layers] == list(plan)
    for layer in compression.layers:
        name = layer.spectrum.name
        lost = before[name] - after.get(name, torch.zeros_like(before[name]))
        norm = float(before[name].norm())
        assert layer.rank == plan[name]
        assert layer.relative_error == pytest.approx(float(lost.norm()) / norm if norm else 0.0, rel=1e-5, abs=1e-6)
    lost = sum(float((before[name] - after.get(name, 0)).norm()) ** 2 for name in before)
    assert compression.relative_error**2 == pytest.approx(
        lost / sum(float(dense.norm()) ** 2 for dense in before.values()), rel=1e-5
    )
    assert compression.parameters_after == sum(t.numel() for t in load_file(tmp_path / "out" / WEIGHTS).values())


# --- refusals ---------------------------------------------------------------------------------------------------

REFUSED = {
    "a layer of another adapter": ({"model.layers.7.self_attn.q_proj": 2}, r"'model\.layers\.7\.self_attn\.q_proj'"),
    "a layer without a rank": ({"model.layers.1.self_attn.q_proj": ...}, r"'model\.layers\.1\.self_attn\.q_proj'"),
    "above its own rank": ({"model.layers.1.self_attn.q_proj": 9}, "rank 9 .* own rank 8"),
    "a negative rank": ({"model.layers.1.self_attn.q_proj": -1}, "rank -1"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_plan_for_something_else_is_refused(tmp_path, change, message):
    source = make_adapter(tmp_path / "adapter")
    plan = {name: rank for name, rank in {**dict.fromkeys(own_ranks(source), 2), **change}.items() if rank is not ...}
    with pytest.raises(RankError, match=message):
        squeeze(open_adapter(source), Ranks("by hand", plan), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_that_leaves_nothing_is_refused(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    with pytest.raises(RankError, match="nothing"):
        squeeze(open_adapter(source), Ranks("by hand", dict.fromkeys(own_ranks(source), 0)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "lora", "tensor"),
    [
        (LLAMA, {"use_dora": True}, "lora_magnitude_vector"),
        (BERT, {"lora_bias": True}, r"lora_B\.bias"),
        (CONVOLUTIONS, {"use_dora": True, "target_modules": ["first", "second"]}, "lora_magnitude_vector"),
    ],
    ids=["dora", "lora_bias", "dora on convolutions"],
)
def test_a_layer_with_more_than_two_factors_cannot_be_left_out(tmp_path, base, lora, tensor):
    source = make_adapter(tmp_path / "adapter", base, **lora)
    name, *others = own_ranks(source)
    with pytest.raises(RankError, match=rf"'{name}'.*{tensor}.*min_rank"):
        squeeze(open_adapter(source), Ranks("by hand", {name: 0, **dict.fromkeys(others, 2)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("base", "lora"), [(LLAMA, {"use_dora": True}), (BERT, {"lora_bias": True})])
def test_other_layers_of_such_an_adapter_may_differ_in_rank(tmp_path, base, lora):
    source = make_adapter(tmp_path / "adapter", base, **lora)
    plan = random_plan(own_ranks(source), zeros=0)
    squeezed(source, plan, tmp_path / "out")
    assert {name: module.r["default"] for name, module in lora_modules(load(base, tmp_path / "out"))} == plan


def test_a_folder_written_by_hand_without_lists_is_left_out_by_name(tmp_path):
    """target_modules is null or missing: what is left out still has to be."""
    tensors = {**pair("a.proj", 6, 4, 5), **pair("b.proj", 6, 4, 5)}
    source = write_raw(tmp_path / "adapter", tensors, target_modules=None)
    squeezed(source, {"a.proj": 2, "b.proj": 0}, tmp_path / "out")
    assert set(own_ranks(tmp_path / "out")) == {"a.proj"}
    assert read_config(tmp_path / "out")["exclude_modules"] == ["b.proj"]
