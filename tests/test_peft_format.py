"""What is read from a PEFT folder: PEFT's own scales and names, everything carried over, and clear refusals."""

import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from adapters import (
    BASES,
    BERT,
    CONFIG,
    CONVOLUTIONS,
    LLAMA,
    PREFIX,
    WEIGHTS,
    edit_config,
    edit_tensors,
    make_adapter,
    pair,
    ranks,
    read_config,
    scales,
    updates,
    write_raw,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lora_squeeze import compress_adapter, fixed, open_adapter, squeeze
from lora_squeeze.errors import AdapterError

# --- scales and ranks -------------------------------------------------------------------------------------------

Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
PATTERNS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha 1": {"lora_alpha": 1},
    "fractional alpha": {"lora_alpha": 0.3},
    "negative alpha": {"lora_alpha": -4},
    "rank_pattern": {"rank_pattern": {"v_proj": 3}},
    "rank_pattern, rslora": {"rank_pattern": {"v_proj": 3}, "use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 5}},
    "both": {"rank_pattern": {"v_proj": 3, "q_proj": 6}, "alpha_pattern": {"q_proj": 48}},
    "both, rslora": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 48}, "use_rslora": True},
    "first match wins": {"rank_pattern": {"q_proj": 2, Q0: 5}, "alpha_pattern": {Q0: 7, "q_proj": 9}},
    "first match wins, turned round": {"rank_pattern": {Q0: 5, "q_proj": 2}, "alpha_pattern": {"q_proj": 9, Q0: 7}},
    "suffix": {"rank_pattern": {"0.self_attn.q_proj": 3, "self_attn.v_proj": 4}},
    "part of a name": {"rank_pattern": {"proj": 3, "q_pro": 5, "f_attn.q_proj": 2}},
    "regex": {"rank_pattern": {r".*\.layers\.[0]\..*": 3}, "alpha_pattern": {r"layers\.\d+\.mlp\..*": 40}},
    "alternatives": {"rank_pattern": {"q_proj|v_proj": 3}},
    "anchors": {"rank_pattern": {f"^{Q0}": 3, f"^{Q1}$": 4}},
    "a dot is any character": {"rank_pattern": {"self.attn.q.proj": 3, "layers.1.mlp.down_proj": 2}},
    "keys that match nothing": {"rank_pattern": {"k_proj": 3, f"{PREFIX}{Q0}": 2}, "alpha_pattern": {"nowhere": 9}},
}


@pytest.mark.parametrize("lora", PATTERNS.values(), ids=PATTERNS)
def test_every_rank_and_scale_is_what_peft_computes(tmp_path, lora):
    folder = make_adapter(tmp_path / "adapter", **lora)
    edit_config(folder, **lora)  # PEFT sorts the keys of a pattern when it saves, not when it loads

    layers = open_adapter(folder).layers

    assert {name: spec.rank for name, spec in layers.items()} == ranks(LLAMA, folder)
    assert {name: spec.scale for name, spec in layers.items()} == pytest.approx(scales(LLAMA, folder), rel=1e-15)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_the_layers_are_the_updates_that_peft_applies(tmp_path, base):
    folder = make_adapter(tmp_path / "adapter", base, rank_pattern={"v_proj": 3, "first": 3, "query": 3, "c_fc": 3})
    adapter = open_adapter(folder)

    expected = updates(base, folder)

    assert set(adapter.layers) == set(expected)
    for name, dense in expected.items():
        layer, spec = adapter.load(name), adapter.layers[name]
        assert layer.scale == spec.scale
        assert layer.down.shape == (spec.rank, spec.in_features)
        assert layer.up.shape == (spec.out_features, spec.rank)
        torch.testing.assert_close(layer.scale * layer.up.double() @ layer.down.double(), dense)


def test_layers_of_a_multihead_attention_follow_its_rank_pattern(tmp_path):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(16, 4)
            self.linear = nn.Linear(16, 16)

    config = LoraConfig(r=8, lora_alpha=8, target_modules=["mha", "linear"], rank_pattern={"mha": 4})
    model = get_peft_model(Attending(), config)
    model.save_pretrained(str(tmp_path / "adapter"))

    layers = open_adapter(tmp_path / "adapter").layers

    ranks_and_scales = {(spec.rank, spec.scale) for name, spec in layers.items() if name.startswith("mha")}
    assert ranks_and_scales == {(4, 2.0)}
    assert (layers["linear"].rank, layers["linear"].scale) == (8, 1.0)


def test_kinds_and_kernels_of_convolutions_and_embeddings(tmp_path):
    layers = open_adapter(make_adapter(tmp_path / "adapter", CONVOLUTIONS)).layers
    assert {name: (spec.kind, spec.kernel) for name, spec in layers.items()} == {
        "embedding": ("embedding", ()),
        "first": ("conv", (3, 1)),
        "second": ("conv", (1, 1)),
        "sequence": ("conv", (3,)),
    }


def test_opening_reads_no_tensor(tmp_path):
    folder = make_adapter(tmp_path / "adapter")
    edit_tensors(folder, lambda tensors: [tensor.fill_(math.nan) for tensor in tensors.values()])
    adapter = open_adapter(folder)  # would fail if it looked at the values
    assert adapter.rank == 8
    assert adapter.parameters == sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())


# --- what is carried over ---------------------------------------------------------------------------------------


def carried_tensors(source: Path, output: Path) -> set[str]:
    """Keys of all tensors outside the LoRA pairs, which must be there again bit by bit."""
    before, after = load_file(source / WEIGHTS), load_file(output / WEIGHTS)
    keys = {key for key in before if not key.endswith((".lora_A.weight", ".lora_B.weight"))}
    assert set(after) == set(before)
    for key in keys:
        assert after[key].dtype == before[key].dtype
        assert torch.equal(after[key], before[key])
    return keys


CARRIED = {
    "modules_to_save": (BERT, {"modules_to_save": ["classifier"]}, "base_model.model.classifier.weight"),
    "lora_bias": (BERT, {"lora_bias": True}, "base_model.model.bert.pooler.dense.lora_B.bias"),
    "bias": (BERT, {"bias": "all"}, "base_model.model.bert.embeddings.LayerNorm.bias"),
    "dora": (LLAMA, {"use_dora": True}, f"base_model.model.{Q0}.lora_magnitude_vector"),
    "trainable tokens": (
        LLAMA,
        {"trainable_token_indices": [4, 29]},
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    ),
}


@pytest.mark.parametrize(("base", "lora", "one_of_them"), CARRIED.values(), ids=CARRIED)
def test_tensors_that_are_not_lora_pairs_keep_their_bits(tmp_path, base, lora, one_of_them):
    source = make_adapter(tmp_path / "adapter", base, **lora)
    compress_adapter(source, tmp_path / "out", 2)
    assert one_of_them in carried_tensors(source, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_other_tensors_may_have_any_dtype(tmp_path, dtype):
    extra = torch.arange(6).reshape(2, 3).to(dtype)
    source = write_raw(tmp_path / "adapter", {**pair("layer", 6, 4, 5), "extra": extra})

    compress_adapter(source, tmp_path / "out", 2)

    after = load_file(tmp_path / "out" / WEIGHTS)[f"{PREFIX}extra"]
    assert after.dtype == dtype
    assert torch.equal(after.view(torch.uint8), extra.view(torch.uint8))


def test_other_files_are_copied_and_training_state_stays_behind(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    kept = {
        "tokenizer.json": b"{}",
        "chat_template.jinja": "{{ 'ä' }}".encode(),
        "README.md": b"# mine\n",
        "additional/deep/notes.bin": bytes(range(256)),
    }
    left = [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "rng_state_0.pth",
        "trainer_state.json",
        "training_args.bin",
    ]
    for name, content in {**kept, **dict.fromkeys(left, b"state"), "checkpoint-10/optimizer.pt": b"state"}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)

    compression = compress_adapter(source, tmp_path / "out", 2)

    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {CONFIG, WEIGHTS, *kept}
    assert {name: (tmp_path / "out" / name).read_bytes() for name in kept} == kept
    (note,) = [note for note in compression.notes if "optimizer.pt" in note]
    assert "checkpoint-10" in note


def test_every_other_field_of_the_config_is_kept(tmp_path):
    source = make_adapter(
        tmp_path / "adapter",
        lora_dropout=0.1,
        layers_to_transform=[0, 1],
        exclude_modules=["lm_head"],
        use_rslora=True,
        alpha_pattern={"v_proj": 3},
    )
    edit_config(source, base_model_name_or_path="someone/model", revision="abc", unheard_of={"a": [1, None, "ä"]})

    compress_adapter(source, tmp_path / "out", 2)

    before, after = read_config(source), read_config(tmp_path / "out")
    adjusted = {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    assert {k: v for k, v in after.items() if k not in adjusted} == {
        k: v for k, v in before.items() if k not in adjusted
    }


def test_an_orthogonal_initialisation_still_loads_at_an_odd_rank(tmp_path):
    source = make_adapter(tmp_path / "adapter", init_lora_weights="orthogonal")
    compress_adapter(source, tmp_path / "out", 3)
    assert set(ranks(LLAMA, tmp_path / "out").values()) == {3}


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_read(tmp_path, init):
    assert open_adapter(write_raw(tmp_path / "a", pair("layer", 6, 4, 5), init_lora_weights=init)).layers


def test_metadata_of_the_source_file_is_kept(tmp_path):
    source = write_raw(tmp_path / "a", pair("layer", 6, 4, 5), metadata={"format": "pt", "trained_by": "me"})
    assert open_adapter(source).metadata["trained_by"] == "me"


# --- adapter_model.bin ------------------------------------------------------------------------------------------


def pickled(folder: Path) -> Path:
    """Turn a saved adapter into one with adapter_model.bin."""
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def test_pickled_weights_are_read(tmp_path):
    source = make_adapter(tmp_path / "adapter", BERT)
    twin = pickled(Path(shutil.copytree(source, tmp_path / "pickled")))

    compress_adapter(source, tmp_path / "out", 2)
    compression = compress_adapter(twin, tmp_path / "twin", 2)

    expected, actual = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "twin" / WEIGHTS)
    assert set(actual) == set(expected)
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())
    assert not (tmp_path / "twin" / "adapter_model.bin").exists()
    assert any("adapter_model.bin" in note for note in compression.notes)


@pytest.mark.parametrize("when", ["before it is read", "while it is squeezed"])
def test_pickled_weights_that_change_are_an_error(tmp_path, when):
    source = pickled(make_adapter(tmp_path / "adapter"))
    adapter = open_adapter(source)
    weights = source / "adapter_model.bin"

    def change(*_):
        os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))

    if when == "before it is read":
        change()
    with pytest.raises(AdapterError, match="changed while it was being read"):
        squeeze(adapter, fixed(adapter.layers.values(), 2), tmp_path / "out", on_layer=change)
    assert not (tmp_path / "out").exists()


def test_pickled_weights_may_be_views_of_each_other(tmp_path):
    source = write_raw(tmp_path / "adapter", pair("layer", 6, 4, 5))
    state = load_file(source / WEIGHTS)
    state[f"{PREFIX}extra"] = torch.arange(12.0).reshape(3, 4).T
    state[f"{PREFIX}wide"] = torch.ones(1, 3).expand(4, 3)
    torch.save(state, source / "adapter_model.bin")
    (source / WEIGHTS).unlink()

    compress_adapter(source, tmp_path / "out", 2)

    after = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(after[f"{PREFIX}extra"], state[f"{PREFIX}extra"])
    assert torch.equal(after[f"{PREFIX}wide"], state[f"{PREFIX}wide"])


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_malicious_pickle_is_refused_without_running_it(tmp_path, how):
    folder, marker = write_raw(tmp_path / "adapter", pair("layer", 6, 4, 5)), tmp_path / "executed"
    (folder / WEIGHTS).unlink()
    weights = folder / "adapter_model.bin"
    if how == "torch.save":
        torch.save({"layer": _Evil(marker)}, weights)
    else:
        weights.write_bytes(pickle.dumps({"layer": _Evil(marker)}))

    with pytest.raises(AdapterError, match=r"adapter_model\.bin"):
        open_adapter(folder)

    assert not marker.exists()
    pickle.loads(pickle.dumps(_Evil(marker)))
    assert marker.exists()  # it would have run


@pytest.mark.parametrize(
    "state",
    [
        [torch.zeros(2)],
        {"layer": 3},
        {1: torch.zeros(2)},
        {**{f"{PREFIX}{k}": v for k, v in pair("layer", 6, 4, 5).items()}, "sparse": torch.eye(2).to_sparse()},
    ],
    ids=["a list", "a number", "keys that are numbers", "a sparse tensor"],
)
def test_a_pickle_that_is_no_state_dict_is_an_error(tmp_path, state):
    folder = write_raw(tmp_path / "adapter", pair("layer", 6, 4, 5))
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin"):
        compress_adapter(folder, tmp_path / "out", 2)


def test_other_tensors_of_a_pickle_may_have_any_dtype(tmp_path):
    folder = write_raw(tmp_path / "adapter", pair("layer", 6, 4, 5))
    extra = torch.arange(6.0).to(torch.float8_e4m3fn)
    torch.save({**load_file(folder / WEIGHTS), "extra": extra}, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()

    compress_adapter(folder, tmp_path / "out", 2)

    after = load_file(tmp_path / "out" / WEIGHTS)["extra"]
    assert torch.equal(after.view(torch.uint8), extra.view(torch.uint8))
