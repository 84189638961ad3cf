"""PEFT loads adapters whose layers differ in rank, some left out: every module's update is the dense truncation."""

import pytest
import torch
from adapters import (
    BERT,
    CONVOLUTIONS,
    GPT2,
    LLAMA,
    LLAMA_EMBEDDING,
    WEIGHTS,
    Base,
    edit_config,
    lora_modules,
    make_adapter,
    read_config,
)
from peft import PeftModel
from plans import SCALES, check_against_dense_truncation, own_ranks, random_plan, squeezed
from safetensors.torch import load_file
from torch import nn

from lora_squeeze.errors import RankError, UnsupportedAdapter

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
    source = make_adapter(tmp_path / "adapter", trainable_token_indices=[4, 29])
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
