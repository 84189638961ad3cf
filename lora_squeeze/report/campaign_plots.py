"""A campaign as figures: learning curves of its conditions, and what squeezing gained. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_squeeze.campaign.results import Mean

__all__ = ["plot_curves", "plot_gains"]

# Okabe and Ito's palette, but for its yellow: told apart by people who are colour-blind.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", "--", ":", "-.")
# Orange is worse, violet better, white neither.
_DIVERGING = "PuOr"


def plot_curves(figure: Any, curves: Mapping[str, Sequence[tuple[int, Mean]]], metric: str) -> None:
    """Learning curves: the mean over seeds of every stretch of the training, with its standard error as a band."""
    figure.set_size_inches(7.5, 4.2)
    axes = figure.add_subplot()
    for place, (condition, points) in enumerate(curves.items()):
        steps, means, errors = (
            [step for step, _ in points],
            [one.mean for _, one in points],
            [one.error for _, one in points],
        )
        colour = _COLOURS[place % len(_COLOURS)]
        dashes = _DASHES[place // len(_COLOURS) % len(_DASHES)]
        low, high = ([mean + sign * error for mean, error in zip(means, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, means, dashes, color=colour, linewidth=1.6, label=_short(condition))
    axes.set(xlabel="step", ylabel=metric, title=f"{metric} while training, mean ± standard error over the seeds")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def plot_gains(figure: Any, gains: Mapping[tuple[int, int], Mean], metric: str) -> None:
    """The heatmap of LoRA-Squeeze (arXiv 2602.10993, figure 4): source rank down, target rank across."""
    sources, targets = (sorted({ranks[side] for ranks in gains}) for side in (0, 1))
    cells = [[gains[s, t].mean if (s, t) in gains else float("nan") for t in targets] for s in sources]
    most = max(abs(one.mean) for one in gains.values()) or 1.0
    figure.set_size_inches(2.6 + 0.95 * len(targets), 1.8 + 0.6 * len(sources))
    axes = figure.add_subplot()
    image = axes.imshow(cells, cmap=_DIVERGING, vmin=-most, vmax=most, aspect="auto")
    for (source, target), one in gains.items():
        text = f"{one.mean:+.3g}" + (f"\n± {one.error:.2g}" if one.count > 1 else "")
        colour = "white" if abs(one.mean) > 0.6 * most else "black"
        axes.text(
            targets.index(target), sources.index(source), text, ha="center", va="center", fontsize=8, color=colour
        )
    axes.set_xticks(range(len(targets)), [str(rank) for rank in targets])
    axes.set_yticks(range(len(sources)), [str(rank) for rank in sources])
    axes.grid(visible=False)
    axes.set(xlabel="target rank", ylabel="source rank", title=f"Gain of squeezing over training directly\n{metric}")
    figure.colorbar(image, ax=axes)


def _short(condition: str) -> str:
    return condition if len(condition) <= 48 else condition[:47] + "…"
