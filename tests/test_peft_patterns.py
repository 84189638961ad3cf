"""Patterns of module names: read as PEFT reads them, and few where there are many modules."""

import random
import re

import pytest
from adapters import pair, read_config, write_raw
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lora_squeeze import Ranks, open_adapter, squeeze
from lora_squeeze.formats.peft_patterns import (
    MANY,
    BadPattern,
    FirstMatch,
    endings,
    expression_of,
    patterns_for,
    targeted,
)

EXPERTS = [
    f"model.layers.{layer}.mlp.experts.{expert}.{kind}"
    for layer in range(5)
    for expert in range(40)
    for kind in ("w1", "w2")
]
ODD = [
    "a",
    "a.b",
    "a.b.c",
    "b.a",
    "x-1.y",
    "x.1y",
    "a.bb",
    "layers.1.q",
    "layers.10.q",
    "layers.1.q.lin",
    "ünï.q",
    "b.a.b",
    "layers.1",
    "layers.1.qq",
]  # names that contain one another


@pytest.mark.parametrize("names", [ODD, EXPERTS], ids=["odd", "experts"])
@pytest.mark.parametrize("seed", range(3))
def test_an_expression_matches_exactly_its_names(names, seed):
    chosen = random.Random(seed).sample(names, len(names) // 2)
    expression = re.compile(expression_of(chosen))
    assert [name for name in names if expression.fullmatch(name)] == [name for name in names if name in chosen]
    assert not expression.fullmatch(f"{chosen[0]}x")
    assert not expression.fullmatch(f"x.{chosen[0]}")


def by_peft(patterns, name, default):
    return patterns.get(get_pattern_key(patterns.keys(), name), default)


@pytest.mark.parametrize("names", [ODD, EXPERTS], ids=["odd", "experts"])
@pytest.mark.parametrize("seed", range(3))
def test_patterns_give_every_layer_its_value_in_peft_and_here(names, seed):
    rng = random.Random(seed)
    values = {name: rng.choice([1, 2, 3]) for name in names if rng.random() < 0.8}
    patterns = patterns_for(values, names)
    ours = FirstMatch(patterns)
    for name in names:
        assert by_peft(patterns, name, 9) == ours.get(name, 9) == values.get(name, 9)
    assert len(patterns) <= (3 if len(values) > MANY else len(values))


PATTERNS = {
    "a name before an expression": {"^a\\.q": 1, ".*q": 2},
    "an expression before a name": {".*q": 2, "^a\\.q": 1},
    "one name twice": {"^a\\.q": 1, "q": 2, "^b\\.q": 3},
    "dots that are not escaped": {"a.q": 1, "^b.q": 2},
    "an alternative": {"^a\\.q|b\\.q": 1, "^c\\.q": 2},
    "a whole expression": {r"(.*\.)?c\.q": 4},
    "no key": {},
}


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
def test_the_first_match_is_that_of_peft(patterns):
    for name in ("a.q", "b.q", "c.q", "x.a.q", "aXq", "q", "bXq", "d.v"):
        assert FirstMatch(patterns).get(name, 9) == by_peft(patterns, name, 9)


@pytest.mark.parametrize("key", ["(", "[a", "*"])
def test_a_key_that_is_no_expression_is_named(key):
    with pytest.raises(BadPattern, match=re.escape(f"key '{key}'")):
        FirstMatch({"q": 1, key: 2})


def test_endings_are_the_targets_that_mean_a_name():
    names = ["a.b.c", "b", "x.b"]
    assert endings(names) == {"a.b.c", "b.c", "c", "b", "x.b"}
    assert all(any(targeted(name, ending) for name in names) for ending in endings(names))


@pytest.mark.parametrize("left_out", [0.0, 0.7], ids=["all kept", "most left out"])
def test_many_modules_of_many_ranks_are_written_so_that_peft_finds_each_quickly(tmp_path, left_out):
    tensors = {key: tensor for name in EXPERTS for key, tensor in pair(name, 6, 4, 5).items()}
    source = write_raw(tmp_path / "adapter", tensors, target_modules=["w1", "w2"])
    rng = random.Random(0)
    plan = {name: 0 if rng.random() < left_out else rng.choice([1, 2, 3, 4]) for name in EXPERTS}
    squeeze(open_adapter(source), Ranks("mine", plan), tmp_path / "out")

    config = read_config(tmp_path / "out")
    assert len(config["rank_pattern"]) + len(config["alpha_pattern"]) <= MANY * 2
    assert {name: by_peft(config["rank_pattern"], name, config["r"]) for name in EXPERTS if plan[name]} == {
        name: rank for name, rank in plan.items() if rank
    }
    kept = [name for name in EXPERTS if _is_adapted(config, name)]
    assert kept == [name for name in EXPERTS if plan[name]]
    assert open_adapter(tmp_path / "out").layers.keys() == set(kept)


def _is_adapted(config, name):
    fields = {field: config.get(field) for field in ("target_modules", "exclude_modules")}
    return bool(check_target_module_exists(LoraConfig(**fields), name))
