"""lora-squeeze against PEFT's own conversion to a lower rank, `save_as_lora`: a dense SVD of each module."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.contender import RANK
from benchmarks.machine import table
from lora_squeeze import compress_adapter

SIZES = ((2048, 1), (4096, 1))  # (rows and columns of each module, modules)
SOURCE_RANK = 64
ROUNDS = 5  # of lora-squeeze; PEFT runs once


def section(scratch: Path) -> str:
    """Measure and describe; adapters and outputs go to the folder `scratch`."""
    try:
        import peft
    except ImportError:
        return "## PEFT's own conversion\n\nNot measured: PEFT is not installed."
    rows = [_row(scratch, size=size, modules=modules) for size, modules in SIZES]
    return "\n\n".join([
        "## PEFT's own conversion",
        f"`save_as_lora` of PEFT {peft.__version__} turns an adapter into one of lower rank by a dense float32 SVD of "
        f"each ΔW. Float32 adapters of rank {SOURCE_RANK} on square modules, written at rank {RANK}, with all cores. "
        "PEFT is given the model and the adapter in memory; lora-squeeze starts from the files and needs no model. "
        "Its time on so few modules is mostly opening, hashing, syncing and checking files, and PEFT's grows with the "
        "cube of the size: the ratio is larger on more and on larger modules. "
        f"PEFT ran once, lora-squeeze {ROUNDS} times (median).",
        table(("Modules", "PEFT", "lora-squeeze", "ratio"), rows),
    ])  # fmt: skip


def _row(scratch: Path, *, size: int, modules: int) -> tuple[str, ...]:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.conversion import save_as_lora

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(size, size, bias=False) for _ in range(modules)))
    config = LoraConfig(r=SOURCE_RANK, lora_alpha=SOURCE_RANK, target_modules=[str(index) for index in range(modules)])
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    source = scratch / f"peft {size}"
    adapted.save_pretrained(str(source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the adapter is a LoRA already
        theirs = _seconds(lambda: save_as_lora(scratch / f"peft {size} converted", adapted, rank=RANK))
    output = scratch / f"peft {size} squeezed"
    ours = median(_seconds(lambda: compress_adapter(source, output, RANK, overwrite=True)) for _ in range(ROUNDS))
    return f"{modules} of {size}×{size}", f"{theirs:.1f} s", f"{1000 * ours:.0f} ms", f"{theirs / ours:,.0f} ×"


def _seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start
