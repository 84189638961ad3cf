"""Use an installed lora-squeeze as a stranger would: python tests/wheel.py path/to/lora-squeeze (see .ci/wheel)."""

import json
import platform
import struct
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CORE = {"torch", "safetensors", "huggingface_hub", "click", "rich"}
EXTRAS = {"transformers", "peft", "datasets", "accelerate", "trl", "wandb", "ray", "matplotlib", "tinker", "lm_eval"}


def file_of(tensors: dict[str, Any]) -> bytes:
    """A safetensors file, written by hand: safetensors.torch would need NumPy."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for key, tensor in tensors.items():
        numbers = tensor.flatten().tolist()
        start, data = len(data), data + struct.pack(f"<{len(numbers)}f", *numbers)
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def main(program: str) -> None:
    """Every core command, on an adapter made here."""
    assert {name for name in CORE if find_spec(name) is None} == set()
    assert {name for name in EXTRAS if find_spec(name)} == set(), "something else brought an extra along"
    spec = find_spec("lora_squeeze")
    assert spec is not None
    assert spec.origin is not None
    assert "site-packages" in spec.origin, spec.origin
    assert (Path(spec.origin).parent / "py.typed").exists()

    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "adapter")
        folder.mkdir()
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for layer in range(2):
            key = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            tensors[f"{key}.lora_A.weight"] = torch.randn(8, 32, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(24, 8, generator=generator)
        (folder / "adapter_model.safetensors").write_bytes(file_of(tensors))
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        for arguments in (
            ["--version"],
            ["--help"],
            ["show", "adapter"],
            ["analyze", "adapter"],
            ["plan", "adapter", "--policy", "energy=0.9", "-o", "ranks.json"],
            ["compress", "adapter", "out", "--ranks", "ranks.json"],
            ["verify", "out", "adapter"],
            ["check", "out", "--for", "vllm"],
            ["compare", "adapter"],
        ):
            done = subprocess.run([program, *arguments], cwd=name, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
            assert "Traceback" not in done.stderr, done.stderr
    installed = sorted(f"{one.name} {one.version}" for one in distributions() if one.name in CORE | {"lora-squeeze"})
    print(f"Python {platform.python_version()}: the wheel works, with {', '.join(installed)}")


if __name__ == "__main__":
    main(sys.argv[1])
