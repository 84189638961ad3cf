"""An adapter of a mixture of 60 × 384 experts, 69,120 modules: time and memory, in both ways that PEFT stores it.

`python -m benchmarks.seventy_thousand_modules ADAPTER OUTPUT` measures one adapter in this process and
prints a JSON list of its steps.
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.contender import WEIGHTS, resident_mb, warm_up
from benchmarks.machine import table
from lora_squeeze import analyze, decompose, open_adapter, squeeze
from lora_squeeze.formats.tensors import TensorSpec
from lora_squeeze.formats.writing import Block, write_safetensors
from lora_squeeze.verbs import choose_ranks

LAYERS, EXPERTS = 60, 384
HIDDEN, FFN = 1024, 512
RANK = 4
POLICY = "params=0.5"

INTRODUCTION = f"""\
bf16 factors of rank {RANK} on every expert of {LAYERS} layers with {EXPERTS} experts each (hidden {HIDDEN}, ffn {FFN}),
stored as modules (`experts.7.up_proj`, as under transformers 4: {LAYERS * EXPERTS * 3:,} of them) and as parameters
(`target_parameters`, as under transformers 5: {LAYERS * EXPERTS * 2:,} matrices). Ranks are chosen by `{POLICY}`: each
module gets its own, all experts of a parameter get the same. Processor seconds of one process with torch's default
threads, measured once. Peak memory is what the job adds to Python and torch: names, shapes, spectra and the file's
header, which grow with the number of layers; weights are held a few layers at a time."""


def section(scratch: Path) -> str:
    """Measure and describe; adapters and outputs go to the folder `scratch`."""
    rows: list[tuple[str, ...]] = []
    for kind, write in (("modules", _as_modules), ("parameters", _as_parameters)):
        adapter = scratch / f"experts as {kind}"
        write(adapter)
        size = (adapter / WEIGHTS).stat().st_size
        found = _measured(adapter, scratch / f"{kind} squeezed")
        shutil.rmtree(adapter)
        rows += [(f"{kind}, {size / 1e6:,.0f} MB: {one['step']}", *_cells(one)) for one in found]
    return "\n\n".join(
        ["## Seventy thousand modules", INTRODUCTION, table(("Step", "processor time", "peak memory so far"), rows)]
    )


def _cells(step: dict[str, Any]) -> tuple[str, str]:
    return f"{step['seconds']:.1f} s", f"{step['peak_mb']:.0f} MB"


def _measured(adapter: Path, output: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.seventy_thousand_modules", str(adapter), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _as_modules(folder: Path) -> None:
    shapes = {"gate_proj": (FFN, HIDDEN), "up_proj": (FFN, HIDDEN), "down_proj": (HIDDEN, FFN)}
    names = ((f"experts.{expert}.{name}", shape, 1) for expert in range(EXPERTS) for name, shape in shapes.items())
    _write(folder, list(names), {"target_modules": list(shapes)})


def _as_parameters(folder: Path) -> None:
    names = [("experts.base_layer", (2 * FFN, HIDDEN), EXPERTS), ("experts", (HIDDEN, FFN), EXPERTS)]
    targets = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    _write(folder, names, targets)


def _write(folder: Path, modules: list[tuple[str, tuple[int, int], int]], targets: dict[str, Any]) -> None:
    """An adapter whose layers have these modules: name, (outputs, inputs), matrices in it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(EXPERTS * RANK * HIDDEN, generator=generator).bfloat16()
    blocks = [
        _block(f"base_model.model.model.layers.{layer}.mlp.{name}", shape, count * RANK, noise)
        for layer in range(LAYERS)
        for name, shape, count in modules
    ]
    write_safetensors(folder / WEIGHTS, blocks, {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, **targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _block(key: str, shape: tuple[int, int], rows: int, noise: torch.Tensor) -> Block:
    """A pair; its factors are the same noise everywhere, with rows of `down` scaled at random."""
    sizes = (rows, shape[1]), (shape[0], rows)
    specs = tuple(
        TensorSpec(f"{key}.lora_{factor}.weight", "BF16", size, 2 * size[0] * size[1])
        for factor, size in zip("AB", sizes, strict=True)
    )

    def make() -> list[torch.Tensor]:
        scales = torch.rand(rows, 1, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))).bfloat16()
        down, up = (noise[: size[0] * size[1]].reshape(size) for size in sizes)
        return [down * scales, up]

    return Block(specs, make)


def _steps(adapter: Path, output: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    made: list[Any] = []  # the adapter, its decomposition, the plan
    yield "open", lambda: made.append(open_adapter(adapter))
    yield "decompose", lambda: made.append(decompose(made[0]))
    yield "analyze", lambda: analyze(made[1].spectra)
    yield f"choose ranks ({POLICY})", lambda: made.append(choose_ranks(made[1], POLICY))
    yield "compress, read back and check", lambda: squeeze(made[1], made[2], output)
    yield "open the result", lambda: open_adapter(output)


def main() -> None:
    adapter, output = map(Path, sys.argv[1:])
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident_mb("VmRSS")
    results: list[dict[str, Any]] = []
    for step, job in _steps(adapter, output):
        gc.collect()
        start = time.process_time()
        job()
        seconds = time.process_time() - start
        results.append({"step": step, "seconds": seconds, "peak_mb": resident_mb("VmHWM") - before})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
