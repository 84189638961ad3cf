"""Every kind of module and variant that PEFT saves: squeezed, loaded by PEFT, compared with the exact truncation."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from adapters import (
    BERT,
    CONFIG,
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
    factors,
    load,
    lora_modules,
    make_adapter,
    output,
    pair,
    read_config,
    relative,
    truncation,
    write_raw,
)
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_squeeze import compress_adapter, decompose, open_adapter
from lora_squeeze.errors import AdapterError, UnsupportedAdapter
from lora_squeeze.verbs import choose_ranks


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 4, batch_first=True)
        self.linear = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.mha(x, x, x)[0])


class _Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(2, 6, (2, 3, 1))
        self.sequence = nn.Conv1d(6, 9, 3, padding=1)
        self.image = nn.Conv2d(1, 8, (3, 2), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.image(self.sequence(self.volume(x).flatten(2)).unsqueeze(1))


class _Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sequence = nn.Conv1d(8, 12, 3, groups=4)
        self.image = nn.Conv2d(6, 10, 2, groups=2)
        self.linear = nn.Linear(7, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.image(self.sequence(x).reshape(len(x), 6, 4, 8)).flatten(2)[..., :7])


def _seeded(kind: type[nn.Module]):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return kind()

    return build


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


ATTENTION = Base(_seeded(_Attention), (_noise(2, 5, 16),), {"target_modules": ["mha", "linear"]})
VOLUMES = Base(_seeded(_Volumes), (_noise(2, 2, 4, 5, 3),), {"target_modules": ["volume", "sequence", "image"]})
GROUPED = Base(_seeded(_Grouped), (_noise(2, 8, 18),), {"target_modules": ["sequence", "image", "linear"]})
# The tokens 3 and 4 activate the adapter in both rows.
_INVOKED = torch.cat([LLAMA.inputs[0], torch.tensor([[3, 4, 9]] * 2), LLAMA.inputs[0]], dim=1)
ACTIVATED = Base(LLAMA.build, (_INVOKED,), LLAMA.lora)

KINDS = {
    "attention": (ATTENTION, {}),
    "attention with a rank of its own": (ATTENTION, {"rank_pattern": {"mha": 6}, "alpha_pattern": {"mha": 5}}),
    "convolutions in one, two and three dimensions": (VOLUMES, {}),
    "embeddings and convolutions": (CONVOLUTIONS, {"use_rslora": True}),
    "tied embeddings": (LLAMA_EMBEDDING, {}),
    "fan_in_fan_out": (GPT2, {}),
    "layer_replication": (LLAMA, {"layer_replication": [[0, 2], [1, 2]]}),
    "activated LoRA": (ACTIVATED, {"alora_invocation_tokens": [3, 4]}),
    "lora_bias": (BERT, {"lora_bias": True, "alpha_pattern": {"query": 5}}),
    "biases": (BERT, {"bias": "all"}),
    "fully trained modules": (BERT, {"modules_to_save": ["classifier"]}),
    "trained tokens": (LLAMA, {"trainable_token_indices": [4, 29]}),
    "DoRA": (LLAMA, {"use_dora": True}),
    "DoRA on convolutions and embeddings": (CONVOLUTIONS, {"use_dora": True}),
    "DoRA with fan_in_fan_out": (GPT2, {"use_dora": True}),
}


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("base", "lora"), KINDS.values(), ids=KINDS)
def test_peft_applies_the_exact_truncation(tmp_path, base, lora, rank):
    source = make_adapter(tmp_path / "adapter", base, **lora)
    compress_adapter(source, tmp_path / "out", rank)

    assert relative(effect(base, tmp_path / "out"), effect(base, source, truncated_to=rank)) < 1e-5

    changed = {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    before, after = read_config(source), read_config(tmp_path / "out")
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}


@pytest.mark.parametrize(("base", "lora"), KINDS.values(), ids=KINDS)
def test_at_full_rank_every_bit_stays(tmp_path, base, lora):
    source = make_adapter(tmp_path / "adapter", base, **{**lora, "alpha_pattern": {}})
    compress_adapter(source, tmp_path / "out", 8)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert set(after) == set(before)
    if not lora.get("rank_pattern"):  # else the factors take up the difference in scale
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_fields_of_routing_and_the_like_are_kept(tmp_path):
    kept = {"arrow_config": {"top_k": 3, "router_temperature": 1.0}, "megatron_config": None, "runtime_config": {}}
    source = write_raw(tmp_path / "a", pair("layer", 6, 4, 5), **kept)
    compress_adapter(source, tmp_path / "out", 2)
    assert {field: read_config(tmp_path / "out")[field] for field in kept} == kept


# --- attention: two matrices, one rank --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["energy=0.5", "para-rank=0.3", "params=0.2", "knee"])
def test_both_projections_of_an_attention_get_one_rank(tmp_path, policy):
    source = make_adapter(tmp_path / "adapter", ATTENTION)
    edit_tensors(source, lambda tensors: tensors[f"{PREFIX}mha.lora_A.weight"].mul_(1e-3))
    plan = choose_ranks(decompose(open_adapter(source)), policy)
    assert plan.by_layer["mha#in_proj"] == plan.by_layer["mha#out_proj"] > 0


# --- grouped convolutions ---------------------------------------------------------------------------------------


@pytest.fixture
def grouped(tmp_path):
    with warnings.catch_warnings(action="ignore"):
        return make_adapter(tmp_path / "adapter", GROUPED)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*groups > 1")
def test_each_group_of_a_convolution_is_truncated_on_its_own(grouped, tmp_path):
    compress_adapter(grouped, tmp_path / "out", 1)

    model = load(GROUPED, grouped)
    for name, module in lora_modules(model):
        down, up = factors(module)
        groups = {"sequence": 4, "image": 2, "linear": 1}[name]
        for rows, outs in zip(down.chunk(groups), up.chunk(groups), strict=True):
            best = truncation(outs.flatten(1) @ rows.flatten(1), 1)
            u, s, vh = torch.linalg.svd(best, full_matrices=False)
            rows.zero_()[0] = vh[0].reshape(rows.shape[1:])
            outs.zero_()[:, 0] = (u[:, 0] * s[0]).reshape(outs[:, 0].shape)
    base = output(GROUPED.build().double().eval(), GROUPED)
    assert relative(effect(GROUPED, tmp_path / "out"), output(model, GROUPED) - base) < 1e-5
    ranks = {name: module.r["default"] for name, module in lora_modules(load(GROUPED, tmp_path / "out"))}
    assert ranks == {"sequence": 4, "image": 2, "linear": 1}


@pytest.mark.filterwarnings("ignore:.*groups > 1")
def test_groups_are_layers_of_one_rank(grouped):
    adapter = open_adapter(grouped)
    assert {name: spec.rank for name, spec in adapter.layers.items()} == {
        "image#0": 4,
        "image#1": 4,
        "linear": 8,
        **{f"sequence#{group}": 2 for group in range(4)},
    }
    plan = choose_ranks(decompose(adapter), "energy=0.6").by_layer
    assert plan["image#0"] == plan["image#1"]


# --- raw state dicts --------------------------------------------------------------------------------------------

RAW = {
    "llama": (LLAMA, {}),
    "embedding": (LLAMA_EMBEDDING, {}),
    "DoRA": (LLAMA, {"use_dora": True}),
    "biases of lora_B": (BERT, {"lora_bias": True}),
    "fully trained modules": (BERT, {"modules_to_save": ["classifier"]}),
    "trained tokens": (LLAMA, {"trainable_token_indices": [4, 29]}),
}


@pytest.mark.parametrize("adapter_name", ["default", "my_adapter"])
@pytest.mark.parametrize(("base", "lora"), RAW.values(), ids=RAW)
def test_the_adapter_name_in_raw_keys_makes_no_difference(tmp_path, base, lora, adapter_name):
    source = make_adapter(tmp_path / "adapter", base, **lora)
    model = PeftModel.from_pretrained(base.build(), str(source), adapter_name=adapter_name, is_trainable=True)
    raw = {name: tensor.data for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert any(f".{adapter_name}" in key for key in raw)
    twin = tmp_path / "raw"
    twin.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in raw.items()}, twin / WEIGHTS, metadata={"format": "pt"})
    (twin / CONFIG).write_text((source / CONFIG).read_text())

    compress_adapter(source, tmp_path / "out", 2)
    compression = compress_adapter(twin, tmp_path / "twin", 2)

    expected, actual = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "twin" / WEIGHTS)
    pairs = {key for key in expected if "base_layer" not in key}  # base weights, which PEFT adds when it saves
    assert pairs <= set(actual)
    assert all(torch.equal(actual[key], expected[key]) for key in pairs)
    assert any(f"'{adapter_name}'" in note for note in compression.notes)


def _renamed(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.replace(".weight", f".{name}.weight"): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("second", ["two", ""])
def test_two_adapters_in_a_file_are_an_error_that_names_both(tmp_path, second):
    other = pair("other", 6, 4, 5)
    tensors = {**_renamed(pair("layer", 6, 4, 5), "one"), **(_renamed(other, second) if second else other)}
    folder = write_raw(tmp_path / "a", tensors)
    with pytest.raises(AdapterError, match=rf"{WEIGHTS}.*different adapter names.*layer\.lora.*other\.lora"):
        open_adapter(folder)


# --- every key is accounted for ---------------------------------------------------------------------------------


def test_unknown_tensors_are_carried_over_and_reported(tmp_path):
    extra = {"layer.surprise": torch.arange(3.0), "head.weight": torch.ones(2)}
    source = write_raw(tmp_path / "a", {**pair("layer", 6, 4, 5), **extra}, modules_to_save=["head"])
    compression = compress_adapter(source, tmp_path / "out", 2)
    after = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(after[f"{PREFIX}{key}"], tensor) for key, tensor in extra.items())
    (note,) = [note for note in compression.notes if "unknown" in note]
    assert f"{PREFIX}layer.surprise" in note
    assert note.startswith("1 tensor ")


@pytest.mark.parametrize(("base", "lora"), [*KINDS.values()], ids=[*KINDS])
def test_nothing_that_peft_saves_is_unknown(tmp_path, base, lora):
    notes = open_adapter(make_adapter(tmp_path / "adapter", base, **lora)).notes
    assert not [note for note in notes if "unknown" in note]


@pytest.mark.parametrize("part", ["lora_E", "lora_diag", "lora_mid.weight"])
def test_a_third_factor_is_refused_by_file_and_key(tmp_path, part):
    folder = write_raw(tmp_path / "a", {**pair("layer", 6, 4, 5), f"layer.{part}": torch.ones(4)})
    with pytest.raises(UnsupportedAdapter, match=rf"{WEIGHTS}.*layer\.{part}"):
        open_adapter(folder)


# --- what is not LoRA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig], ids=["LoHa", "LoKr"])
def test_other_products_are_refused_and_peft_converts_them_as_the_message_says(tmp_path, config):
    model = get_peft_model(_seeded(_Attention)(), config(r=4, target_modules=["linear"], init_weights=False))
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UnsupportedAdapter, match=r"not LoRA.*save_as_lora\(folder, model, rank"):
        open_adapter(tmp_path / "adapter")

    from peft import save_as_lora

    save_as_lora(str(tmp_path / "converted"), model, rank=6)
    compress_adapter(tmp_path / "converted", tmp_path / "out", 2)
    assert open_adapter(tmp_path / "out").rank == 2


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_conversion_that_the_message_names_makes_it_loadable(tmp_path, init):
    base = _seeded(_Attention)
    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules=["linear"], init_lora_weights=init))
    initial = model.peft_config["default"].init_lora_weights
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "initial"))
    model.peft_config["default"].init_lora_weights = initial
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(str(tmp_path / "changed"))
    with pytest.raises(UnsupportedAdapter, match="path_initial_model_for_weight_conversion"):
        open_adapter(tmp_path / "changed")

    model.save_pretrained(
        str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    assert open_adapter(tmp_path / "converted").rank == 8


def test_dora_is_reported_as_an_approximation(tmp_path):
    source = make_adapter(tmp_path / "adapter", LLAMA, use_dora=True)
    (note,) = [note for note in compress_adapter(source, tmp_path / "out", 2).notes if "DoRA" in note]
    assert "approximation" in note
    assert "‖W + ΔW‖" in note


def test_the_configuration_stays_readable(tmp_path):
    source = make_adapter(tmp_path / "adapter", ATTENTION)
    edit_config(source, target_modules=["mha", "linear"])
    compress_adapter(source, tmp_path / "out", 2)
    text = Path(tmp_path / "out" / CONFIG).read_text()
    assert json.loads(text)["rank_pattern"] == {}
    assert "#" not in text
