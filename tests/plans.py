"""Plans of ranks by layer: made at random, applied, and checked against the dense truncation."""

from __future__ import annotations

import math
import random
import warnings

import pytest
from adapters import (
    load,
    lora_modules,
    read_config,
    relative,
    truncation,
)

from lora_squeeze import Ranks, open_adapter, squeeze


def strictly_loaded(base, folder):
    """Module name → module, as PEFT loads it. Any warning (about missing keys, unused patterns …) is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # transformers, about its own models
        return dict(lora_modules(load(base, folder)))


def deltas(modules):
    """Module name → what PEFT adds to its weight, a matrix in float64."""
    return {name: module.get_delta_weight("default").flatten(1) for name, module in modules.items()}


def deltas_of(base, folder):
    return deltas(dict(lora_modules(load(base, folder))))


def check_against_dense_truncation(base, source, output, plan, *, tolerance=1e-5):
    """Kept modules have their truncated update, others are not adapted, one scale holds without the patterns."""
    modules = strictly_loaded(base, output)
    before, after = deltas_of(base, source), deltas(modules)
    kept = {name: rank for name, rank in plan.items() if rank > 0}
    assert after.keys() == kept.keys()
    for name, rank in kept.items():
        assert relative(after[name], truncation(before[name], rank)) <= tolerance, name
    config = read_config(output)
    assert config["r"] == max(kept.values())
    assert {name: module.r["default"] for name, module in modules.items()} == kept
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    assert all(module.scaling["default"] == pytest.approx(scale, rel=1e-12) for module in modules.values())
    assert own_ranks(output) == kept


def random_plan(names, *, seed=0, largest=8, zeros=0.25):
    """Ranks from 0 to `largest`; names come in the order of the file."""
    chance = random.Random(seed)
    plan = {name: 0 if chance.random() < zeros else chance.randint(1, largest) for name in names}
    return plan if any(plan.values()) else plan | {next(iter(plan)): 3}


def own_ranks(folder):
    return {name: spec.rank for name, spec in open_adapter(folder).layers.items()}


def squeezed(source, plan, output):
    own = own_ranks(source)
    plan = {name: min(rank, own[name]) for name, rank in plan.items()}
    squeeze(open_adapter(source), Ranks("by hand", plan), output)
    return plan


SCALES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"v_proj": 3, "0.mlp.down_proj": 5, "value": 3, "c_fc": 4, "second": 3},
        "alpha_pattern": {"q_proj": 3, "1.self_attn.v_proj": 40, "query": 3, "first": 40, "c_attn": 1},
    },
    "patterns, rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 3, "value": 3}, "alpha_pattern": {"q_proj": 5}},
}
