"""The measured part of the page: tables, the figure, and what of the papers' claims they bear out."""

from __future__ import annotations

from benchmarks.in_squeeze_runs import SEEDS
from benchmarks.machine import table
from reproductions.small.findings import differences, over_seeds
from reproductions.small.page import BEGIN, END
from reproductions.small.wording import percent, points
from reproductions.vision import findings
from reproductions.vision.backbone import GRID, SIDE
from reproductions.vision.claims import claims
from reproductions.vision.experiments import BELOW, RATES, best_rate, planned, tuning
from reproductions.vision.findings import Values
from reproductions.vision.measuring import Done
from reproductions.vision.training import ALIGNED, BATCH, CONT, CONTINUED, LEAST, SOURCE, STEPS, WARMUP

__all__ = ["BEGIN", "END", "measured", "written"]


def written(page: str, done: Done) -> str:
    """The page with its measured part renewed."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{measured(done)}\n{END}{rest.split(END)[1]}"


def measured(done: Done) -> str:
    """The measured part; what has not been measured is left out."""
    parts = [_claims(done), _setting(done), _tuning(done), _by_rank(done), _at_one(done)]
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
        f"Images of {SIDE} × {SIDE} pixels; {1 + GRID * GRID} embeddings of an image: the class token, and the patches "
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


def _at_one(done: Done) -> str:
    high, own = best_rate(done, SOURCE), best_rate(done, CONT)
    ways: list[tuple[str, Values, Values]] = [
        ("Post-Squeeze", findings.post(done, CONT), findings.post(done, CONT, "ablated")),
        *(
            (name, findings.annealed(done, kind), findings.annealed(done, kind, "ablated"))
            for name, kind in (("Cont-Squeeze", "cont-squeeze"), ("In-Squeeze Minimum", "in-squeeze"))
        ),
        *(
            (f"direct, {whose} rate", findings.direct(done, CONT, rate), findings.direct(done, CONT, rate, "ablated"))
            for whose, rate in ((f"{SOURCE}'s", high), ("own", own))
        ),
    ]
    rows = [
        [
            f"{name}, rank {CONT}",
            percent(over_seeds(values)),
            percent(over_seeds(ablated)),
            points(differences(values, ways[0][1])) if values is not ways[0][1] else "",
        ]
        for name, values, ablated in ways
        if over_seeds(values)
    ]
    eight = findings.direct(done, 8, high)
    if over_seeds(eight):
        rows += [
            ["Post-Squeeze, rank 8", *(percent(over_seeds(findings.post(done, 8, one))) for one in _BOTH), ""],
            [
                f"direct, {SOURCE}'s rate, rank 8",
                *(percent(over_seeds(findings.direct(done, 8, high, one))) for one in _BOTH),
                points(differences(eight, findings.post(done, 8))),
            ],
        ]
    if not rows:
        return ""
    header = ("way", "accuracy", "image ablated", "− Post-Squeeze")
    return "## Ways to a low rank, at equal steps\n\n" + table(header, rows)


_BOTH = ("accuracy", "ablated")
