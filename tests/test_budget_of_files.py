"""What a budget means: ties, and bytes of the file that is written."""

import math
import random
import re

import pytest
import torch
from adapters import BERT, LLAMA, WEIGHTS, make_adapter, pair, write_raw

from lora_squeeze import Ranks, Spectrum, decompose, open_adapter, squeeze
from lora_squeeze.compression import file_cost
from lora_squeeze.errors import RankError
from lora_squeeze.limits import NO_LIMITS, Limits
from lora_squeeze.policies import para_energy, para_rank, params, parse_policy, size
from lora_squeeze.verbs import choose_ranks


def spectrum(name, values, *, out=8, inner=8, rank=None):
    return Spectrum(name, out, inner, rank or len(values), tuple(map(float, values)))


# --- what a budget means ----------------------------------------------------------------------------------------

WIDE = spectrum("wide", [4, 3, 2, 1], out=10, inner=10)  # 4 components of 20 parameters
NARROW = spectrum("narrow", [2, 1.5], out=2, inner=2, rank=4)  # 4 components of 4 parameters


def test_a_component_is_worth_its_energy_per_parameter():
    narrow = spectrum("narrow", [2, 1], out=2, inner=2)
    assert params([WIDE, narrow], 24).by_layer == {"wide": 1, "narrow": 1}  # 16/20 and 4/4, not 16/20 and 9/20
    assert params([WIDE, narrow], 8).by_layer == {"wide": 0, "narrow": 2}


def test_a_budget_up_to_one_is_a_fraction_and_above_a_number():
    spectra = [spectrum("a", [4, 3, 2, 1]), spectrum("b", [3.5, 2.5, 1.5, 0.5])]
    whole = 2 * 4 * 16
    assert params(spectra, 0.5).by_layer == params(spectra, whole // 2).by_layer == {"a": 2, "b": 2}
    assert params(spectra, 1.0).by_layer == params(spectra, whole).by_layer == {"a": 4, "b": 4}
    assert params(spectra, 10**9).by_layer == {"a": 4, "b": 4}
    assert params(spectra, 16).by_layer == {"a": 1, "b": 0}


def test_the_source_counts_the_components_it_stores():
    """A rank above the module's size is paid for, though it holds no more singular values."""
    small = spectrum("a", [2, 1], out=2, inner=6, rank=8)  # 64 parameters, of which 16 say it all
    assert params([small], 0.25).by_layer == {"a": 2}
    assert params([small], 0.24).by_layer == {"a": 1}
    assert params([small], 1.0).by_layer["a"] >= 2


@pytest.mark.parametrize("budget", [0, -1, -0.5, math.nan, math.inf, -math.inf])
def test_budgets_that_are_none_are_refused(budget):
    with pytest.raises(RankError, match="params="):
        params([WIDE], budget)


@pytest.mark.parametrize(
    ("budget", "limits", "smallest"),
    [
        (3, Limits(), 4),
        (0.01, Limits(), 4),
        (20, Limits(min_rank=1), 24),
        (47, Limits(min_rank=2), 48),
        (7, Limits(multiple_of=2), 8),
        (11, Limits(steps=(3,)), 12),
        (23, Limits(equal=(".+",)), 24),
        (19, Limits(rank_for=(("narrow", 0),)), 20),
    ],
    ids=str,
)
def test_a_budget_that_is_too_small_names_the_smallest_that_is_possible(budget, limits, smallest):
    spectra = [WIDE, NARROW]
    with pytest.raises(RankError, match=rf"\b{smallest}\b"):
        params(spectra, budget, limits=limits)
    assert any(params(spectra, smallest, limits=limits).by_layer.values())


# --- ties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "value"), [(params, 0.4), (params, 0.7), (para_rank, 0.4), (para_rank, 0.7), (para_energy, 0.6)]
)
@pytest.mark.parametrize("limits", [Limits(), Limits(multiple_of=2), Limits(equal=(r"_\d",))], ids=str)
def test_equal_worth_is_decided_by_name_and_not_by_the_order_of_the_file(policy, value, limits):
    names = ["b_1", "a_1", "c_1", "c_2", "b_2", "d_1", "a_2"]
    spectra = [spectrum(name, [2, 2, 1, 1]) for name in names]
    plans = []
    for seed in range(12):
        random.Random(seed).shuffle(spectra)
        plans.append(policy(spectra, value, limits=limits).by_layer)
    assert all(plan == plans[0] for plan in plans)


def test_among_equals_the_first_name_is_kept():
    spectra = [spectrum(name, [1]) for name in ("layers.2", "layers.0", "layers.1")]
    assert params(spectra, 32).by_layer == {"layers.0": 1, "layers.1": 1, "layers.2": 0}
    assert para_rank(spectra, 0.3).by_layer == {"layers.0": 1, "layers.1": 0, "layers.2": 0}


# --- size: bytes of the file that is written --------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Layers of different sizes, ranks and dtypes, and a tensor that is only carried over."""
    tensors = {"classifier.bias": torch.zeros(5)}
    ranks = {"small.proj": 2}
    for place, (out, inner) in enumerate([(6, 10), (40, 24), (16, 16), (7, 90)]):
        dtype = torch.bfloat16 if place == 2 else torch.float32
        tensors |= pair(f"layers.{place}.proj", out, 6, inner, seed=place, dtype=dtype)
    tensors |= pair("small.proj", 30, 2, 20, seed=9)
    folder = write_raw(tmp_path_factory.mktemp("uneven") / "adapter", tensors, r=6, lora_alpha=6, rank_pattern=ranks)
    return decompose(open_adapter(folder))


def written(decomposition, ranks, folder, **options):
    squeeze(decomposition, ranks, folder, **options)
    return (folder / WEIGHTS).stat().st_size


def whole_file(decomposition, **options):
    full = {s.name: s.rank for s in decomposition.spectra}
    return file_cost(decomposition.adapter, **options).file_size(by_hand(full))


def by_hand(by_layer):
    return Ranks("by hand", by_layer)


@pytest.mark.parametrize("dtype", [None, "BF16", "F64"])
@pytest.mark.parametrize("fraction", [0.3, 0.4, 0.55, 0.71, 0.9, 1.0])
def test_size_is_the_largest_file_within_the_budget(tmp_path, uneven, dtype, fraction):
    cost = file_cost(uneven.adapter, dtype=dtype)
    budget = math.floor(fraction * whole_file(uneven, dtype=dtype))

    plan = size(uneven.spectra, budget, cost=cost)

    found = written(uneven, plan, tmp_path / "out", dtype=dtype)
    assert found == cost.file_size(plan)
    assert found <= budget
    unfinished = [s.name for s in uneven.spectra if plan.by_layer[s.name] < len(s.singular_values)]
    if unfinished:
        cheapest = min(cost.component_bytes[name] for name in unfinished)
        all_layers = by_hand({s.name: s.rank - (s.rank > 1) for s in uneven.spectra})
        header_growth = header(cost, all_layers, uneven) - header(cost, plan, uneven)
        assert budget - found < cheapest + header_growth + 16


@pytest.mark.parametrize("fraction", [0.2, 0.3, 0.4, 0.55, 0.71, 0.9])
def test_the_remainder_is_filled_until_no_component_fits(uneven, fraction):
    cost = file_cost(uneven.adapter)
    budget = math.floor(fraction * whole_file(uneven))
    plan = size(uneven.spectra, budget, cost=cost)
    for s in uneven.spectra:
        rank = plan.by_layer[s.name]
        if rank < len(s.singular_values):
            more = Ranks(plan.policy, {**plan.by_layer, s.name: rank + 1})
            assert cost.file_size(more) > budget, (s.name, cost.file_size(more), budget)


def header(cost, plan, decomposition):
    """What of a file is not factors."""
    factors = sum(cost.component_bytes[s.name] * plan.by_layer[s.name] for s in decomposition.spectra)
    return cost.file_size(plan) - factors


@pytest.mark.parametrize("numbers", [3, 40, 300])
@pytest.mark.parametrize("budget", [3000, 3300, 3600, 3900])
def test_a_wider_tensor_beside_the_factors_is_counted_where_it_lies_in_the_file(tmp_path, numbers, budget):
    factors = {**pair("a", 50, 8, 40, dtype=torch.bfloat16), **pair("b", 60, 8, 30, dtype=torch.bfloat16)}
    source = write_raw(tmp_path / "adapter", {**factors, "head.bias": torch.zeros(numbers)}, r=8)
    decomposition = decompose(open_adapter(source))
    cost = file_cost(decomposition.adapter)
    plan = size(decomposition.spectra, budget, cost=cost)
    found = written(decomposition, plan, tmp_path / "out")
    assert found == cost.file_size(plan)
    assert found <= budget


def least_size(decomposition, cost, limits=NO_LIMITS):
    """The smallest file that is possible, as the error for an impossible one names it."""
    with pytest.raises(RankError, match=r"of (\d+) bytes") as caught:
        size(decomposition.spectra, 100, cost=cost, limits=limits)
    return int(re.search(r"of (\d+) bytes", str(caught.value))[1])


@pytest.mark.parametrize("above", range(0, 8000, 261))
@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_no_budget_is_ever_exceeded(tmp_path, uneven, dtype, above):
    cost = file_cost(uneven.adapter, dtype=dtype)
    budget = least_size(uneven, cost) + above
    plan = size(uneven.spectra, budget, cost=cost)
    assert written(uneven, plan, tmp_path / "out", dtype=dtype) <= budget


@pytest.mark.parametrize(("base", "lora"), [(LLAMA, {}), (BERT, {"modules_to_save": ["classifier"]})])
def test_size_of_real_adapters_counts_everything_in_the_file(tmp_path, base, lora):
    decomposition = decompose(open_adapter(make_adapter(tmp_path / "adapter", base, **lora)))
    budget = math.floor(0.6 * (tmp_path / "adapter" / WEIGHTS).stat().st_size)
    plan = choose_ranks(decomposition, f"size={budget}")
    found = written(decomposition, plan, tmp_path / "out")
    assert 0.9 * budget < found <= budget


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "llamacpp"])
def test_size_is_that_of_the_file_for_the_runtime(tmp_path, runtime):
    source = make_adapter(tmp_path / "adapter", rank_pattern={"v_proj": 3}, use_rslora=True)
    decomposition = decompose(open_adapter(source))
    budget = (source / WEIGHTS).stat().st_size // 2
    plan = choose_ranks(decomposition, f"size={budget}", runtime=runtime, dtype="F16")
    assert written(decomposition, plan, tmp_path / "out", runtime=runtime, dtype="F16") <= budget
    if runtime != "vllm":
        next_rank = by_hand({name: min(plan.largest + 1, s.rank) for name, s in by_name(decomposition).items()})
        assert file_cost(decomposition.adapter, dtype="F16", runtime=runtime).file_size(next_rank) > budget


def by_name(decomposition):
    return {s.name: s for s in decomposition.spectra}


def test_size_respects_limits(uneven):
    cost = file_cost(uneven.adapter)
    limits = Limits(min_rank=1, multiple_of=2, equal=(r"layers\.[01]\.",))
    plan = size(uneven.spectra, 10_000, cost=cost, limits=limits)
    assert cost.file_size(plan) <= 10_000
    assert set(plan.by_layer.values()) <= {2, 4, 6}
    assert plan.by_layer["layers.0.proj"] == plan.by_layer["layers.1.proj"]


@pytest.mark.parametrize("limits", [Limits(), Limits(min_rank=1), Limits(min_rank=2, multiple_of=2)], ids=str)
def test_a_file_that_is_too_small_names_the_smallest_that_is_possible(tmp_path, uneven, limits):
    cost = file_cost(uneven.adapter)
    least = least_size(uneven, cost, limits)

    plan = size(uneven.spectra, least, cost=cost, limits=limits)

    assert written(uneven, plan, tmp_path / "out") == least
    with pytest.raises(RankError, match=f"{least} bytes"):
        size(uneven.spectra, least - 1, cost=cost, limits=limits)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("20000", 20_000),
        ("20000B", 20_000),
        ("20KB", 20_000),
        ("20kb", 20_000),
        ("20 KB", 20_000),
        ("20KiB", 20_480),
        ("20kib", 20_480),
        ("0.02MB", 20_000),
        ("1.5MB", 1_500_000),
        ("1.5MiB", 1_572_864),
        ("2GB", 2_000_000_000),
        ("2GiB", 2_147_483_648),
    ],
)
def test_sizes_are_spelled_as_people_write_them(uneven, text, number):
    plan = parse_policy(f"size={text}").choose(uneven.spectra, cost=file_cost(uneven.adapter))
    assert plan.policy == f"size={number}"


@pytest.mark.parametrize(
    "text", ["", "MB", "-5MB", "5TB", "5M B", "5iB", "five", "1.2.3MB", ".", "1e6", "nan", "inf", "5MB!", "9" * 400]
)
def test_other_sizes_are_refused(text):
    with pytest.raises(RankError, match="size"):
        parse_policy(f"size={text}")
