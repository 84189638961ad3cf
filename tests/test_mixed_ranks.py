"""PEFT loads adapters whose layers differ in rank, some left out: every module's update is the dense truncation."""

import math
import random
import warnings

import pytest
import torch
from adapters import (
    BERT,
    CONVOLUTIONS,
    GPT2,
    LLAMA,
    LLAMA_EMBEDDING,
    PREFIX,
    WEIGHTS,
    Base,
    edit_config,
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
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from lora_squeeze import Ranks, decompose, open_adapter, squeeze
from lora_squeeze.errors import RankError, UnsupportedAdapter
from lora_squeeze.policies import para_rank

# --- the check --------------------------------------------------------------------------------------------------


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


# --- how modules are targeted, and how they are scaled ----------------------------------------------------------

TARGETS = {
    "list": (LLAMA, {}),
    "list, exclude list": (LLAMA, {"exclude_modules": ["layers.1.self_attn.q_proj"]}),
    "list, exclude regex": (LLAMA, {"exclude_modules": r".*\.0\..*v_proj"}),
    "list of whole names": (
        LLAMA,
        {"target_modules": [f"model.layers.{k}.self_attn.{m}_proj" for k in (0, 1) for m in "qkv"]},
    ),
    "regex": (LLAMA, {"target_modules": r".*\.(q_proj|v_proj|down_proj)"}),
    "regex, exclude list": (LLAMA, {"target_modules": r".*_proj", "exclude_modules": ["o_proj", "up_proj"]}),
    "regex, exclude regex": (LLAMA, {"target_modules": r"model\..*_proj", "exclude_modules": r".*\.mlp\..*"}),
    "regex, alternatives excluded": (
        LLAMA,
        {"target_modules": r".*_proj", "exclude_modules": r".*\.up_proj|.*\.gate_proj"},
    ),
    "some layers": (LLAMA, {"layers_to_transform": [1]}),
    "replicated layers": (LLAMA, {"layer_replication": [[0, 2], [1, 2]]}),
    "classifier": (BERT, {"modules_to_save": ["classifier"]}),
    "classifier, regex": (BERT, {"target_modules": r".*\.(query|value|output\.dense)"}),
    "classifier, exclude list": (BERT, {"exclude_modules": ["pooler.dense", "0.attention.self.query"]}),
    "transposed weights": (GPT2, {}),
    "embedding": (LLAMA_EMBEDDING, {}),
    "convolutions": (CONVOLUTIONS, {}),
}
SCALES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"v_proj": 3, "0.mlp.down_proj": 5, "value": 3, "c_fc": 4, "second": 3},
        "alpha_pattern": {"q_proj": 3, "1.self_attn.v_proj": 40, "query": 3, "first": 40, "c_attn": 1},
    },
    "patterns, rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 3, "value": 3}, "alpha_pattern": {"q_proj": 5}},
}


@pytest.mark.parametrize("scaled", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize(("base", "targets"), TARGETS.values(), ids=TARGETS)
def test_every_module_gets_its_truncation(tmp_path, base, targets, scaled):
    source = make_adapter(tmp_path / "adapter", base, **targets, **scaled)
    plan = squeezed(source, random_plan(own_ranks(source), seed=7), tmp_path / "out")
    assert 0 in plan.values()
    check_against_dense_truncation(base, source, tmp_path / "out", plan)


@pytest.mark.parametrize("base", [LLAMA, BERT], ids=["llama", "bert"])
@pytest.mark.parametrize("excluded", [..., ["layers.1.self_attn.o_proj", "pooler.dense"], r".*(o_proj|pooler\.dense)"])
@pytest.mark.parametrize("spelled_out", [False, True])
def test_all_linear_modules_but_those_left_out(tmp_path, base, excluded, spelled_out):
    lora = {"target_modules": "all-linear"} | ({} if excluded is ... else {"exclude_modules": excluded})
    source = make_adapter(tmp_path / "adapter", base, **lora)
    if spelled_out:  # PEFT writes a list when it saves
        edit_config(source, target_modules="all-linear")
    plan = squeezed(source, random_plan(own_ranks(source), seed=2), tmp_path / "out")
    check_against_dense_truncation(base, source, tmp_path / "out", plan)
    if spelled_out:
        assert read_config(tmp_path / "out")["target_modules"] == "all-linear"


@pytest.mark.parametrize("seed", range(8))
def test_random_plans(tmp_path, seed):
    source = make_adapter(tmp_path / "adapter", target_modules=r".*_proj", alpha_pattern={"q_proj": 5}, seed=seed)
    plan = squeezed(source, random_plan(own_ranks(source), seed=seed, zeros=0.1 * seed), tmp_path / "out")
    check_against_dense_truncation(LLAMA, source, tmp_path / "out", plan)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], r".*\.(q_proj|v_proj|down_proj)"])
@pytest.mark.parametrize(
    "left_out",
    [["v_proj"], ["q_proj", "down_proj"], ["0.self_attn.v_proj"], ["v_proj", "1.mlp.down_proj"], ["layers.0."]],
    ids=str,
)
def test_modules_that_are_left_out_are_not_adapted(tmp_path, targets, left_out):
    source = make_adapter(tmp_path / "adapter", target_modules=targets)
    plan = {name: 0 if any(part in name for part in left_out) else 3 for name in own_ranks(source)}
    assert 0 < list(plan.values()).count(0) < len(plan)

    squeezed(source, plan, tmp_path / "out")

    check_against_dense_truncation(LLAMA, source, tmp_path / "out", plan)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert len(tensors) == 2 * sum(rank > 0 for rank in plan.values())


def test_a_module_type_that_is_left_out_whole_is_no_target_any_more(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    squeezed(source, {name: 0 if "v_proj" in name else 3 for name in own_ranks(source)}, tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    assert not config["exclude_modules"]


def test_an_adapter_of_a_single_module(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    plan = dict.fromkeys(own_ranks(source), 0) | {"model.layers.1.self_attn.v_proj": 2}
    squeezed(source, plan, tmp_path / "out")
    check_against_dense_truncation(LLAMA, source, tmp_path / "out", plan)


def test_trained_tokens_stay_when_layers_are_left_out(tmp_path):
    source = make_adapter(tmp_path / "adapter", trainable_token_indices=[1, 5])
    plan = random_plan(own_ranks(source), zeros=0.5)
    squeezed(source, plan, tmp_path / "out")
    check_against_dense_truncation(LLAMA, source, tmp_path / "out", plan)
    (key,) = (key for key in load_file(source / WEIGHTS) if "trainable_tokens" in key)
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[key], load_file(source / WEIGHTS)[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(tmp_path, dtype):
    source = make_adapter(tmp_path / "adapter", dtype=dtype, alpha_pattern={"v_proj": 3})
    plan = squeezed(source, random_plan(own_ranks(source), seed=1), tmp_path / "out")
    check_against_dense_truncation(
        LLAMA, source, tmp_path / "out", plan, tolerance=1e-5 if dtype == torch.float64 else 0.02
    )


# --- names ------------------------------------------------------------------------------------------------------


def odd_base(*names):
    """A model with a linear module under each of these dotted names."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            for name in names:
                *parents, last = name.split(".")
                place = self
                for parent in parents:
                    if parent not in place._modules:
                        place.add_module(parent, nn.Module())
                    place = place._modules[parent]
                place.add_module(last, nn.Linear(12, 10))

        def forward(self, x):
            return sum(module(x) for module in self.modules() if hasattr(module, "in_features"))

    return Base(Odd, (torch.linspace(-1, 1, 24).reshape(2, 12),), {"target_modules": list(names)})


NAMES = {
    "prefixes": ["layers.1", "layers.11", "layers.111", "layers.2"],
    "prefixes of a path": ["h.1.q", "h.11.q", "h.1.q_proj", "xh.1.q", "h.1.k"],
    "suffixes": ["proj", "inner.proj", "inner.most.proj", "my_proj"],
    "a path inside another": ["layers.0.q", "encoder.layers.0.q", "decoder.layers.0.q", "layers.1.q"],
    "regular expressions": [
        "proj+x",
        "projjx",
        "a|b",
        "a",
        "b",
        "w[0]",
        "w0",
        "up (gate)",
        "up gate",
        "^q$",
        "q",
        "d\\d",
    ],
    "the same characters below": ["m.proj+x", "n.proj+x", "m.projjx", "n.projjx"],
    "any character for a dot": ["a.b.q", "a.bxq", "axb.q"],
}


@pytest.mark.parametrize("zeros", [0, 0.4])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_names_that_contain_each_other_are_told_apart(tmp_path, names, seed, zeros):
    base = odd_base(*names)
    source = make_adapter(tmp_path / "adapter", base)
    plan = random_plan(own_ranks(source), seed=seed, zeros=zeros)
    squeezed(source, plan, tmp_path / "out")
    check_against_dense_truncation(base, source, tmp_path / "out", plan)


@pytest.mark.parametrize("excluded", [["nothing.else"], r"nothing\.else", r"(?i)NOTHING\.ELSE"])
@pytest.mark.parametrize("left_out", ["proj", "inner.proj"])
def test_leaving_out_one_of_two_modules_where_one_name_ends_in_the_other(tmp_path, left_out, excluded):
    base = odd_base("proj", "inner.proj", "nothing.else")
    source = make_adapter(tmp_path / "adapter", base, target_modules=["proj", "else"], exclude_modules=excluded)
    plan = {"proj": 2, "inner.proj": 2} | {left_out: 0}
    squeezed(source, plan, tmp_path / "out")
    check_against_dense_truncation(base, source, tmp_path / "out", plan)


def test_both_halves_of_a_multihead_attention_have_one_rank_in_peft(tmp_path):
    """PEFT gives in_proj and out_proj the rank of the whole: other plans are refused, or come out right."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.mha = nn.MultiheadAttention(16, 4, batch_first=True)
            self.head = nn.Linear(16, 16)

    base = Base(Attending, (), {"target_modules": ["mha", "head"]})
    source = make_adapter(tmp_path / "adapter", base)
    own = own_ranks(source)
    assert len(own) == 3
    for number, plan in enumerate([dict(zip(own, (2, 3, 4), strict=True)), dict(zip(own, (0, 3, 0), strict=True))]):
        try:
            squeezed(source, plan, tmp_path / f"out-{number}")
        except (RankError, UnsupportedAdapter):
            assert not (tmp_path / f"out-{number}").exists()
        else:
            model = PeftModel.from_pretrained(base.build(), str(tmp_path / f"out-{number}"))
            found = {name: module.r["default"] for name, module in lora_modules(model)}
            assert found == {name: rank for name, rank in plan.items() if rank}


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
