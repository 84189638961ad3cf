"""How often `compress --keep` fails on data that it has not seen.

    make demo && python -m benchmarks.keep

Takes the classifier that `make demo` trained and scores a ladder of its squeezed versions on all held-out
questions, once. Then, many times over: draw some of the questions at random, search on them as `--keep`
does, and check the criterion on all the others. Writes docs/keep-results.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.machine import describe, table
from lora_squeeze import decompose
from lora_squeeze.data import Labelled
from lora_squeeze.evaluation.keep import Criterion, bisected, judge, ladder
from lora_squeeze.evaluation.measure import run, squeezed, trial_of
from lora_squeeze.evaluation.scoring import Scores
from lora_squeeze.evaluation.subject import loaded, open_subject

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
EVERY = 5  # of the ladder's plans: neighbours then differ by 44 per cent
SIZES = (100, 300, 600)
CRITERIA = [(metric, keep) for metric in ("loss", "accuracy", "agreement") for keep in (0.99, 0.97, 0.9)]


@dataclass(frozen=True)
class Found:
    """One search: which plan it chose, and whether it holds on the questions that were not searched on."""

    place: int
    holds: bool
    kept: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where the demos' adapters are")
    parser.add_argument("--splits", type=int, default=300, help="random splits of each kind (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=200, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "keep-results.md")
    options = parser.parse_args()
    shares, scores = scored(options.build)
    lines = [_intro(len(scores), len(scores[0]["loss"][0]), options.splits, options.draws)]
    for metric, keep in CRITERIA:
        rows: list[list[str]] = []
        for count in SIZES:
            for confident in (False, True):
                criterion = Criterion(metric, keep, confident=confident, draws=options.draws)
                found = [
                    search(criterion, scores, count, seed)
                    for seed in track(range(options.splits), f"{metric} {keep} {count}", transient=True)
                ]
                rows.append(_row(count, confident, found, shares))
        header = (
            "searched on",
            "`--confident`",
            "fails on the others",
            "parameters (mean)",
            "kept (mean)",
            "kept (5 %)",
        )
        lines += [f"## `--keep {keep} --metric {metric}`", "", table(header, rows), ""]
    options.out.write_text("\n".join(lines), encoding="utf-8")
    print(f"written: {options.out}")


def scored(build: Path) -> tuple[list[float], list[Scores]]:
    """Shares of the parameters, rising, and what each plan scores on every question; the last is the original."""
    from packaged import minilm, read_examples, split, trec

    everything = read_examples(trec())
    held_out = [Labelled(one.text, one.label) for one in split(everything, held_out=0.2, seed=0)[1]]
    labels = sorted({one.label for one in everything})
    subject = open_subject([str(build / "demo/original")], base=str(minilm()), labels=labels, dtype="f32", device="cpu")
    decomposition = decompose(subject.adapters["default"])
    plans = ladder(decomposition, "params")[::-1][::EVERY][::-1]
    contestants = [loaded(subject), *squeezed(subject, decomposition, plans[:-1])]
    original, *others = run(subject, contestants, trial_of(subject, held_out, batch_size=64))
    whole = decomposition.adapter.parameters
    return [*(one.parameters / whole for one in contestants[1:]), 1.0], [*others, original]


def search(criterion: Criterion, scores: Sequence[Scores], count: int, seed: int) -> Found:
    """Search on `count` questions drawn at random, and check on all others."""
    total = len(scores[0]["loss"][0])
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    known, unknown = order[:count], order[count:]
    original = _part(scores[-1], known)
    place = bisected(len(scores), lambda place: judge(criterion, _part(scores[place], known), original)[1])
    value, first = (_ratio(scores[number][criterion.metric], unknown) for number in (place, -1))
    kept = {"loss": first / value, "accuracy": value / first, "agreement": value}[criterion.metric]
    return Found(place, criterion.holds(value, first), kept)


def _part(scores: Scores, places: Tensor) -> Scores:
    return {metric: (top[places], bottom[places]) for metric, (top, bottom) in scores.items()}


def _ratio(pair: tuple[Tensor, Tensor], places: Tensor) -> float:
    return float(pair[0][places].sum() / pair[1][places].sum())


def _row(count: int, confident: bool, found: Sequence[Found], shares: Sequence[float]) -> list[str]:
    kept = sorted(one.kept for one in found)
    return [
        f"{count} questions",
        "yes" if confident else "no",
        f"{sum(not one.holds for one in found) / len(found):.0%}",
        f"{sum(shares[one.place] for one in found) / len(found):.1%}",
        f"{sum(kept) / len(kept):.3f}",
        f"{kept[len(kept) // 20]:.3f}",
    ]


def _intro(plans: int, questions: int, splits: int, draws: int) -> str:
    return "\n".join(
        [
            "# How often --keep fails on other data",
            "",
            f"Written by `python -m benchmarks.keep`. {describe()}. The classifier of `make demo` (MiniLM, TREC with",
            f"50 classes, rank 64; one training) and {plans} sizes of the policy `params`, scored on {questions}",
            f"held-out questions. For each line, {splits} times: some questions drawn at random, the search of",
            f"`--keep` on them ({draws} bootstrap draws), and the criterion checked on all the others. *Kept* is what",
            "is left there of the original's quality: its loss divided by the adapter's, the adapter's accuracy",
            "divided by its, or the agreement; the last column is the 5th percentile. Both sides come out of one pool:",
            "what the search gets by luck the others lack, so the rates are too high, most of all at 600.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
