"""The same input, version and seed give the same bytes: in any number of threads, from any folder, by any way in."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from adapters import LLAMA, make_adapter, pair, snapshot, write_raw
from images import kohya_pair, save

from lora_squeeze import compress_adapter, open_adapter
from lora_squeeze.provenance import provenance_of

COMMANDS = """
    import sys
    from lora_squeeze.cli import main

    for line in sys.stdin:
        main(line.split(), standalone_mode=False)
"""

WAYS = [
    "compress SOURCE/large OUT/fixed --rank 8",
    "compress SOURCE/large OUT/energy --policy energy=0.7",
    "compress SOURCE/large OUT/half --retain 0.8 --dtype bf16 --overwrite",
    "compress SOURCE/large OUT/qr --rank 8 --method qr",
    "compress SOURCE/large OUT/randomized --rank 8 --method randomized",
    "compress SOURCE/llama OUT/llama --policy params=0.4 --for sglang",
    "compress SOURCE/kohya.safetensors OUT/kohya.safetensors --rank 2",
    "convert SOURCE/kohya.safetensors OUT/diffusers.safetensors --to diffusers",
    "plan SOURCE/large --policy stable-rank=1 -o OUT/ranks.json",
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    layers = {f"layer{n}": pair(f"layer{n}", 3000 - n, 48, 2100 + n, seed=n, dtype=torch.bfloat16) for n in range(5)}
    write_raw(folder / "large", {k: t for one in layers.values() for k, t in one.items()}, r=48, lora_alpha=12)
    make_adapter(folder / "llama", LLAMA, rank_pattern={"v_proj": 3})
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save(folder / "kohya.safetensors", kohya_pair(name, 8, 4, 6, alpha=2.0), metadata={"ss_network_dim": "4"})
    return folder


def run(source, output, folder, *, threads):
    """All commands in one new process."""
    output.mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    lines = "\n".join(WAYS).replace("SOURCE", str(source)).replace("OUT", str(output))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(threads), "TMPDIR": str(folder)}
    command = [sys.executable, "-c", textwrap.dedent(COMMANDS)]
    done = subprocess.run(
        command, input=lines, text=True, check=False, cwd=folder, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return snapshot(output)


def test_two_runs_give_the_same_bytes(sources, tmp_path):
    first = run(sources, tmp_path / "first", tmp_path / "here", threads=1)
    shutil.copytree(sources, tmp_path / "moved" / "elsewhere")
    second = run(tmp_path / "moved" / "elsewhere", tmp_path / "a" / "second", tmp_path / "there", threads=4)
    assert {name.partition("/")[0] for name in first} >= {"fixed", "energy", "kohya.safetensors", "ranks.json"}
    assert [name for name in {**first, **second} if first.get(name) != second.get(name)] == []


def test_the_command_line_and_python_give_the_same_bytes(sources, tmp_path):
    compress_adapter(sources / "large", tmp_path / "python", 8)
    command = [sys.executable, "-c", "from lora_squeeze.cli import main; main()", "compress", str(sources / "large")]
    subprocess.run([*command, str(tmp_path / "command"), "--rank", "8"], check=True, capture_output=True)
    assert snapshot(tmp_path / "python") == snapshot(tmp_path / "command")


def test_the_header_holds_no_path_and_no_time(sources, tmp_path):
    compress_adapter(sources / "large", tmp_path / "out", 8)
    adapter = open_adapter(tmp_path / "out")
    text = json.dumps(dict(adapter.metadata)) + json.dumps(dict(adapter.config))
    assert str(tmp_path) not in text
    assert str(sources) not in text
    assert set(vars(provenance_of(adapter))) == {
        "policy", "ranks", "scales", "source_sha256", "tensors_sha256", "relative_error", "ancestors", "source",
        "fitted", "version",
    }  # fmt: skip
