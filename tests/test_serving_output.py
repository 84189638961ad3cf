"""What is written for vLLM, SGLang and llama.cpp: by their loaders' rules, the update that PEFT applies."""

import math

import pytest
import torch
from adapters import (
    LLAMA,
    WEIGHTS,
    make_adapter,
    read_config,
    truncation,
    updates,
)
from loaders import LOADERS, as_vllm, every_loader, factors, same_updates
from safetensors.torch import load_file

from lora_squeeze import Ranks, open_adapter, save_adapter, squeeze
from lora_squeeze.serving import check, fit

SOURCES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "mixed ranks": {"rank_pattern": {"v_proj": 3}},
    "mixed scales": {"alpha_pattern": {"v_proj": 3, "0.mlp.down_proj": 40}},
    "everything": {
        "use_rslora": True,
        "rank_pattern": {"v_proj": 3, "0.mlp.down_proj": 6},
        "alpha_pattern": {"q_proj": 40},
    },
    "regex": {"target_modules": r".*\.(q|v|o)_proj", "alpha_pattern": {"v_proj": 3}},
}
PLANS = {
    "mixed": lambda place, own: min(own, 1 + place),
    "some left out": lambda place, own: min(own, 2 * place % 5),
    "everything": lambda place, own: own,
    "uniform": lambda place, own: 2,
}


@pytest.fixture(params=SOURCES.values(), ids=SOURCES)
def source(tmp_path, request):
    return make_adapter(tmp_path / "adapter", **request.param)


@every_loader
@pytest.mark.parametrize("rule", PLANS.values(), ids=PLANS)
def test_every_runtime_applies_the_update_that_peft_applies(tmp_path, source, runtime, rule):
    adapter = open_adapter(source)
    plan = {name: rule(place, spec.rank) for place, (name, spec) in enumerate(adapter.layers.items())}

    squeeze(adapter, Ranks("by hand", plan), tmp_path / "out", runtime=runtime)

    by_peft, before = updates(LLAMA, tmp_path / "out"), updates(LLAMA, source)
    assert same_updates(LOADERS[runtime](tmp_path / "out"), by_peft)
    kept = {name: truncation(before[name], rank) for name, rank in plan.items() if rank}
    assert same_updates(by_peft, kept, tolerance=1e-5)
    assert check(open_adapter(tmp_path / "out"), runtime) == []


@pytest.mark.parametrize("rule", PLANS.values(), ids=PLANS)
def test_what_is_written_for_peft_is_loaded_by_vllm_with_the_same_update(tmp_path, source, rule):
    adapter = open_adapter(source)
    plan = {name: rule(place, spec.rank) for place, (name, spec) in enumerate(adapter.layers.items())}
    squeeze(adapter, Ranks("by hand", plan), tmp_path / "out")
    assert same_updates(as_vllm(tmp_path / "out"), updates(LLAMA, tmp_path / "out"))
    assert check(open_adapter(tmp_path / "out"), "vllm") == []


@pytest.mark.parametrize("runtime", ["sglang", "llamacpp"])
def test_where_ranks_may_not_differ_they_are_padded_with_zeros(tmp_path, source, runtime):
    adapter = open_adapter(source)
    plan = {name: min(spec.rank, 1 + place) for place, (name, spec) in enumerate(adapter.layers.items())}
    largest = max(plan.values())

    compression = squeeze(adapter, Ranks("by hand", plan), tmp_path / "out", runtime=runtime)

    config = read_config(tmp_path / "out")
    assert (config["r"], config["use_rslora"]) == (largest, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    for name, (down, up) in factors(tmp_path / "out").items():
        assert down.shape[0] == up.shape[1] == largest
        assert down[plan[name] :].count_nonzero() == up[:, plan[name] :].count_nonzero() == 0
        assert down[: plan[name]].count_nonzero() > 0
    assert compression.parameters_after == sum(t.numel() for t in load_file(tmp_path / "out" / WEIGHTS).values())


@every_loader
def test_rslora_is_written_as_plain_lora(tmp_path, runtime):
    source = make_adapter(tmp_path / "adapter", use_rslora=True)
    squeeze(
        open_adapter(source),
        Ranks("fixed=4", dict.fromkeys(updates(LLAMA, source), 4)),
        tmp_path / "out",
        runtime=runtime,
    )
    config = read_config(tmp_path / "out")
    assert config["use_rslora"] is False
    assert config["lora_alpha"] == pytest.approx(16 / math.sqrt(8) * 4)


def test_for_peft_rslora_stays_rslora(tmp_path):
    source = make_adapter(tmp_path / "adapter", use_rslora=True)
    squeeze(open_adapter(source), Ranks("fixed=4", dict.fromkeys(updates(LLAMA, source), 4)), tmp_path / "out")
    assert read_config(tmp_path / "out")["use_rslora"] is True


@pytest.mark.parametrize("runtime", ["sglang", "llamacpp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_keeps_every_bit_of_what_is_padded(tmp_path, runtime, dtype):
    source = make_adapter(tmp_path / "adapter", dtype=dtype, rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 6})
    own = {name: spec.rank for name, spec in open_adapter(source).layers.items()}
    squeeze(open_adapter(source), Ranks("by hand", own), tmp_path / "out", runtime=runtime)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    for key, tensor in before.items():
        rows, columns = tensor.shape
        assert after[key].dtype == dtype
        assert torch.equal(after[key][:rows, :columns], tensor)


def test_fit_leaves_an_adapter_that_fits_as_it_is(tmp_path):
    adapter = open_adapter(make_adapter(tmp_path / "adapter"))
    assert fit(adapter, "peft") == adapter
    for runtime in LOADERS:
        save_adapter(fit(adapter, runtime), tmp_path / runtime)
        before, after = load_file(tmp_path / "adapter" / WEIGHTS), load_file(tmp_path / runtime / WEIGHTS)
        assert all(torch.equal(before[key], after[key]) for key in before)
