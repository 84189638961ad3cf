"""One contender, one process: `python -m benchmarks.contender NAME ADAPTER OUTPUT --cores N`.

Prints one JSON line: seconds and peak memory (MB) above what the imports took. All contenders do
the same job: analyze the adapter at rank 64 and write it at rank 16. The process is pinned to N
cores, helper threads included, and torch is given N threads.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lora_squeeze import analyze, compress_adapter
from lora_squeeze.formats.tensors import memory_of, read_safetensors
from lora_squeeze.scratch import scratch

RANK = 16
CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
WEIGHTS = "adapter_model.safetensors"


def lora_squeeze(adapter: Path, output: Path) -> None:
    """Compress and analyze in one pass; errors are measured, the output is synced, read back and checked."""
    compression = compress_adapter(adapter, output, RANK)
    analyze(compression.spectra)


def straightforward(adapter: Path, output: Path) -> None:
    """Load everything, float32, QR + SVD once to analyze and once more to compress."""
    tensors = load_file(adapter / WEIGHTS)
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
    save_file(squeezed, output / WEIGHTS)


def _qr_svd(tensors: dict[str, torch.Tensor], name: str):
    q_up, r_up = torch.linalg.qr(tensors[f"{name}.lora_B.weight"].float())
    q_down, r_down = torch.linalg.qr(tensors[f"{name}.lora_A.weight"].float().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    return q_up, q_down, values, (left, right)


def floor(adapter: Path, output: Path) -> None:
    """The least that any exact route does: read, two float64 Grams, two thin products, write.

    It decomposes nothing, hashes nothing, syncs nothing and checks nothing; the numbers it writes
    are meaningless. A worker a core, each with memory that it uses again.
    """
    source = read_safetensors(adapter / WEIGHTS)
    names = [key.removesuffix(".lora_A.weight") for key in source.tensors if key.endswith(".lora_A.weight")]
    projection = torch.randn(RANK, 64)
    output.mkdir()

    def work(name: str, position: int) -> None:
        down = source.read(f"{name}.lora_A.weight", borrow_as="down")
        up = source.read(f"{name}.lora_B.weight", borrow_as="up")
        _gram(down.T)
        _gram(up)
        for factor in (down, up.T):
            result = _product(projection, factor)
            position += os.pwrite(file.fileno(), memory_of(result), position)

    with (
        (output / WEIGHTS).open("wb") as file,
        ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        factors = [[source.tensors[f"{name}.lora_{factor}.weight"] for factor in "AB"] for name in names]
        # Factors of rank 64 in bf16 become factors of rank RANK in bf16.
        sizes = [sum(factor.nbytes * RANK // 64 for factor in pair) for pair in factors]
        list(pool.map(work, names, accumulate(sizes, initial=0)))


def _gram(tall: torch.Tensor) -> torch.Tensor:
    # Converted in blocks that stay in the cache, as the fastest variant that was found.
    total = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for rows in tall.split(2048):
        converted = _converted(rows, torch.float64)
        total.addmm_(converted.T, converted)
    return total


def _product(projection: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    upright = wide.stride(1) == 1
    rank, columns = len(projection), wide.shape[1]
    memory = scratch("result", (rank, columns) if upright else (columns, rank), torch.bfloat16, torch.device("cpu"))
    result = memory if upright else memory.T
    for source, target in zip(wide.split(8192, 1), result.split(8192, 1), strict=True):
        block = _converted(source, torch.float32)
        target.copy_(projection @ block if upright else (block.T @ projection.T).T)
    return memory


def _converted(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    upright = matrix.stride(1) == 1
    shape = matrix.shape if upright else matrix.T.shape
    memory = scratch("converted", shape, dtype, torch.device("cpu"))
    return (memory if upright else memory.T).copy_(matrix)


CONTENDERS: dict[str, Callable[[Path, Path], None]] = {
    "floor": floor,
    "straightforward": straightforward,
    "lora-squeeze": lora_squeeze,
}


def pin(cores: int) -> None:
    """Keep this process, with the threads it has and will have, on the first `cores` cores it may use."""
    available = sorted(os.sched_getaffinity(0))
    if len(available) < cores:
        raise SystemExit(f"{cores} cores were asked for, but this process may use {len(available)}")
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), available[:cores])
    torch.set_num_threads(cores)


def warm_up() -> None:
    """What belongs to the imports, for every contender: torch loads each routine when it is first called.

    And the imports leave enough garbage for a full collection, 0.1 s that would hit whoever allocates next.
    """
    square = torch.randn(64, 64, dtype=torch.float64)
    torch.linalg.svd(square)
    torch.linalg.eigh(square @ square.T)
    torch.linalg.qr(square.float())
    torch.linalg.cholesky_ex(square @ square.T)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(square.matmul, square).result()
    gc.collect()


def resident_mb(field: str) -> float:
    """Resident memory of this process now (VmRSS) or at its peak (VmHWM), in units of 10^6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--cores", type=int, default=1)
    arguments = parser.parse_args()
    pin(arguments.cores)
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident_mb("VmRSS")
    start = time.perf_counter()
    CONTENDERS[arguments.name](arguments.adapter, arguments.output)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": resident_mb("VmHWM") - before}))


if __name__ == "__main__":
    main()
