"""check, and --for and --max-lora-rank of plan and compress."""

from pathlib import Path

import pytest
from adapters import (
    BERT,
    LLAMA,
    make_adapter,
    ranks,
    read_config,
    relative,
    truncation,
    updates,
)
from commands import invoke, prints, refuses, write_plan

from lora_squeeze.serving import RUNTIMES

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path) -> Path:
    return make_adapter(tmp_path / "adapter", alpha_pattern={"v_proj": 5})


# --- check ------------------------------------------------------------------------------------------------------


READ_PEFT = [name for name, runtime in RUNTIMES.items() if "peft" in runtime.formats]


@pytest.mark.parametrize("runtime", READ_PEFT)
def test_check_ends_with_0_where_the_adapter_is_loaded(tmp_path, runtime):
    plain = make_adapter(tmp_path / "adapter")
    text = prints("check", plain, "--for", runtime)
    assert f"{plain}: {runtime} loads it" in text
    assert "largest rank 8" in text


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "llamacpp"])
def test_check_ends_with_1_and_says_why_where_it_is_not(tmp_path, runtime):
    adapter = make_adapter(tmp_path / "adapter", BERT, modules_to_save=["classifier"], alpha_pattern={"query": 3})
    result = invoke("check", adapter, "--for", runtime)
    assert result.exit_code == 1
    assert f"{runtime} would not load it" in result.stdout
    assert "modules_to_save" in result.stdout
    assert "scale" in result.stdout
    assert RUNTIMES[runtime].source in result.stdout
    assert result.stderr == ""


def test_check_knows_the_cap_of_the_server(tmp_path):
    adapter = make_adapter(tmp_path / "adapter", r=24)
    result = invoke("check", adapter, "--for", "vllm")
    assert result.exit_code == 1
    assert "rank 24 is above max_lora_rank 16" in result.stdout
    assert "max_lora_rank 32" in prints("check", adapter, "--for", "vllm", "--max-lora-rank", 32)


def test_check_needs_to_know_for_which_runtime(adapter):
    assert "--for" in refuses("check", adapter, code=2)


def test_check_needs_a_runtime_and_a_cap_that_exist(adapter):
    assert "vllm" in refuses("check", adapter, "--for", "ollama", code=2)
    assert "max_lora_rank 17" in refuses("check", adapter, "--for", "vllm", "--max-lora-rank", 17)
    refuses("check", adapter, "--for", "vllm", "--max-lora-rank", 0, code=2)
    refuses("check", adapter.parent / "nowhere", "--for", "vllm")


@pytest.mark.parametrize("runtime", READ_PEFT)
def test_what_compress_writes_for_a_runtime_passes_its_check(tmp_path, adapter, runtime):
    prints("compress", adapter, tmp_path / "out", "--policy", "para-energy=0.8", "--for", runtime)
    assert "loads it" in prints("check", tmp_path / "out", "--for", runtime)


# --- --for and --max-lora-rank ----------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["sglang", "llamacpp"])
@pytest.mark.parametrize("how", [("--rank", 3), ("--retain", 0.9), ("--policy", "params=0.3")], ids=str)
def test_compress_for_runtimes_of_one_rank(tmp_path, runtime, how):
    adapter = make_adapter(tmp_path / "adapter", use_rslora=True, rank_pattern={"v_proj": 2})
    prints("compress", adapter, tmp_path / "out", "--for", runtime, *how)
    config = read_config(tmp_path / "out")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    assert set(ranks(LLAMA, tmp_path / "out").values()) == {config["r"]}


def test_an_edited_plan_is_padded_for_such_a_runtime(tmp_path, adapter):
    file = write_plan(tmp_path / "ranks.json", adapter, **{Q0: 5})
    prints("compress", adapter, tmp_path / "out", "--ranks", file, "--for", "sglang")
    assert set(ranks(LLAMA, tmp_path / "out").values()) == {5}
    before, after = updates(LLAMA, adapter), updates(LLAMA, tmp_path / "out")
    assert all(relative(after[n], truncation(before[n], 5 if n == Q0 else 2)) <= 1e-5 for n in before)


@pytest.mark.parametrize(
    "how", [(), ("--policy", "energy=0.999"), ("--policy", "params=0.9"), ("--retain", 0.999)], ids=str
)
def test_compress_stays_below_what_the_server_allows(tmp_path, how):
    adapter = make_adapter(tmp_path / "adapter", r=24)
    prints("compress", adapter, tmp_path / "default", "--for", "vllm", *how)
    assert read_config(tmp_path / "default")["r"] <= 16
    prints("compress", adapter, tmp_path / "eight", "--for", "vllm", "--max-lora-rank", 8, *how)
    assert read_config(tmp_path / "eight")["r"] <= 8


def test_a_server_that_does_not_exist_is_refused(tmp_path, adapter):
    refuses("compress", adapter, tmp_path / "out", "--for", "tgi", "--rank", 2, code=2)
    message = refuses("compress", adapter, tmp_path / "out", "--for", "vllm", "--max-lora-rank", 24, "--rank", 2)
    assert "16, 32" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "llamacpp"])
def test_what_a_server_cannot_load_is_refused_and_nothing_is_written(tmp_path, runtime):
    adapter = make_adapter(tmp_path / "adapter", use_dora=True)
    message = refuses("compress", adapter, tmp_path / "out", "--for", runtime, "--rank", 2)
    assert "use_dora" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
