"""The measured part of the page: tables, the figure, and what of the papers' claims they bear out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.in_squeeze_runs import SEEDS
from benchmarks.machine import table
from reproductions.small.findings import differences, over_seeds
from reproductions.small.resumed import renewed
from reproductions.small.wording import percent, points
from reproductions.vision import findings
from reproductions.vision.backbone import GRID, SIDE, TOKENS
from reproductions.vision.claims import claims
from reproductions.vision.experiments import BELOW, DIRECT, RATES, best_rate, planned, tuning
from reproductions.vision.findings import Values
from reproductions.vision.measuring import Done
from reproductions.vision.training import ALIGNED, BATCH, CONT, CONTINUED, LEAST, SOURCE, STEPS, WARMUP

POST = "Post-Squeeze"

__all__ = ["measured", "written"]


def written(page: str, done: Done) -> str:
    """The page with its measured part renewed."""
    return renewed(page, measured(done))


def measured(done: Done) -> str:
    """The measured part; what has not been measured is left out."""
    parts = [_claims(done), _setting(done), _tuning(done), _by_rank(done), _ways_down(done)]
    return "\n\n".join(part for part in parts if part)


def _claims(done: Done) -> str:
    rows = claims(done)
    if not rows:
        return ""
    lines = [("claim", "here", "verdict"), ("---", "---", "---"), *rows]
    return "\n".join([
        "## LoRA-Squeeze's claims, with images and at this scale", "",
        *(f"| {' | '.join(line)} |" for line in lines), "",
        "A difference counts where the 95 % interval of its mean over the seeds (Student's t, paired by seed) leaves "
        "out 0; with three seeds that takes 4.3 standard errors. All else is called noise. ± is the standard error.",
    ])  # fmt: skip


def _setting(done: Done) -> str:
    left = sum(one not in done for one in planned(done))
    machines = "; ".join(sorted({one["machine"] for one in done.values()}))
    count = next((len(one["predicted"]) for name, one in done.items() if name.split == "test"), 0)
    parts = [
        "## Setting",
        f"Measured on {machines}." if machines else "",
        f"Images are enlarged to {SIDE} × {SIDE} pixels, and become {TOKENS} embeddings: class token, and patches "
        f"pooled to {GRID} × {GRID}. First {ALIGNED} steps for projector and head, once; then, with both frozen, "
        f"{STEPS} steps of {BATCH} questions for each LoRA: AdamW, {WARMUP} steps of warm-up and then a constant rate, "
        f"no dropout, all linear layers of the text model adapted, alpha = rank, seeds {', '.join(map(str, SEEDS))}. "
        f"In-Squeeze: at least {LEAST} steps for each of the ranks {SOURCE}, 32, … {CONT}, the rest by rank. "
        f"Cont-Squeeze: squeezed {CONTINUED} steps before the end.",
        f"Tested on {count:,} questions, of which one is {100 / count:.2f} points." if count else "",
        f"Not measured yet: {left}." if left else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _tuning(done: Done) -> str:
    rows: list[list[str]] = []
    for rank in RATES:
        tried = {one.rate: done[one]["accuracy"] for one in tuning(rank) if one in done}
        best = best_rate(done, rank)
        edge = best is not None and best in (min(tried), max(tried))
        used = "–" if best is None else f"{best:g}{', at the edge of those tried' if edge else ''}"
        if tried:
            rows.append([str(rank), ", ".join(f"{rate:g}: {found:.1%}" for rate, found in tried.items()), used])
    if not rows:
        return ""
    return "## Learning rates\n\nAccuracy on the validation part, with seed 0.\n\n" + table(
        ("rank", "rate: accuracy", "used"), rows
    )


def _by_rank(done: Done) -> str:
    rows: list[list[str]] = []
    for rank in (SOURCE, *BELOW):
        accuracy = over_seeds(findings.post(done, rank))
        if accuracy is None:
            continue
        kept = findings.retained(done, rank)
        change = differences(findings.post(done, rank), findings.post(done, SOURCE))
        rows.append([
            str(rank), "–" if kept is None else f"{kept.value:.1%}", percent(accuracy),
            percent(over_seeds(findings.post(done, rank, "ablated"))), points(findings.brought(done, rank)),
            "" if rank == SOURCE else points(change),
        ])  # fmt: skip
    if not rows:
        return ""
    header = ("rank", "retained variance", "accuracy", "image ablated", "what the image brings", f"− rank {SOURCE}")
    parts = [
        "## Post-Squeeze by rank",
        f"Trained at rank {SOURCE}, squeezed. Retained variance is the mean of the layers; *image ablated* is the "
        "accuracy on the same questions with a plain grey image.",
        table(header, rows),
        _without(done),
        "![Accuracy with and without the image, and retained variance, by rank](ranks.png)",
    ]
    return "\n\n".join(part for part in parts if part)


def _without(done: Done) -> str:
    numbers = [findings.alone(done, what) for what in ("majority", "blind", "accuracy", "ablated")]
    if None in numbers:
        return ""
    majority, blind, accuracy, ablated = (f"{number:.1%}" for number in numbers)
    return (
        f"The most frequent answer of all gets {majority}; the most frequent answer to each question, as counted in "
        f"training, {blind}; projector and head without any LoRA {accuracy}, and {ablated} with the grey image."
    )


def _ways_down(done: Done) -> str:
    rows = [
        [
            f"{name}, rank {rank}",
            percent(over_seeds(values)),
            percent(over_seeds(ablated)),
            "" if name == POST else points(differences(values, findings.post(done, rank))),
        ]
        for rank in reversed(DIRECT)
        for name, values, ablated in _ways(done, rank)
        if over_seeds(values)
    ]
    if not rows:
        return ""
    header = ("way", "accuracy", "image ablated", f"− {POST}")
    return "## Ways to a low rank, at equal steps\n\n" + table(header, rows)


def _ways(done: Done, rank: int) -> list[tuple[str, Values, Values]]:
    """Name, accuracy, and accuracy with the image ablated, of all ways to one rank."""
    ways: list[tuple[str, Callable[[str], Values]]] = [(POST, partial(findings.post, done, rank))]
    if rank == CONT:
        for name, kind in (("Cont-Squeeze", "cont-squeeze"), ("In-Squeeze Minimum", "in-squeeze")):
            ways.append((name, partial(findings.annealed, done, kind)))
    for whose, rate in ((f"rank {SOURCE}'s", best_rate(done, SOURCE)), ("its own", best_rate(done, rank))):
        ways.append((f"direct, at {whose} rate", partial(findings.direct, done, rank, rate)))
    return [(name, found("accuracy"), found("ablated")) for name, found in ways]
