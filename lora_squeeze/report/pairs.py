"""Two adapters, or two campaigns, side by side as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from lora_squeeze.likeness import LayerLikeness, Likeness
from lora_squeeze.records import Spectrum

if TYPE_CHECKING:
    from lora_squeeze.campaign.manifest import Manifest
    from lora_squeeze.campaign.results import Mean

__all__ = ["campaigns_table", "likeness_table"]


def likeness_table(found: Likeness, *, layers: bool = False) -> RenderableType:
    """What both are as a whole, and then every layer, or those that differ most."""
    whole = Table(box=None, header_style="bold", pad_edge=False)
    whole.add_column("")
    whole.add_column("A", overflow="fold")
    whole.add_column("B", overflow="fold")
    ranks_a, ranks_b = ([one.rank for one in side] for side in _sides(found))
    effective_a, effective_b = ([one.effective_rank for one in side] for side in _sides(found))
    whole.add_row("Adapter", escape(found.source_a), escape(found.source_b))
    whole.add_row("Parameters", f"{found.parameters_a:,}", f"{found.parameters_b:,}")
    whole.add_row("Ranks", _range(ranks_a, 0), _range(ranks_b, 0))
    whole.add_row("Effective ranks", _range(effective_a, 1), _range(effective_b, 1))
    whole.add_row("‖Δ‖", f"{found.energy_a**0.5:.4g}", f"{found.energy_b**0.5:.4g}")
    whole.add_row(
        "Layers only here",
        _names(found.only_a, _share(found.energy_only_a, found.energy_a)),
        _names(found.only_b, _share(found.energy_only_b, found.energy_b)),
    )
    shown = found.layers if layers else sorted(found.layers, key=lambda one: one.cosine)[:8]
    which = "" if layers or len(shown) == len(found.layers) else f", the {len(shown)} least alike (--layers shows all)"
    return Group(
        whole,
        "",
        f"Cosine of the updates {found.cosine:.4f}, ‖B − A‖ / ‖A‖ = {found.distance:.4g}",
        "",
        f"{len(found.layers)} layers in common{which}",
        _layers_table(found, shown),
        "",
        "Overlap: the share of the first k directions of A that lie in those of B, of outputs and of inputs; in",
        "parentheses, that of random directions.",
    )


def _layers_table(found: Likeness, shown: Sequence[LayerLikeness]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("Layer", overflow="fold")
    for heading in ("Ranks", "Eff. ranks", "Energy A", "Energy B", "Cosine", "k", "Overlap out", "Overlap in"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found.layers:
        if one in shown:
            table.add_row(
                escape(one.name),
                f"{one.a.rank}, {one.b.rank}",
                f"{one.a.effective_rank:.1f}, {one.b.effective_rank:.1f}",
                _share(one.a.energy, found.energy_a),
                _share(one.b.energy, found.energy_b),
                f"{one.cosine:.4f}",
                str(one.overlap_rank),
                f"{one.overlap_out:.3f} ({one.chance_out:.3f})",
                f"{one.overlap_in:.3f} ({one.chance_in:.3f})",
            )
    return table


def campaigns_table(
    manifests: tuple[Manifest, Manifest], means: Sequence[tuple[str, Mean | None, Mean | None]], *, metric: str
) -> RenderableType:
    """Condition by condition: mean ± standard error over seeds, and the difference."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("Condition", overflow="fold")
    for heading in ("A", "B", "B − A"):
        table.add_column(heading, justify="right", no_wrap=True)
    for condition, a, b in means:
        difference = f"{b.mean - a.mean:+.4g} ± {(a.error**2 + b.error**2) ** 0.5:.2g}" if a and b else ""
        table.add_row(escape(condition), _mean(a), _mean(b), difference)
    ranks = [str(one.squeeze.recommended_rank or "none") for one in manifests]
    return Group(
        *(
            f"{side}: {escape(one.config_file)}, {escape(one.timestamp)}"
            for side, one in zip("AB", manifests, strict=True)
        ),
        "",
        f"{escape(metric)}, mean ± standard error over seeds",
        table,
        "",
        f"Recommended rank: {ranks[0]} and {ranks[1]}",
    )


def _mean(one: Mean | None) -> str:
    if one is None:
        return ""
    return f"{one.mean:.4g} ± {one.error:.2g}" if one.count > 1 else f"{one.mean:.4g}"


def _sides(found: Likeness) -> tuple[list[Spectrum], list[Spectrum]]:
    return [one.a for one in found.layers], [one.b for one in found.layers]


def _range(values: Sequence[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _names(names: Sequence[str], share: str) -> str:
    return f"{len(names)}, {share} of the energy (first: {escape(names[0])})" if names else "none"


def _share(energy: float, whole: float) -> str:
    return f"{energy / whole:.1%}" if whole > 0 else "–"
