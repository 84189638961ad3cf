"""Policies side by side: all within the budget, and what is said of them is what their files hold."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from adapters import LLAMA, WEIGHTS, edit_tensors, lora_modules, make_adapter, pair, write_raw
from adapters import load as load_with_peft
from safetensors.torch import load_file

from lora_squeeze import Ranks, Spectrum, decompose, open_adapter, squeeze
from lora_squeeze.comparison import compare_policies, outcome_of, policies_at
from lora_squeeze.compression import file_cost
from lora_squeeze.errors import RankError
from lora_squeeze.limits import Limits
from lora_squeeze.policies import POLICIES, Cost, fixed, params, parse_policy
from lora_squeeze.records import Outcome, outcomes_to_json
from lora_squeeze.verbs import outcome

FRACTIONS = [0.05, 0.125, 0.25, 0.5, 0.9, 1.0]


def random_spectra(seed, *, rank=32, layers=8):
    rng = np.random.default_rng(seed)
    found = []
    for place in range(layers):
        values = np.sort(rng.lognormal(size=rank) * rng.uniform(0.7, 0.99) ** np.arange(rank))[::-1]
        values *= 10 ** rng.uniform(-1, 1)
        shape = (int(rng.integers(40, 400)), int(rng.integers(40, 400)))
        found.append(Spectrum(f"layers.{place}.proj", *shape, rank, tuple(map(float, values))))
    return found


def cost_of(spectra):
    sizes = {s.name: 4 * s.component_size for s in spectra}
    return Cost(sizes, lambda ranks: 1000 + sum(sizes[name] * rank for name, rank in ranks.by_layer.items()))


def by_policy(outcomes):
    return {one.policy.partition("=")[0]: one for one in outcomes}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_all_policies_are_within_the_budget(seed, fraction):
    spectra = random_spectra(seed)
    whole = sum(s.rank * s.component_size for s in spectra)
    outcomes = compare_policies(spectra, fraction, cost=cost_of(spectra))
    assert outcomes
    for one in outcomes:
        assert 0 < one.parameters <= fraction * whole
        assert one.source_parameters == whole
        assert one.fraction == fraction


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.125, 0.25, 0.5])
def test_every_policy_is_listed_once_and_spends_what_it_can(seed, fraction):
    spectra = random_spectra(seed)
    outcomes = compare_policies(spectra, fraction, cost=cost_of(spectra))
    assert sorted(by_policy(outcomes)) == sorted(POLICIES)
    assert len(outcomes) == len(POLICIES)
    found = by_policy(outcomes)
    dearest = max(s.component_size for s in spectra)
    for name in ("params", "size", "para-rank", "para-energy"):
        assert found[name].parameters > fraction * found[name].source_parameters - dearest


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.125, 0.25, 0.5])
def test_a_value_can_be_spelled_to_get_the_same_plan(seed, fraction):
    spectra = random_spectra(seed)
    cost = cost_of(spectra)
    for plan in policies_at(spectra, fraction, cost=cost):
        policy = parse_policy(plan.policy)
        options = {"cost": cost} if policy.name == "size" else {}
        if policy.name == "variance":
            options["candidates"] = range(1, 33)
        assert policy.choose(spectra, **options) == plan


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_the_best_come_first(seed, fraction):
    spectra = random_spectra(seed)
    energies = [one.energy_kept for one in compare_policies(spectra, fraction, cost=cost_of(spectra))]
    assert energies == sorted(energies, reverse=True)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_no_policy_keeps_more_than_params_by_more_than_one_component(seed, fraction):
    spectra = random_spectra(seed)
    found = by_policy(compare_policies(spectra, fraction, cost=cost_of(spectra)))
    component = max(s.singular_values[0] ** 2 for s in spectra) / sum(s.energy for s in spectra)
    for one in found.values():
        assert found["params"].energy_kept >= one.energy_kept - component


def test_everything_is_kept_where_everything_may_be():
    spectra = random_spectra(0)
    found = by_policy(compare_policies(spectra, 1.0, cost=cost_of(spectra)))
    for name in set(POLICIES) - {"optimal-threshold"}:  # which keeps what is above, not at, its threshold
        assert found[name].energy_kept == pytest.approx(1.0)
        assert found[name].largest_rank == 32


def test_policies_that_cannot_go_so_low_are_not_listed():
    spectra = random_spectra(0)
    found = by_policy(compare_policies(spectra, 0.02, cost=cost_of(spectra)))  # less than one component a layer
    assert sorted(found) == ["para-energy", "para-rank", "params", "size"]
    assert all(one.layers_left_out > 0 for one in found.values())
    assert compare_policies(spectra, 1e-6, cost=cost_of(spectra)) == []


@pytest.mark.parametrize(
    "limits", [Limits(min_rank=2), Limits(multiple_of=4), Limits(equal=(r"layers\.[0-3]",))], ids=str
)
def test_limits_hold_for_all_of_them(limits):
    spectra = random_spectra(1)
    plans = policies_at(spectra, 0.4, cost=cost_of(spectra), limits=limits)
    assert len(plans) == len(POLICIES)
    for plan in plans:
        ranks = list(plan.by_layer.values())
        assert min(ranks) >= (limits.min_rank or 0)
        assert all(rank % limits.multiple_of == 0 for rank in ranks)
        assert not limits.equal or len(set(ranks[:4])) == 1


def test_a_policy_that_the_limits_stop_short_is_listed_as_far_as_they_let_it():
    spectra = random_spectra(5, rank=16)
    limits = Limits(max_rank=8)
    free = policies_at(spectra, 0.3, cost=cost_of(spectra))
    limited = policies_at(spectra, 0.5, cost=cost_of(spectra), limits=limits)
    assert {parse_policy(plan.policy).name for plan in free} <= {parse_policy(plan.policy).name for plan in limited}
    (pooled,) = [plan for plan in limited if plan.policy.startswith("para-energy")]
    assert set(pooled.by_layer.values()) == {8}  # half of the parameters is all that the limit leaves


@pytest.mark.parametrize("fraction", [0, -0.5, 1.01, 25, math.nan, math.inf])
def test_fractions_that_are_none_are_refused(fraction):
    spectra = random_spectra(0)
    with pytest.raises(RankError, match=f"fraction of {fraction:g}"):
        compare_policies(spectra, fraction, cost=cost_of(spectra))


# --- what is said is what the files hold ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A real adapter, its decomposition, and the plans at a third of its parameters."""
    source = make_adapter(
        tmp_path_factory.mktemp("compared") / "adapter",
        rank_pattern={"v_proj": 3},
        alpha_pattern={"q_proj": 40},
        target_modules=r".*_proj",
    )
    decomposition = decompose(open_adapter(source))
    return source, decomposition, policies_at(decomposition.spectra, 1 / 3, cost=file_cost(decomposition.adapter))


def test_an_outcome_is_what_the_written_file_has(tmp_path, compared):
    source, decomposition, plans = compared
    dense = {n: m.get_delta_weight("default") for n, m in lora_modules(load_with_peft(LLAMA, source))}
    energy = sum(float(delta.norm()) ** 2 for delta in dense.values())
    assert len(plans) >= 10
    for number, plan in enumerate(plans):
        folder = tmp_path / str(number)
        found = outcome(decomposition, plan)

        compression = squeeze(decomposition, plan, folder)

        tensors = load_file(folder / WEIGHTS)
        modules = dict(lora_modules(load_with_peft(LLAMA, folder)))
        kept = {name: module.get_delta_weight("default") for name, module in modules.items()}
        lost = {name: float((delta - kept.get(name, 0)).norm()) ** 2 for name, delta in dense.items()}
        assert found.policy == plan.policy
        assert found.parameters == sum(tensor.numel() for tensor in tensors.values()) == compression.parameters_after
        assert found.source_parameters == compression.parameters_before
        assert found.file_bytes == (folder / WEIGHTS).stat().st_size
        assert found.energy_kept == pytest.approx(1 - sum(lost.values()) / energy, abs=1e-6)
        assert found.energy_kept == pytest.approx(compression.retained_variance, abs=1e-6)
        worst = min(1 - lost[name] / float(dense[name].norm()) ** 2 for name in dense)
        assert found.worst_layer == pytest.approx(worst, abs=1e-6)
        assert found.largest_rank == max(module.r["default"] for module in modules.values())
        assert found.layers_left_out == len(dense) - len(modules)


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "llamacpp"])
def test_an_outcome_for_a_runtime_is_what_is_written_for_it(tmp_path, compared, runtime):
    _, decomposition, _ = compared
    plan = fixed(decomposition.spectra, 5)
    found = outcome(decomposition, plan, dtype="F16", runtime=runtime)
    compression = squeeze(decomposition, plan, tmp_path / "out", dtype="F16", runtime=runtime)
    assert found.file_bytes == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert found.parameters == compression.parameters_after


def test_the_budget_is_one_of_parameters_even_where_they_differ_in_bytes(tmp_path):
    """Half of the layers are bfloat16: a file of the same size could hold more parameters than are allowed."""
    tensors = {}
    for place in range(6):
        dtype = torch.bfloat16 if place % 2 else torch.float32
        strength = 1.0 if place % 2 else 1.2  # a component is worth more there, but less for its bytes
        values = strength * torch.linspace(1, 0.95, 8)
        tensors[f"layers.{place}.proj.lora_A.weight"] = torch.eye(8, 40, dtype=dtype)
        tensors[f"layers.{place}.proj.lora_B.weight"] = (torch.eye(40, 8) * values).to(dtype)
    decomposition = decompose(open_adapter(write_raw(tmp_path / "adapter", tensors, r=8)))
    for fraction in (0.1, 0.25, 0.5):
        for one in compare_policies(decomposition.spectra, fraction, cost=file_cost(decomposition.adapter)):
            assert one.parameters <= fraction * one.source_parameters, one.policy


def test_a_zero_layer_is_no_worst_layer(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    edit_tensors(source, lambda tensors: next(t for key, t in tensors.items() if "lora_B" in key).zero_())
    decomposition = decompose(open_adapter(source))
    outcomes = compare_policies(decomposition.spectra, 0.5, cost=file_cost(decomposition.adapter))
    assert len(outcomes) == len(POLICIES)
    assert all(0 < one.energy_kept < 1 for one in outcomes)
    zero = next(s.name for s in decomposition.spectra if s.energy == 0)
    plan = Ranks("by hand", {s.name: 0 if s.name == zero else s.rank for s in decomposition.spectra})
    assert outcome(decomposition, plan).worst_layer == outcome(decomposition, plan).energy_kept == 1.0


def test_an_adapter_of_zeros_can_be_compared(tmp_path):
    tensors = {key: torch.zeros_like(tensor) for key, tensor in pair("layer", 6, 4, 5).items()}
    decomposition = decompose(open_adapter(write_raw(tmp_path / "adapter", tensors)))
    for one in compare_policies(decomposition.spectra, 0.5, cost=file_cost(decomposition.adapter)):
        assert one.energy_kept == one.worst_layer == 1.0
        assert one.parameters <= 0.5 * one.source_parameters


def test_outcomes_are_a_json_list_of_all_their_fields():
    spectra = random_spectra(0)
    outcomes = compare_policies(spectra, 0.25, cost=cost_of(spectra))
    read = json.loads(outcomes_to_json(outcomes))
    assert [Outcome(**one) for one in read] == outcomes
    assert set(read[0]) == {field.name for field in fields(Outcome)}


def test_params_in_the_table_is_params_by_itself():
    spectra = random_spectra(2)
    cost = cost_of(spectra)
    found = by_policy(compare_policies(spectra, 0.25, cost=cost))["params"]
    assert found == outcome_of(spectra, params(spectra, 0.25), cost=cost, fraction=0.25)
