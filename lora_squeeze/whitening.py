"""The kernel in the metric of data: the change of basis that loses least of a layer's output.

With M_A = E[(A x)(A x)^T] in the place of A A^T, and optionally M_B = E[(B^T g)(B^T g)^T] in that of
B^T B, the roots M_A = L_A L_A^T and M_B = L_B L_B^T give, by the same formulas as in
`lora_squeeze.spectrum`, the P and Q that minimise

    E‖ΔW x − ΔW' x‖²        (with M_B: the mean square change of the loss, to first order)

over all updates of rank k: what whitening with the full covariance of x (n×n) would find, from r×r
numbers. The squared singular values are energies of the output, comparable across layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_squeeze.adapter import LoraLayer
from lora_squeeze.spectrum import Basis, basis, basis_from_roots, triangular_root
from lora_squeeze.truncation import Cut, Truncation, truncate_together

__all__ = ["basis_on_data", "truncate_on_data"]

# Directions that the data never excite (fewer tokens than r) cost nothing to drop, so any order of
# them would be right. This share of the plain second moment puts them behind all others, in the
# order of their weights; it adds 1e-7 to a relative error. What eigh finds below _NOISE is rounding.
_UNSEEN = 1e-14
_NOISE = 1e-15


def basis_on_data(layer: LoraLayer, down: Tensor, up: Tensor | None = None, *, device: str = "cpu") -> Basis:
    """Decompose one layer's update in the metric of data.

    down
        E[(A x)(A x)^T], (r, r).
    up
        E[(B^T g)(B^T g)^T], (r, r); None: B^T B, which weighs all outputs alike.

    Components are balanced as on the plain route: ‖B p_i‖ = ‖q_i A‖. A layer that the data do not
    reach has singular values of zero and the plain change of basis.
    """
    moment_down, moment_up = (None if one is None else one.to(device) for one in (down, up))
    assert moment_down is not None
    try:
        plain_down, plain_up = triangular_root(layer.down.to(device).T), triangular_root(layer.up.to(device))
    except ArithmeticError:
        basis(layer, device=device)  # says which factor is not finite
        raise
    reached = float(moment_down.trace()) > 0 and (moment_up is None or float(moment_up.trace()) > 0)
    if not reached:
        plain = basis(layer, method="qr", device=device)
        return replace(plain, singular_values=torch.zeros_like(plain.singular_values), growth=_unknown(plain))
    root_down = _root(moment_down, plain_down)
    root_up = plain_up if moment_up is None else _root(moment_up, plain_up)
    size = min(*layer.up.shape, layer.down.shape[1])
    found = basis_from_roots(root_up, root_down, size=size)
    lengths_up = (plain_up.T @ found.p).norm(dim=0)
    lengths_down = (found.q @ plain_down).norm(dim=1)
    ratio = torch.where(lengths_up > 0, (lengths_down / lengths_up).sqrt(), torch.ones_like(lengths_up))
    ratio = torch.where(ratio > 0, ratio, torch.ones_like(ratio))
    return replace(found, p=found.p * ratio, q=found.q / ratio[:, None], growth=_unknown(found))


def truncate_on_data(cuts: Sequence[Cut], *, borrow: bool = False) -> list[Truncation]:
    """The approximations that lose least on the data, and what they lose of the output; as `truncate_together`.

    The errors are √(E‖ΔW x − ΔW' x‖² / E‖ΔW x‖²) on the calibration data. What is cut off is exact; the
    rounding to 16 bits, which has no preferred direction, is added by its Frobenius norm.
    """
    results = truncate_together(cuts, borrow=borrow)
    return [replace(result, relative_error=_error(cut, result)) for cut, result in zip(cuts, results, strict=True)]


def _error(cut: Cut, result: Truncation) -> float:
    energies = cut.basis.singular_values.square()
    total, kept = float(energies.sum()), float(energies[: cut.rank].sum())
    if total == 0 or not math.isfinite(result.relative_error):
        return 0.0 if math.isfinite(result.relative_error) else math.inf
    lost = max(total - kept, float(energies[cut.rank :].sum())) / total
    if result.layer.up.element_size() <= 2 or result.layer.down.element_size() <= 2:
        lost += kept / total * _rounding(cut.layer, cut.basis, cut.kept, result.layer)
    return math.sqrt(lost)


def _root(moment: Tensor, plain: Tensor) -> Tensor:
    """L (r, ·) with L L^T = the moment and a trace of the plain second moment (of root `plain`)."""
    moment = (moment + moment.T) / 2
    share = _UNSEEN * float(moment.trace()) / max(float(plain.square().sum()), torch.finfo(torch.float64).tiny)
    values, vectors = torch.linalg.eigh(moment)
    values = torch.where(values > _NOISE * values[-1], values, torch.zeros_like(values))
    return torch.cat([vectors * values.sqrt(), math.sqrt(share) * plain], dim=1)


def _rounding(layer: LoraLayer, found: Basis, rank: int, written: LoraLayer) -> float:
    """‖ΔW' as written − ΔW' as computed‖² / ‖ΔW' as computed‖², Frobenius; nothing m×n is formed."""
    exact_up = layer.up.to(found.p.device).double() @ found.p[:, :rank] * layer.scale
    exact_down = found.q[:rank] @ layer.down.to(found.q.device).double()
    ups = torch.cat([exact_up, -written.scale * written.up.to(exact_up)], dim=1)
    downs = torch.cat([exact_down, written.down.to(exact_down)])
    difference = ((ups.T @ ups) * (downs @ downs.T)).sum()
    size = ((exact_up.T @ exact_up) * (exact_down @ exact_down.T)).sum()
    return max(float(difference), 0.0) / float(size) if size > 0 else 0.0


def _unknown(found: Basis) -> Tensor:
    """No bound for the growth of products: they are computed in float64."""
    return torch.full_like(found.singular_values, math.inf)
