"""The promise: PEFT applies the squeezed adapter as it would the dense float64 truncation of the original."""

import math
from dataclasses import replace

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
    effect,
    make_adapter,
    pair,
    ranks,
    read_config,
    relative,
    scales,
    truncation,
    updates,
    write_raw,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lora_squeeze import (
    Ranks,
    compress,
    compress_adapter,
    decompose,
    fixed,
    open_adapter,
    save_adapter,
    squeeze,
)
from lora_squeeze.errors import AdapterError, RankError
from lora_squeeze.spectrum import METHODS

ADAPTERS = {
    "plain": (LLAMA, {}),
    "rslora": (LLAMA, {"use_rslora": True}),
    "alpha 1": (LLAMA, {"lora_alpha": 1}),
    "negative alpha": (LLAMA, {"lora_alpha": -8}),
    "rank_pattern": (LLAMA, {"rank_pattern": {"v_proj": 2, "0.mlp.down_proj": 5}}),
    "rank_pattern, rslora": (LLAMA, {"rank_pattern": {"v_proj": 2, "down_proj": 5}, "use_rslora": True}),
    "alpha_pattern": (LLAMA, {"alpha_pattern": {"v_proj": 3, "0.mlp.down_proj": 40}}),
    "alphas of opposite signs": (LLAMA, {"alpha_pattern": {"v_proj": -3}}),
    "an alpha of zero": (LLAMA, {"alpha_pattern": {"v_proj": 0}}),
    "both": (LLAMA, {"rank_pattern": {"v_proj": 2, "down_proj": 5}, "alpha_pattern": {"v_proj": 3, "q_proj": 40}}),
    "both, rslora": (LLAMA, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 40}, "use_rslora": True}),
    "rank above the module's size": (LLAMA, {"r": 64, "lora_alpha": 1}),
    "layer_replication": (LLAMA, {"layer_replication": [[0, 2], [1, 2]]}),
    "layers_to_transform": (LLAMA, {"layers_to_transform": [1]}),
    "trainable tokens": (LLAMA, {"trainable_token_indices": [4, 29]}),
    "dora": (LLAMA, {"use_dora": True}),
    "dora, rslora, patterns": (LLAMA, {"use_dora": True, "use_rslora": True, "alpha_pattern": {"v_proj": 3}}),
    "embedding": (LLAMA_EMBEDDING, {"alpha_pattern": {"embed_tokens": 3}}),
    "classifier": (BERT, {"modules_to_save": ["classifier"]}),
    "classifier, patterns": (BERT, {"modules_to_save": ["classifier"], "rank_pattern": {"value": 2}}),
    "lora_bias": (BERT, {"lora_bias": True}),
    "lora_bias, alpha_pattern": (BERT, {"lora_bias": True, "alpha_pattern": {"value": 3}}),
    "base biases": (BERT, {"bias": "all"}),
    "transposed weights": (GPT2, {"alpha_pattern": {"c_fc": 3}}),
    "convolutions": (CONVOLUTIONS, {"alpha_pattern": {"first": 3, "embedding": 30}, "rank_pattern": {"second": 2}}),
    "convolutions, dora": (CONVOLUTIONS, {"use_dora": True, "target_modules": ["first", "second"]}),
}
every_adapter = pytest.mark.parametrize(("base", "lora"), ADAPTERS.values(), ids=ADAPTERS)


@every_adapter
def test_the_model_answers_as_with_the_dense_truncation(tmp_path, base, lora):
    source = make_adapter(tmp_path / "adapter", base, **lora)

    compress_adapter(source, tmp_path / "out", 3)

    expected = effect(base, source, truncated_to=3)
    assert relative(effect(base, tmp_path / "out"), expected) <= 1e-5
    assert relative(effect(base, source), expected) > 1e-3  # there was something to lose


@every_adapter
def test_the_model_answers_as_before_at_full_rank(tmp_path, base, lora):
    source = make_adapter(tmp_path / "adapter", base, **lora)
    compress_adapter(source, tmp_path / "out", 64)
    assert relative(effect(base, tmp_path / "out"), effect(base, source)) <= 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_every_route_keeps_the_promise(tmp_path, method):
    source = make_adapter(tmp_path / "adapter", alpha_pattern={"v_proj": 3})
    compress_adapter(source, tmp_path / "out", 3, method=method)
    assert relative(effect(LLAMA, tmp_path / "out"), effect(LLAMA, source, truncated_to=3)) <= 1e-5


def test_squeezing_in_two_steps_ends_where_one_step_does(tmp_path):
    source = make_adapter(tmp_path / "adapter", use_rslora=True)
    compress_adapter(source, tmp_path / "between", 5)
    compress_adapter(tmp_path / "between", tmp_path / "out", 2)
    assert relative(effect(LLAMA, tmp_path / "out"), effect(LLAMA, source, truncated_to=2)) <= 1e-5


def test_a_squeezed_adapter_is_a_source_before_it_is_saved(tmp_path):
    # Several layers are in memory together here, of an adapter that computes them.
    tensors = {}
    for number in range(12):
        tensors |= pair(f"layers.{number}.q_proj", 60, 8, 40 + number, seed=number)
    source = write_raw(tmp_path / "adapter", tensors, r=8, target_modules=["q_proj"])
    first = compress(open_adapter(source), fixed(open_adapter(source).layers.values(), 6))
    save_adapter(first, tmp_path / "first")

    save_adapter(compress(first, fixed(first.layers.values(), 3)), tmp_path / "second")
    decomposed = decompose(first).spectra

    saved = open_adapter(tmp_path / "first")
    save_adapter(compress(saved, fixed(saved.layers.values(), 3)), tmp_path / "expected")
    found, expected = (open_adapter(tmp_path / name) for name in ("second", "expected"))
    for name in saved.layers:
        one, other = found.load(name), expected.load(name)
        assert relative(one.up @ one.down, other.up @ other.down) < 1e-5
    for spectrum, exact in zip(decomposed, decompose(saved).spectra, strict=True):
        assert spectrum.singular_values == pytest.approx(exact.singular_values, rel=1e-6)


def test_the_source_is_hashed_along_where_the_header_will_name_it_and_nowhere_else(tmp_path):
    asked: list[str] = []
    adapter = replace(open_adapter(make_adapter(tmp_path / "adapter")), hash_along=lambda: asked.append("hash"))
    squeezed = compress(adapter, fixed(adapter.layers.values(), 2))
    squeezed.load(next(iter(squeezed.layers)))
    save_adapter(adapter, tmp_path / "copy")
    assert asked == []
    save_adapter(squeezed, tmp_path / "out")
    assert asked == ["hash"]


def test_rank_and_scale_of_names_that_look_like_patterns(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.proj = nn.Linear(12, 12)
            self.inner = nn.ModuleDict(
                {"proj": nn.Linear(12, 12), "a+b (c)": nn.Linear(12, 12), "a|b": nn.Linear(12, 12)}
            )

        def forward(self, x):
            for module in (self.proj, *self.inner.values()):
                x = module(x).tanh()
            return x

    base = Base(Odd, (torch.linspace(-1, 1, 24).reshape(2, 12),), {"target_modules": ["proj", "a+b (c)", "a|b"]})
    source = make_adapter(tmp_path / "adapter", base)
    plan = {"proj": 2, "inner.proj": 5, "inner.a+b (c)": 3, "inner.a|b": 4}

    squeeze(open_adapter(source), Ranks("by hand", plan), tmp_path / "out")

    assert ranks(base, tmp_path / "out") == plan
    before, after = updates(base, source), updates(base, tmp_path / "out")
    for name, rank in plan.items():
        assert relative(after[name], truncation(before[name], rank)) < 1e-6


class _Attending(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mha = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.mha(x, x, x)[0])


_VECTORS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).double()
ATTENDING = Base(_Attending, (_VECTORS,), {"target_modules": ["mha", "head"]})


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"alpha_pattern": {"mha": 4}}], ids=str)
def test_a_multihead_attention_keeps_its_promise(tmp_path, lora):
    source = make_adapter(tmp_path / "adapter", ATTENDING, **lora)
    compress_adapter(source, tmp_path / "out", 3)
    assert relative(effect(ATTENDING, tmp_path / "out"), effect(ATTENDING, source, truncated_to=3)) <= 1e-5


def test_both_layers_of_a_multihead_attention_need_one_rank(tmp_path):
    adapter = open_adapter(make_adapter(tmp_path / "adapter", ATTENDING))
    plan = {name: 3 if name == "mha#in_proj" else 5 for name in adapter.layers}
    with pytest.raises(RankError, match="mha#in_proj"):  # PEFT has one pattern for both
        squeeze(adapter, Ranks("by hand", plan), tmp_path / "out")


# --- the configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "rank", "after"),
    [
        ({"r": 64, "lora_alpha": 1}, 8, 0.125),
        ({"r": 8, "lora_alpha": 4}, 1, 0.5),
        ({"r": 64, "lora_alpha": 16}, 10, 2.5),
        ({"r": 8, "lora_alpha": 16}, 4, 8),
        ({"r": 8, "lora_alpha": 16, "use_rslora": True}, 2, 8),
        ({"r": 64, "lora_alpha": 16, "use_rslora": True}, 4, 4),
        ({"r": 8, "lora_alpha": 16, "use_rslora": True}, 3, 16 * math.sqrt(3 / 8)),
    ],
    ids=str,
)
def test_alpha_keeps_the_scale(tmp_path, before, rank, after):
    source = make_adapter(tmp_path / "adapter", **before)

    compress_adapter(source, tmp_path / "out", rank)

    config = read_config(tmp_path / "out")
    assert config["r"] == rank
    assert config["lora_alpha"] == pytest.approx(after, rel=1e-15)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert scales(LLAMA, tmp_path / "out") == pytest.approx(scales(LLAMA, source), rel=1e-15)


@pytest.mark.parametrize("root", [False, True])
def test_a_server_that_ignores_patterns_applies_the_right_scale(tmp_path, root):
    source = make_adapter(
        tmp_path / "adapter", use_rslora=root, rank_pattern={"v_proj": 5}, alpha_pattern={"q_proj": 40, "v_proj": 2}
    )
    compress_adapter(source, tmp_path / "out", 3)
    expected = effect(LLAMA, source, truncated_to=3)

    edit_config(tmp_path / "out", rank_pattern={}, alpha_pattern={})

    assert relative(effect(LLAMA, tmp_path / "out"), expected) <= 1e-5


def test_the_most_common_scale_is_kept(tmp_path):
    source = make_adapter(tmp_path / "adapter", alpha_pattern={"0.self_attn.v_proj": 4})
    compress_adapter(source, tmp_path / "out", 3)
    assert set(scales(LLAMA, tmp_path / "out").values()) == {2.0}


# --- dtypes and bits --------------------------------------------------------------------------------------------


def dtypes(folder) -> dict[str, torch.dtype]:
    return {key: tensor.dtype for key, tensor in load_file(folder / WEIGHTS).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_kept(tmp_path, dtype):
    source = make_adapter(tmp_path / "adapter", dtype=dtype)
    compress_adapter(source, tmp_path / "out", 3)
    assert set(dtypes(source).values()) == {dtype}
    assert dtypes(tmp_path / "out") == dtypes(source)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)],
)
@pytest.mark.parametrize("rank", [3, 8])
def test_another_dtype_is_for_the_factors_alone(tmp_path, name, dtype, rank):
    source = make_adapter(tmp_path / "adapter", BERT, modules_to_save=["classifier"])

    compress_adapter(source, tmp_path / "out", rank, dtype=name)

    for key, found in dtypes(tmp_path / "out").items():
        assert found == (dtype if ".lora_" in key else torch.float32)


def test_a_bf16_adapter_written_as_f32_is_the_dense_truncation(tmp_path):
    source = make_adapter(tmp_path / "adapter", dtype=torch.bfloat16)
    compress_adapter(source, tmp_path / "out", 3, dtype="F32")
    assert relative(effect(LLAMA, tmp_path / "out"), effect(LLAMA, source, truncated_to=3)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_rounding_the_exact_answer(tmp_path, dtype):
    source = make_adapter(tmp_path / "adapter", dtype=dtype, alpha_pattern={"v_proj": 3})
    compress_adapter(source, tmp_path / "out", 3)

    before, after = updates(LLAMA, source), updates(LLAMA, tmp_path / "out")
    for name, scale in scales(LLAMA, tmp_path / "out").items():
        u, s, vh = torch.linalg.svd(before[name] / scale, full_matrices=False)
        up, down = ((side * s[:3].sqrt()).to(dtype).double() for side in (u[:, :3], vh[:3].T))
        exact = truncation(before[name], 3)
        assert relative(after[name], exact) <= 1.05 * relative(scale * up @ down.T, exact)


def test_dtypes_may_differ_between_layers_and_within_a_pair(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    mixed = [torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.float32]

    def mix(tensors):
        for place, key in enumerate(sorted(tensors)):
            tensors[key] = tensors[key].to(mixed[place % len(mixed)])

    edit_tensors(source, mix)
    compression = compress_adapter(source, tmp_path / "out", 3)

    assert dtypes(tmp_path / "out") == dtypes(source)
    assert len(set(dtypes(source).values())) == 4
    error = relative(effect(LLAMA, tmp_path / "out"), effect(LLAMA, source, truncated_to=3))
    assert error < 0.02  # what bf16 and f16 round away
    assert compression.relative_error < 0.9


def test_a_layer_of_lower_rank_keeps_its_bits(tmp_path):
    source = make_adapter(
        tmp_path / "adapter", dtype=torch.bfloat16, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 4}
    )
    compress_adapter(source, tmp_path / "out", 4)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    kept = [key for key in before if "v_proj" in key]
    assert len(kept) == 4
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert all(before[key].shape != after[key].shape for key in before if key not in kept)


@pytest.mark.parametrize("rank", [8, 9, 1000])
def test_a_rank_that_cuts_nothing_keeps_every_bit(tmp_path, rank):
    source = make_adapter(tmp_path / "adapter", BERT, modules_to_save=["classifier"], dtype=torch.float16)
    compression = compress_adapter(source, tmp_path / "out", rank)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert compression.relative_error == 0.0
    assert read_config(tmp_path / "out")["lora_alpha"] == 16


def test_a_layer_of_zeros_stays_zero_and_does_not_spoil_the_rest(tmp_path):
    source = make_adapter(tmp_path / "adapter", alpha_pattern={"down_proj": 3})
    zero = f"{PREFIX}model.layers.1.mlp.down_proj.lora_B.weight"
    edit_tensors(source, lambda tensors: tensors[zero].zero_())

    compression = compress_adapter(source, tmp_path / "out", 3)

    assert load_file(tmp_path / "out" / WEIGHTS)[zero].count_nonzero() == 0
    assert {s.spectrum.name: s.relative_error for s in compression.layers}["model.layers.1.mlp.down_proj"] == 0.0
    assert relative(effect(LLAMA, tmp_path / "out"), effect(LLAMA, source, truncated_to=3)) <= 1e-5


def test_a_fresh_adapter_is_squeezed_to_one_that_can_be_trained(tmp_path):
    get_peft_model(LLAMA.build(), LoraConfig(r=8, **LLAMA.lora)).save_pretrained(str(tmp_path / "adapter"))

    compression = compress_adapter(tmp_path / "adapter", tmp_path / "out", 3)

    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert compression.relative_error == 0.0
    assert all(t.count_nonzero() == 0 for key, t in tensors.items() if "lora_B" in key)
    assert all((t.norm(dim=1) > 0).all() and t.isfinite().all() for key, t in tensors.items() if "lora_A" in key)


def test_factors_that_would_overflow_the_new_dtype_are_an_error(tmp_path):
    source = write_raw(tmp_path / "adapter", {key: 1e6 * t for key, t in pair("layer", 6, 4, 5).items()})
    with pytest.raises(RankError, match=r"'layer'.*F16"):
        compress_adapter(source, tmp_path / "out", 2, dtype="F16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_name_layer_and_tensor(tmp_path, factor, value):
    source = make_adapter(tmp_path / "adapter")
    name = "model.layers.1.self_attn.v_proj"
    edit_tensors(source, lambda tensors: tensors[f"{PREFIX}{name}.{factor}.weight"].view(-1)[3].fill_(value))
    with pytest.raises(AdapterError, match=rf"'{name}'.*{factor}"):
        compress_adapter(source, tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_found_in_layers_that_keep_their_rank(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    edit_tensors(source, lambda tensors: next(iter(tensors.values())).fill_(math.nan))
    with pytest.raises(AdapterError, match="NaN"):
        compress_adapter(source, tmp_path / "out", 8)
