"""The job of `benchmarks.speed` with device="cuda", beside the time of only moving its bytes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.contender import RANK, WEIGHTS
from benchmarks.machine import table
from benchmarks.synthetic import LLAMA_3_2_1B, LLAMA_3_8B, write_adapter
from lora_squeeze import analyze, compress_adapter
from lora_squeeze.formats.tensors import read_safetensors


def section(scratch: Path, *, rounds: int) -> str:
    """Measure and describe; adapters and outputs go to the folder `scratch`."""
    if not torch.cuda.is_available():
        return "## CUDA\n\nNot measured: no CUDA device was at hand when this page was written."
    rows = []
    for shape in (LLAMA_3_8B, LLAMA_3_2_1B):
        adapter = write_adapter(scratch / f"{shape.name} for CUDA", shape)
        (adapter / WEIGHTS).read_bytes()  # into the page cache
        jobs = {"cuda": squeeze_on_device, "moving the bytes": move, "cpu": squeeze_on_cpu}
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        for job in jobs.values():
            _seconds(job, adapter, scratch / "out")
        for _ in range(rounds):
            for name, job in jobs.items():
                seconds[name].append(_seconds(job, adapter, scratch / "out"))
        middle = {name: median(times) for name, times in seconds.items()}
        rows.append((
            shape.name,
            *(f"{middle[name]:.2f} s" for name in jobs),
            f"{middle['cuda'] / middle['moving the bytes']:.2f} ×",
        ))  # fmt: skip
        shutil.rmtree(adapter)
    return "\n\n".join([
        "## CUDA",
        f"`compress_adapter` with `device=\"cuda\"`, and `analyze`, on {torch.cuda.get_device_name()}: "
        f"rank 64 → {RANK}, bf16, all cores; medians of {rounds} rounds after one to warm up. "
        "Moving the bytes: read the file, copy every factor to the device, copy a quarter of it back, write that.",
        table(("Adapter", "device=cuda", "moving the bytes", "device=cpu", "cuda / moving"), rows),
    ])  # fmt: skip


def squeeze_on_device(adapter: Path, output: Path) -> None:
    analyze(compress_adapter(adapter, output, RANK, device="cuda").spectra)


def squeeze_on_cpu(adapter: Path, output: Path) -> None:
    analyze(compress_adapter(adapter, output, RANK).spectra)


def move(adapter: Path, output: Path, *, device: str = "cuda") -> None:
    source = read_safetensors(adapter / WEIGHTS)
    output.mkdir()
    with (output / WEIGHTS).open("wb") as file:
        for key in source.tensors:
            there = source.read(key, borrow_as="factor").to(device)
            back = there.flatten()[: there.numel() * RANK // 64].cpu()
            file.write(back.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _seconds(job: Callable[[Path, Path], None], adapter: Path, output: Path) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    job(adapter, output)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    shutil.rmtree(output)
    return seconds
