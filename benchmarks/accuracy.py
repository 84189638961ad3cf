"""Error of the written adapter against the exact truncation, a float64 SVD of the whole update."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.contender import RANK, WEIGHTS
from benchmarks.machine import table, verdict
from benchmarks.synthetic import Shape, ill_conditioned_pair, mixed_pair, write_adapter
from lora_squeeze import compress_adapter
from lora_squeeze.spectrum import METHODS

SMALL = Shape("a small Llama shape", layers=2, hidden=512, ffn=1376, kv=128)
MODULES = SMALL.layers * len(SMALL.modules)
FLOAT32_ERROR = 1e-6  # target: relative to the exact truncation
BF16_RATIO = 1.05  # target: relative to rounding the exact factors to bf16
PREFIX = "base_model.model."

INTRODUCTION = f"""\
{MODULES} modules of a small Llama-like shape (hidden {SMALL.hidden}, ffn {SMALL.ffn}, kv {SMALL.kv}), rank 64 → {RANK}.
The reference is the rank-{RANK} truncation of the float64 SVD of each dense ΔW. The adapter that was written is
loaded back, ΔW' = scale · B · A is formed in float64, and the error is ‖ΔW' − reference‖ / ‖reference‖ (Frobenius),
for the worst module and over all modules together.

bf16: what can be expected is what rounding the exact balanced factors U√S and √S Vᵀ to bf16 costs, so that is
measured too. Ill-conditioned: both factors have condition number 1e10 and mixed columns, stored in float64.

"Reported error" is how far the relative error that lora-squeeze reports for a module, ‖ΔW' − ΔW‖ / ‖ΔW‖, is from
the one computed densely in float64: the largest relative deviation of all modules."""

Factors = dict[str, tuple[Tensor, Tensor]]  # module → (up, down), the scale in up


def section(scratch: Path) -> str:
    """Measure and describe; adapters and outputs go to the folder `scratch`."""
    rows = []
    for title, pair, dtype in (
        ("float32", mixed_pair, torch.float32),
        ("bf16", mixed_pair, torch.bfloat16),
        ("float64, condition 1e10", ill_conditioned_pair, torch.float64),
    ):
        adapter = write_adapter(scratch / title, SMALL, dtype=dtype, pair=pair)
        updates = {name: up @ down for name, (up, down) in _factors(adapter).items()}
        exact = {name: _truncated(update) for name, update in updates.items()}
        reference = {name: up @ down for name, (up, down) in exact.items()}
        for method in METHODS:
            output = scratch / f"{title} {method}"
            reported = compress_adapter(adapter, output, RANK, method=method).layers
            squeezed = _factors(output)
            worst, overall = _errors(squeezed, reference)
            deviation = max(
                abs(layer.relative_error / _errors({name: squeezed[name]}, {name: updates[name]})[0] - 1)
                for layer, name in zip(reported, updates, strict=True)
            )
            rows.append(_row(title, method, (worst, overall, deviation), exact, reference))
    heading = ("Adapter", "method", "worst module", "all modules", "reported error", "of rounding the exact factors")
    heading += ("target", "")
    return "\n\n".join(["## Accuracy", INTRODUCTION, table(heading, rows)])


def _row(
    title: str, method: str, errors: tuple[float, float, float], exact: Factors, reference: dict[str, Tensor]
) -> tuple[str, ...]:
    numbers = (title, f"`{method}`", *(f"{error:.1e}" for error in errors))
    worst, overall, _ = errors
    if title != "bf16":
        target = (f"≤ {FLOAT32_ERROR:g}", verdict(worst <= FLOAT32_ERROR)) if title == "float32" else ("", "")
        return (*numbers, "", *target)
    rounded = {name: tuple(factor.bfloat16().double() for factor in pair) for name, pair in exact.items()}
    worst_rounded, overall_rounded = _errors(rounded, reference)
    ratios = worst / worst_rounded, overall / overall_rounded
    share = f"{ratios[0]:.3f} × (worst), {ratios[1]:.3f} × (all)"
    return (*numbers, share, f"≤ {BF16_RATIO} ×", verdict(max(ratios) <= BF16_RATIO))


def _truncated(update: Tensor) -> tuple[Tensor, Tensor]:
    """The exact balanced factors of the best rank-RANK approximation."""
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    root = values[:RANK].sqrt()
    return left[:, :RANK] * root, root[:, None] * right[:RANK]


def _errors(found: Factors, reference: dict[str, Tensor]) -> tuple[float, float]:
    lost = {name: float((up @ down - reference[name]).square().sum()) for name, (up, down) in found.items()}
    size = {name: float(update.square().sum()) for name, update in reference.items()}
    worst = max(lost[name] / size[name] for name in reference)
    return worst**0.5, (sum(lost.values()) / sum(size.values())) ** 0.5


def _factors(adapter: Path) -> Factors:
    """Read with safetensors, not with the library that is measured."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / WEIGHTS)
    scale = config["lora_alpha"] / config["r"]
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    get: Callable[[str], Tensor] = lambda key: tensors[key].double()  # noqa: E731
    return {name: (scale * get(f"{name}.lora_B.weight"), get(f"{name}.lora_A.weight")) for name in names}
