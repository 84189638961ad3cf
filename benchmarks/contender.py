"""One contender, one process: `python -m benchmarks.contender NAME ADAPTER OUTPUT --threads N`.

Prints one JSON line: seconds and peak memory (MB) above what the imports took. All contenders do
the same job: analyze the adapter at rank 64 and write it at rank 16.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lora_squeeze import analyze, compress_adapter
from lora_squeeze.formats.tensors import (
    Block,
    TensorSpec,
    read_safetensors,
    write_safetensors,
)

RANK = 16
CANDIDATES = (1, 2, 4, 8, 16, 32, 64)


def lora_squeeze(adapter: Path, output: Path) -> None:
    """Compress and analyze in one pass; errors are measured, the output is read back and checked."""
    compression = compress_adapter(adapter, output, RANK)
    analyze(compression.spectra)


def straightforward(adapter: Path, output: Path) -> None:
    """Load everything, float32, QR + SVD once to analyze and once more to compress."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    for name in names:
        _, _, values, _ = _qr_svd(tensors, name)
        energies = values.square().cumsum(0) / values.square().sum()
        _ = [float(energies[rank - 1]) for rank in CANDIDATES]
    squeezed = {}
    for name in names:
        q_up, q_down, values, (left, right) = _qr_svd(tensors, name)
        root = values[:RANK].sqrt()
        squeezed[f"{name}.lora_B.weight"] = (q_up @ (left[:, :RANK] * root)).bfloat16()
        squeezed[f"{name}.lora_A.weight"] = ((root[:, None] * right[:RANK]) @ q_down.T).bfloat16().contiguous()
    output.mkdir()
    save_file(squeezed, output / "adapter_model.safetensors")


def _qr_svd(tensors: dict[str, torch.Tensor], name: str):
    q_up, r_up = torch.linalg.qr(tensors[f"{name}.lora_B.weight"].float())
    q_down, r_down = torch.linalg.qr(tensors[f"{name}.lora_A.weight"].float().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    return q_up, q_down, values, (left, right)


def floor(adapter: Path, output: Path) -> None:
    """The least that any exact route does: read, two float64 Grams, two thin products, write."""
    source = read_safetensors(adapter / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in source.tensors if key.endswith(".lora_A.weight")]
    projection = torch.randn(64, RANK)

    def block(name: str) -> Block:
        keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        inner, out = source.tensors[keys[0]].shape[1], source.tensors[keys[1]].shape[0]
        specs = (
            TensorSpec(keys[0], "BF16", (RANK, inner), 2 * RANK * inner),
            TensorSpec(keys[1], "BF16", (out, RANK), 2 * RANK * out),
        )
        return Block(specs, lambda: work(keys))

    def work(keys: tuple[str, str]) -> list[torch.Tensor]:
        down, up = (source.read(key) for key in keys)
        down32, up32 = down.float(), up.float()
        _gram(down.T)
        _gram(up)
        return [(projection.T @ down32).bfloat16(), (up32 @ projection).bfloat16()]

    output.mkdir()
    write_safetensors(output / "adapter_model.safetensors", [block(name) for name in names], {})


def _gram(tall: torch.Tensor) -> torch.Tensor:
    # Converted in blocks that stay in the cache, as the fastest variant that was found.
    total = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for rows in tall.split(1024):
        converted = rows.double()
        total.addmm_(converted.T, converted)
    return total


CONTENDERS: dict[str, Callable[[Path, Path], None]] = {
    "lora-squeeze": lora_squeeze,
    "straightforward": straightforward,
    "floor": floor,
}


def _resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _resident_mb("VmRSS")
    start = time.perf_counter()
    CONTENDERS[arguments.name](arguments.adapter, arguments.output)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": _resident_mb("VmHWM") - before}))


def _warm_up() -> None:
    """Torch's first call of each routine loads it: that belongs to the imports, for every contender."""
    square = torch.randn(64, 64, dtype=torch.float64)
    torch.linalg.svd(square)
    torch.linalg.qr(square.float())
    torch.linalg.cholesky_ex(square @ square.T)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(square.matmul, square).result()


if __name__ == "__main__":
    main()
