"""lora-squeeze's merge against PEFT's `add_weighted_adapter(combination_type="svd")`: a dense SVD of each module.

python -m benchmarks --only merging
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import table
from lora_squeeze import fixed, open_adapter, squeeze
from lora_squeeze.merging import merge

SIZES = ((1024, 4), (2048, 2), (4096, 1))  # (rows and columns of each module, modules)
SOURCE_RANK = 64
RANK = 32
WEIGHTS = (0.7, 0.3)
NAMES = ("one", "other")
ROUNDS = 5  # of lora-squeeze; PEFT runs once


def section(scratch: Path) -> str:
    """Measure and describe; adapters and outputs go to the folder `scratch`."""
    try:
        import peft
    except ImportError:
        return "## PEFT's own merging\n\nNot measured: PEFT is not installed."
    rows = [_row(scratch, size=size, modules=modules) for size, modules in SIZES]
    return "\n\n".join([
        "## PEFT's own merging",
        f'`add_weighted_adapter(combination_type="svd")` of PEFT {peft.__version__} adds the dense updates and takes a '
        f"float32 SVD of each. Two float32 adapters of rank {SOURCE_RANK} on square modules, weights "
        f"{' and '.join(map(str, WEIGHTS))}, to rank {RANK}, with all cores. PEFT has the model and both adapters in "
        "memory and leaves the result there; lora-squeeze reads and writes files and needs no model. The difference is "
        "that of the results, relative and Frobenius, over the modules. Processor time of one run of PEFT and the "
        f"least of {ROUNDS} of lora-squeeze.",
        table(("Modules", "PEFT", "lora-squeeze", "ratio", "difference"), rows),
    ])  # fmt: skip


def _row(scratch: Path, *, size: int, modules: int) -> tuple[str, ...]:
    folders = [scratch / f"merge {size} {name}" for name in NAMES]
    model = _two_adapters(size, modules, folders)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _seconds(
            lambda: model.add_weighted_adapter(
                list(NAMES), list(WEIGHTS), "sum", combination_type="svd", svd_rank=RANK, svd_full_matrices=False
            )
        )
    output = scratch / f"merge {size} merged"
    ours = min(_seconds(lambda: _merge(folders, output)) for _ in range(ROUNDS))
    return (
        f"{modules} of {size}×{size}",
        f"{theirs:.1f} s",
        f"{1000 * ours:.0f} ms",
        f"{theirs / ours:,.0f} ×",
        f"{_difference(model, output):.1e}",
    )


def _two_adapters(size: int, modules: int, folders: list[Path]) -> Any:
    """A model with two adapters, which are saved as well."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    linears = (torch.nn.Linear(size, size, bias=False) for _ in range(modules))
    targets = [str(index) for index in range(modules)]
    config = LoraConfig(r=SOURCE_RANK, lora_alpha=SOURCE_RANK, target_modules=targets)
    model = get_peft_model(torch.nn.Sequential(*linears), config, adapter_name=NAMES[0])
    model.add_adapter(NAMES[1], config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # Spectra that decay: the truncation at RANK is then well defined.
            decay = torch.logspace(0, -2, SOURCE_RANK)
            parameter.data = 0.01 * decay * torch.randn(parameter.shape)
    for name, folder in zip(NAMES, folders, strict=True):
        model.save_pretrained(str(folder), selected_adapters=[name])
        folder.joinpath(name).rename(folder / "adapter")
    return model


def _merge(folders: list[Path], output: Path) -> None:
    merged = merge([open_adapter(folder / "adapter") for folder in folders], WEIGHTS)
    squeeze(merged, fixed(merged.layers.values(), RANK), output, overwrite=True)


def _difference(model: Any, output: Path) -> float:
    """‖ours − PEFT's‖_F / ‖PEFT's‖_F over all modules."""
    ours, squares, total = open_adapter(output), 0.0, 0.0
    for name in ours.layers:
        layer = ours.load(name)
        theirs = model.base_model.model.get_submodule(name).get_delta_weight("sum").double()
        squares += float((layer.scale * layer.up.double() @ layer.down.double() - theirs).square().sum())
        total += float(theirs.square().sum())
    return (squares / total) ** 0.5


def _seconds(job: Callable[[], object]) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start
