"""Two adapters of one model, compared in the space of their ranks: no update is ever formed.

With ΔA = s_A up_A down_A and the change of basis of `lora_squeeze.spectrum`, the columns of
up_A P_A are U_A S_A^½, and the rows of Q_A down_A are S_A^½ V_A^T. So U_A^T U_B and V_A^T V_B follow
from up_A^T up_B and down_A down_B^T, which are r_A × r_B.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_squeeze.decomposition import Decomposition
from lora_squeeze.errors import AdapterError, RankError
from lora_squeeze.likeness import LayerLikeness, Likeness
from lora_squeeze.parallel import ordered_map
from lora_squeeze.records import Spectrum

__all__ = ["pair_up"]


def pair_up(
    a: Decomposition,
    b: Decomposition,
    *,
    rank: int | None = None,
    on_layer: Callable[[str], None] | None = None,
) -> Likeness:
    """Compare two adapters: the layers that they have in common one by one, and both as a whole.

    rank
        how many leading directions to compare; default: in each layer the effective rank of the
        simpler of the two updates, rounded up. Never more than either layer's numerical rank.

    Raises AdapterError if they share no layer or a shared one differs in shape, RankError for a rank
    below 1 or decompositions on data.
    """
    if rank is not None and rank < 1:
        raise RankError(f"rank {rank} is not possible: directions are compared from 1 on")
    if a.calibration or b.calibration:
        raise RankError("two adapters are compared by their weights: decompose them without moments")
    spectra_a, spectra_b = ({one.name: one for one in found.spectra} for found in (a, b))
    common = [name for name in spectra_a if name in spectra_b]
    if not common:
        first = (next(iter(spectra_a), ""), next(iter(spectra_b), ""))
        raise AdapterError(
            f"{a.adapter.source} and {b.adapter.source} adapt no layer in common (first: '{first[0]}' and "
            f"'{first[1]}'); adapters of different formats have to be converted to one before"
        )
    for name in common:
        shapes = [(s[name].out_features, s[name].in_features) for s in (spectra_a, spectra_b)]
        if shapes[0] != shapes[1]:
            raise AdapterError(
                f"layer '{name}' is {shapes[0][0]}×{shapes[0][1]} in {a.adapter.source}, but {shapes[1][0]}×"
                f"{shapes[1][1]} in {b.adapter.source}: these adapters are not of the same model"
            )
    layers: list[LayerLikeness] = []
    for layer in ordered_map(lambda name: _layer(a, b, name, spectra_a[name], spectra_b[name], rank), common):
        layers.append(layer)
        if on_layer is not None:
            on_layer(layer.name)
    only_a = [one for name, one in spectra_a.items() if name not in spectra_b]
    only_b = [one for name, one in spectra_b.items() if name not in spectra_a]
    return Likeness(
        source_a=a.adapter.source,
        source_b=b.adapter.source,
        layers=tuple(layers),
        only_a=tuple(one.name for one in only_a),
        only_b=tuple(one.name for one in only_b),
        energy_only_a=sum((one.energy for one in only_a), start=0.0),
        energy_only_b=sum((one.energy for one in only_b), start=0.0),
        parameters_a=a.adapter.parameters,
        parameters_b=b.adapter.parameters,
    )


def _layer(
    a: Decomposition, b: Decomposition, name: str, spectrum_a: Spectrum, spectrum_b: Spectrum, rank: int | None
) -> LayerLikeness:
    layer_a, layer_b = a.adapter.load(name), b.adapter.load(name)
    basis_a, basis_b = a.basis(name), b.basis(name)
    device = basis_a.p.device
    up = basis_a.p.T @ _cross(layer_a.up.T, layer_b.up, device) @ basis_b.p  # S_A^½ U_A^T U_B S_B^½
    down = basis_a.q @ _cross(layer_a.down, layer_b.down.T, device) @ basis_b.q.T  # S_A^½ V_A^T V_B S_B^½
    wanted = rank or math.ceil(min(spectrum_a.effective_rank, spectrum_b.effective_rank))
    k = min(wanted, basis_a.numerical_rank, basis_b.numerical_rank)
    roots = (basis_a.singular_values[:k, None] * basis_b.singular_values[None, :k]).sqrt()
    inner = float((up * down).sum()) * layer_a.scale * layer_b.scale
    return LayerLikeness(
        a=spectrum_a,
        b=spectrum_b,
        overlap_rank=k,
        overlap_out=_share(up[:k, :k] / roots, k),
        overlap_in=_share(down[:k, :k] / roots, k),
        chance_out=min(1.0, k / spectrum_a.out_features),
        chance_in=min(1.0, k / spectrum_a.in_features),
        inner=inner,
    )


def _cross(left: Tensor, right: Tensor, device: torch.device) -> Tensor:
    return left.to(device, torch.float64) @ right.to(device, torch.float64)


def _share(products: Tensor, k: int) -> float:
    return min(1.0, float(products.square().sum()) / k) if k else 0.0
