"""Experts stored as one parameter (target_parameters): every expert a layer of its own, one rank for all of them."""

import json

import pytest
import torch
from adapters import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Base,
    edit_config,
    edit_tensors,
    load,
    make_adapter,
    output,
    read_config,
    relative,
    truncation,
)
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from lora_squeeze import compress_adapter, decompose, fixed, open_adapter, squeeze
from lora_squeeze.errors import AdapterError, RankError, UnsupportedAdapter
from lora_squeeze.limits import Limits
from lora_squeeze.policies import parse_policy
from lora_squeeze.records import Ranks

EXPERTS = 3
LAYER = "model.layers.0.mlp.experts"
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _mixtral() -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=None,
            experts_implementation="eager",  # the one that computes in float64
        )
    )


TOKENS = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(0))
MIXTRAL = Base(
    _mixtral, (TOKENS,), {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "target_parameters": PARAMETERS}
)


def experts(model: nn.Module) -> dict[str, ParamWrapper]:
    """Parameter name → its wrapper."""
    return {
        f"{name.removeprefix(PREFIX).replace('.base_layer', '')}.{module.parameter_name}": module
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }


@torch.no_grad()
def truncated_effect(folder, rank):
    """What the adapter adds once every matrix has been truncated by the dense float64 SVD; merged, so that no
    factors of our own are involved."""
    model = load(MIXTRAL, folder)
    merged = _mixtral().double().eval()
    for name, module in experts(model).items():
        update = module.get_delta_weight("default").double()
        merged.get_parameter(name).add_(torch.stack([truncation(one, rank) for one in update]))
    for name, module in model.named_modules():
        if name.endswith("q_proj") and hasattr(module, "lora_A"):
            weight = f"{name.removeprefix(PREFIX)}.weight"
            merged.get_parameter(weight).add_(truncation(module.get_delta_weight("default"), rank))
    return output(merged, MIXTRAL) - output(_mixtral().double().eval(), MIXTRAL)


def effect(folder):
    return output(load(MIXTRAL, folder), MIXTRAL) - output(_mixtral().double().eval(), MIXTRAL)


@pytest.fixture
def adapter(tmp_path):
    return make_adapter(tmp_path / "adapter", MIXTRAL)


def test_each_expert_is_the_update_that_peft_applies(adapter):
    opened, modules = open_adapter(adapter), experts(load(MIXTRAL, adapter))

    names = {f"{name}#{expert}" for name in modules for expert in range(EXPERTS)}
    assert {name for name, spec in opened.layers.items() if spec.kind == "expert"} == names
    for name, module in modules.items():
        for expert, dense in enumerate(module.get_delta_weight("default").double()):
            layer, spec = opened.load(f"{name}#{expert}"), opened.layers[f"{name}#{expert}"]
            assert spec.rank == 8
            assert (spec.out_features, spec.in_features) == dense.shape
            torch.testing.assert_close(layer.scale * layer.up.double() @ layer.down.double(), dense)


def test_experts_have_spectra_of_their_own(adapter):
    spectra = {spectrum.name: spectrum for spectrum in decompose(open_adapter(adapter)).spectra}
    values = {spectra[f"{LAYER}.down_proj#{expert}"].singular_values for expert in range(EXPERTS)}
    assert len(values) == EXPERTS


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_peft_loads_the_exact_truncation_of_every_expert(adapter, tmp_path, rank):
    compress_adapter(adapter, tmp_path / "out", rank)
    assert relative(effect(tmp_path / "out"), truncated_effect(adapter, rank)) < 1e-5


def test_one_of_two_parameters(tmp_path):
    adapter = make_adapter(tmp_path / "adapter", MIXTRAL, target_parameters=["mlp.experts.down_proj"])
    compress_adapter(adapter, tmp_path / "out", 2)
    assert f"{LAYER}.down_proj#2" in open_adapter(adapter).layers
    assert relative(effect(tmp_path / "out"), truncated_effect(adapter, 2)) < 1e-5


def test_at_full_rank_nothing_changes(adapter, tmp_path):
    compress_adapter(adapter, tmp_path / "out", 8)
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert set(before) == set(after)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_parameters_may_differ_in_rank_and_alpha(tmp_path):
    patterns = {"rank_pattern": {"experts.gate_up_proj": 6}, "alpha_pattern": {"experts.down_proj": 5}}
    adapter = make_adapter(tmp_path / "adapter", MIXTRAL, **patterns)
    opened = open_adapter(adapter)
    assert (opened.layers[f"{LAYER}.gate_up_proj#0"].rank, opened.layers[f"{LAYER}.down_proj#0"].rank) == (6, 8)
    for name, module in experts(load(MIXTRAL, adapter)).items():
        assert opened.layers[f"{name}#1"].scale == module.scaling["default"]

    ranks = {name: 2 if "gate_up" in name else 3 for name in opened.layers}
    squeeze(opened, Ranks("mine", ranks), tmp_path / "out")

    modules = experts(load(MIXTRAL, tmp_path / "out"))
    assert {name.rpartition(".")[2]: module.r["default"] for name, module in modules.items()} == {
        "gate_up_proj": 2,
        "down_proj": 3,
    }


POLICIES = ["variance=0.9", "energy=0.8", "cumulative=0.7", "para-rank=0.3", "para-energy=0.7", "params=0.3", "knee"]


@pytest.mark.parametrize("policy", [*POLICIES, "size=40KiB"])
def test_every_policy_gives_the_experts_of_a_parameter_one_rank(adapter, tmp_path, policy):
    from lora_squeeze.verbs import choose_ranks

    edit_tensors(adapter, lambda tensors: tensors[f"{PREFIX}{LAYER}.lora_A.weight"][:8].mul_(1e-3))  # expert 0 is small
    decomposition = decompose(open_adapter(adapter))

    plan = choose_ranks(decomposition, policy)

    groups: dict[str, set[int]] = {}
    for name, rank in plan.by_layer.items():
        groups.setdefault(name.partition("#")[0], set()).add(rank)
    assert all(len(ranks) == 1 for ranks in groups.values())
    assert all(min(ranks) >= 1 for name, ranks in groups.items() if "experts" in name)
    squeeze(decomposition, plan, tmp_path / "out")
    load(MIXTRAL, tmp_path / "out")


def test_limits_name_the_parameter(adapter):
    layers = list(open_adapter(adapter).layers.values())
    chosen = fixed(layers, 4, limits=Limits(rank_for=(("down_proj", 2),), equal=("experts",))).by_layer
    assert {rank for name, rank in chosen.items() if "down_proj#" in name} == {2}
    assert {rank for name, rank in chosen.items() if "gate_up_proj#" in name} == {4}


@pytest.mark.parametrize("rank", [0, 3])
def test_a_plan_that_separates_experts_is_refused(adapter, tmp_path, rank):
    opened = open_adapter(adapter)
    plan = dict.fromkeys(opened.layers, 4)
    plan[f"{LAYER}.down_proj#1"] = rank
    with pytest.raises(RankError, match=r"down_proj#\d"):
        squeeze(opened, Ranks("mine", plan), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_policy_parser_knows_them_all():
    assert all(parse_policy(policy) for policy in POLICIES)


# --- adapters of transformers 4, whose experts were modules ----------------------------------------------------------


@pytest.fixture
def modules_of_experts(tmp_path):
    """What PEFT saved under transformers 4: a pair for w1, w2, w3 of each expert."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for expert in range(EXPERTS):
            for name, (inner, out) in {"w1": (32, 24), "w2": (24, 32), "w3": (32, 24)}.items():
                key = f"{PREFIX}model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(8, inner, generator=generator) * 0.3
                tensors[f"{key}.lora_B.weight"] = torch.randn(out, 8, generator=generator) * 0.3
    folder = tmp_path / "modules"
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["w1", "w2", "w3"]}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_modules_of_experts_stay_what_they_are_and_peft_fuses_them(modules_of_experts, tmp_path):
    compress_adapter(modules_of_experts, tmp_path / "out", 3)

    opened = open_adapter(modules_of_experts)
    assert len(opened.layers) == 2 * EXPERTS * 3
    for name, module in experts(load(MIXTRAL, tmp_path / "out")).items():
        prefix = name.rpartition(".")[0].replace("mlp", "block_sparse_moe")
        for expert, dense in enumerate(module.get_delta_weight("default").double()):
            parts = ("w1", "w3") if name.endswith("gate_up_proj") else ("w2",)
            layers = [opened.load(f"{prefix}.{expert}.{part}") for part in parts]
            expected = [truncation(one.scale * one.up.double() @ one.down.double(), 3) for one in layers]
            assert relative(dense, torch.cat(expected)) < 1e-6


@pytest.mark.parametrize("smaller", [r"experts.0.", "layers.1.", "w2"])
def test_modules_of_experts_of_several_ranks_come_with_a_note_as_peft_cannot_fuse_them(
    modules_of_experts, tmp_path, smaller
):
    adapter = open_adapter(modules_of_experts)
    plan = Ranks("mine", {name: 2 if smaller in name else 3 for name in adapter.layers})
    (note,) = squeeze(adapter, plan, tmp_path / "out").notes
    assert "transformers 5 fuses the experts" in note
    assert smaller in note
    with pytest.raises(RuntimeError, match="size"):
        load(MIXTRAL, tmp_path / "out")
    assert squeeze(adapter, fixed(adapter.layers.values(), 3), tmp_path / "even").notes == ()


def test_fused_by_transformers_5_and_saved_again(modules_of_experts, tmp_path):
    load_model = load(MIXTRAL, modules_of_experts).float()
    load_model.save_pretrained(str(tmp_path / "fused"))
    config = read_config(tmp_path / "fused")
    assert sorted(config["target_parameters"]) == ["down_proj", "gate_up_proj"]
    assert list(config["rank_pattern"].values()) == [16]

    opened = open_adapter(tmp_path / "fused")
    assert {name.partition("#")[0].rpartition(".")[2]: spec.rank for name, spec in opened.layers.items()} == {
        "gate_up_proj": 16,
        "down_proj": 8,
    }
    compress_adapter(tmp_path / "fused", tmp_path / "out", 3)

    assert relative(effect(tmp_path / "out"), truncated_effect(tmp_path / "fused", 3)) < 1e-5


# --- what does not fit ------------------------------------------------------------------------------------------


def test_a_rank_that_does_not_divide_the_rows_names_the_parameter(adapter):
    edit_config(adapter, rank_pattern={"down_proj": 7})
    with pytest.raises(AdapterError, match=r"declares rank 7 .*down_proj.* 24 rows"):
        open_adapter(adapter)


def test_factors_of_different_numbers_of_experts_name_file_and_parameter(adapter):
    key = f"{PREFIX}{LAYER}.lora_B.weight"
    edit_tensors(adapter, lambda tensors: tensors.update({key: tensors[key][:, :16].clone()}))
    with pytest.raises(AdapterError, match=rf"{WEIGHTS}.*{LAYER}\.down_proj.*\[32, 16\]"):
        open_adapter(adapter)


@pytest.mark.parametrize("names", [["experts.some", "experts.other"], [*PARAMETERS, "experts.up_proj"]], ids=str)
def test_parameters_whose_order_is_not_known_are_refused(adapter, names):
    edit_config(adapter, target_parameters=names)
    with pytest.raises(UnsupportedAdapter, match="cannot tell which"):
        open_adapter(adapter)


def test_target_parameters_that_are_no_list(adapter):
    edit_config(adapter, target_parameters="experts.down_proj")
    with pytest.raises(AdapterError, match="target_parameters"):
        open_adapter(adapter)
