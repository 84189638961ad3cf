"""What compress reports, how it applies plans, and how lazily."""

import hashlib
import json
import math
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from adapters import (
    LLAMA,
    PREFIX,
    WEIGHTS,
    make_adapter,
    pair,
    ranks,
    relative,
    truncation,
    updates,
    write_raw,
)
from safetensors import safe_open
from safetensors.torch import load_file

from lora_squeeze import (
    Adapter,
    Ranks,
    __version__,
    compress,
    compress_adapter,
    decompose,
    fixed,
    open_adapter,
    save_adapter,
    squeeze,
    variance,
)
from lora_squeeze.errors import AdapterError, RankError, SettingsError
from lora_squeeze.formats.tensors import read_safetensors
from lora_squeeze.verbs import choose_ranks

# --- what is reported -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}]
)
def test_reported_errors_and_sizes_are_those_of_the_files(tmp_path, dtype, lora):
    source = make_adapter(tmp_path / "adapter", dtype=dtype, **lora)

    compression = compress_adapter(source, tmp_path / "out", 3)

    before, after = updates(LLAMA, source), updates(LLAMA, tmp_path / "out")
    assert [layer.spectrum.name for layer in compression.layers] == list(open_adapter(source).layers)
    for layer in compression.layers:
        name = layer.spectrum.name
        assert layer.relative_error == pytest.approx(relative(after[name], before[name]), rel=1e-5, abs=1e-6)
        assert layer.spectrum.energy == pytest.approx(float(before[name].norm()) ** 2)
        assert layer.rank == min(3, layer.spectrum.rank)
    lost = sum(float((after[name] - before[name]).norm()) ** 2 for name in before)
    energy = sum(float(dense.norm()) ** 2 for dense in before.values())
    assert compression.relative_error == pytest.approx(math.sqrt(lost / energy), rel=1e-5)
    assert compression.retained_variance == pytest.approx(1 - lost / energy, rel=1e-5)
    assert compression.worst_layer.relative_error == max(layer.relative_error for layer in compression.layers)
    assert compression.rank == 3
    assert compression.bytes_before == (source / WEIGHTS).stat().st_size
    assert compression.bytes_after == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert compression.parameters_before == sum(t.numel() for t in load_file(source / WEIGHTS).values())
    assert compression.parameters_after == sum(t.numel() for t in load_file(tmp_path / "out" / WEIGHTS).values())
    assert (compression.source, compression.output) == (str(source), str(tmp_path / "out"))


def provenance(folder) -> dict:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    return json.loads(metadata["lora_squeeze"])


def test_the_header_tells_where_the_adapter_comes_from(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    result = compress_adapter(source, tmp_path / "out", 3)
    assert provenance(tmp_path / "out") == {
        "ancestors": [],
        "version": __version__,
        "source_sha256": hashlib.sha256((source / WEIGHTS).read_bytes()).hexdigest(),
        "tensors_sha256": read_safetensors(tmp_path / "out" / WEIGHTS).fingerprint(),
        "policy": "fixed=3",
        "ranks": 3,
        "scales": 2.0,
        "relative_error": f"{result.relative_error:.6e}",
    }


def test_the_header_tells_ranks_that_differ(tmp_path):
    source = make_adapter(tmp_path / "adapter", rank_pattern={"v_proj": 2})
    adapter = open_adapter(source)
    plan = variance(decompose(adapter).spectra, 0.9)
    squeeze(adapter, plan, tmp_path / "out")
    found = provenance(tmp_path / "out")
    assert found["policy"] == "variance=0.9"
    assert found["ranks"] == plan.by_layer
    assert ranks(LLAMA, tmp_path / "out") == plan.by_layer


def test_the_header_keeps_the_source_s_own_metadata(tmp_path):
    source = write_raw(tmp_path / "a", pair("layer", 6, 4, 5), metadata={"format": "pt", "trained by": "mé"})
    compress_adapter(source, tmp_path / "out", 2)
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as file:
        assert file.metadata()["trained by"] == "mé"


def test_the_same_squeeze_gives_the_same_bytes(tmp_path, four_workers):
    source = make_adapter(tmp_path / "adapter", dtype=torch.bfloat16)
    compress_adapter(source, tmp_path / "parallel", 3)
    torch.set_num_threads(1)
    compress_adapter(source, tmp_path / "alone", 3)
    assert (tmp_path / "parallel" / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()


def test_on_layer_is_told_every_layer(tmp_path):
    adapter = open_adapter(make_adapter(tmp_path / "adapter"))
    told: list[str] = []
    squeeze(adapter, fixed(adapter.layers.values(), 2), tmp_path / "out", on_layer=told.append)
    assert sorted(told) == sorted(adapter.layers)


# --- plans ------------------------------------------------------------------------------------------------------


def test_many_plans_can_be_applied_to_one_decomposition(tmp_path):
    source = make_adapter(tmp_path / "adapter", alpha_pattern={"v_proj": 3}, dtype=torch.bfloat16)
    decomposition = decompose(open_adapter(source))
    for rank in (5, 2, 7):
        from_basis = squeeze(decomposition, fixed(decomposition.spectra, rank), tmp_path / f"basis-{rank}")
        directly = compress_adapter(source, tmp_path / f"direct-{rank}", rank)
        files = [load_file(tmp_path / f"{way}-{rank}" / WEIGHTS) for way in ("basis", "direct")]
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[1])
        assert from_basis.layers == directly.layers


def test_every_layer_may_have_its_own_rank(tmp_path):
    source = make_adapter(tmp_path / "adapter", use_rslora=True)
    adapter = open_adapter(source)
    plan = Ranks("by hand", {name: 1 + place for place, name in enumerate(adapter.layers)})

    squeeze(adapter, Ranks.from_json(plan.to_json()), tmp_path / "out")

    assert ranks(LLAMA, tmp_path / "out") == plan.by_layer
    before, after = updates(LLAMA, source), updates(LLAMA, tmp_path / "out")
    for name, rank in plan.by_layer.items():
        assert relative(after[name], truncation(before[name], rank)) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unknown": 2}, "'unknown'"),
        ({"other": ...}, "'other'"),
        ({"layer": 5}, "'layer': rank 5"),
        ({"layer": 0, "other": 0}, "nothing"),
        ({"layer": -1}, "'layer': rank -1"),
    ],
    ids=str,
)
def test_a_plan_that_does_not_fit_is_an_error(tmp_path, change, message):
    adapter = open_adapter(write_raw(tmp_path / "a", {**pair("layer", 6, 4, 5), **pair("other", 6, 4, 5)}))
    plan = {name: rank for name, rank in {"layer": 2, "other": 2, **change}.items() if rank is not ...}
    with pytest.raises(RankError, match=message):
        compress(adapter, Ranks("by hand", plan))


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj", "down_proj"], r".*\.(q_proj|v_proj|down_proj)", "all-linear"],
    ids=["list", "regex", "all-linear"],
)
@pytest.mark.parametrize("left_out", ["v_proj", "layers.0.", "layers.1.mlp.down_proj"])
def test_a_layer_of_rank_zero_is_adapted_no_more(tmp_path, targets, left_out):
    source = make_adapter(tmp_path / "adapter", target_modules=targets)
    adapter = open_adapter(source)

    squeeze(
        adapter, Ranks("by hand", {name: 0 if left_out in name else 8 for name in adapter.layers}), tmp_path / "out"
    )

    before, after = updates(LLAMA, source), updates(LLAMA, tmp_path / "out")
    assert set(after) == {name for name in before if left_out not in name}
    assert 0 < len(after) < len(before)
    assert all(torch.equal(after[name], before[name]) for name in after)


# --- laziness ---------------------------------------------------------------------------------------------------


def test_compress_itself_reads_nothing(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    adapter = open_adapter(source)
    shutil.rmtree(source)
    squeezed = compress(adapter, fixed(adapter.layers.values(), 2))
    assert squeezed.rank == 2
    with pytest.raises(AdapterError, match=WEIGHTS):
        squeezed.load(next(iter(squeezed.layers)))


def test_loaded_layers_are_what_is_written_and_stay_as_they_are(tmp_path):
    adapter = open_adapter(make_adapter(tmp_path / "adapter", rank_pattern={"v_proj": 2}))
    squeezed = compress(adapter, fixed(adapter.layers.values(), 2))

    loaded = {name: squeezed.load(name) for name in squeezed.layers}
    save_adapter(squeezed, tmp_path / "out")

    written = load_file(tmp_path / "out" / WEIGHTS)
    for name, layer in loaded.items():
        assert torch.equal(layer.down, written[f"{PREFIX}{name}.lora_A.weight"])
        assert torch.equal(layer.up, written[f"{PREFIX}{name}.lora_B.weight"])


@pytest.mark.parametrize("dtype", ["BF16", "bf16", "bfloat16"])
def test_a_dtype_may_be_spelled_as_in_safetensors_or_in_torch(tmp_path, dtype):
    source = make_adapter(tmp_path / "adapter")
    adapter = open_adapter(source)
    compress_adapter(source, tmp_path / "out", 2, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    decomposition = decompose(adapter)
    assert choose_ranks(decomposition, "size=9kB", dtype=dtype) == choose_ranks(decomposition, "size=9kB", dtype="BF16")


def test_a_dtype_that_is_not_known_is_an_error(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    with pytest.raises(SettingsError, match="'int8' is not known; known are F64"):
        compress_adapter(source, tmp_path / "out", 2, dtype="int8")


def test_layers_that_are_expected_are_the_same_in_any_order(tmp_path):
    adapter = open_adapter(make_adapter(tmp_path / "adapter", dtype=torch.bfloat16, rank_pattern={"v_proj": 2}))
    squeezed = compress(adapter, fixed(adapter.layers.values(), 2))
    names = list(squeezed.layers)
    alone = {name: squeezed.load(name) for name in names}

    squeezed.expect([*names[:4], "of another adapter"])
    for name in (names[2], names[0], names[2], names[5], names[1], names[3]):
        layer = squeezed.borrow(name)
        assert layer.name == name
        assert torch.equal(layer.down, alone[name].down)
        assert torch.equal(layer.up, alone[name].up)


def test_only_a_few_layers_are_in_memory_at_a_time(tmp_path, four_workers):
    tensors = {key: tensor for place in range(60) for key, tensor in pair(f"layers.{place}", 30, 4, 20).items()}
    adapter = open_adapter(write_raw(tmp_path / "a", tensors))
    alive: set[int] = set()
    most = 0

    def watch(read):
        def loaded(name):
            nonlocal most
            layer = read(name)
            own = replace(layer, down=layer.down.clone(), up=layer.up.clone())
            alive.add(id(own.up))
            weakref.finalize(own.up, alive.discard, id(own.up))
            most = max(most, len(alive))
            return own

        return loaded

    watched: Adapter = replace(adapter, load=watch(adapter.load), borrow=watch(adapter.borrow))
    decomposition = decompose(watched)
    squeeze(decomposition, fixed(decomposition.spectra, 2), tmp_path / "out")

    assert 1 <= most <= 4 * 4  # a run of four per worker
    assert not alive
