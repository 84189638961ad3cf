"""The measured part of the page: tables, figures, and what of the papers' claims they bear out."""

from __future__ import annotations

from collections import Counter

from benchmarks.in_squeeze_runs import BATCH, HEAD, RATES, SEEDS, SOURCE, STEPS, WARMUP, Results, best_rate
from benchmarks.machine import table
from reproductions.small import findings
from reproductions.small.claims import claims, correlation
from reproductions.small.experiments import BELOW, POLICIES, RANKS, SIZES, SMALL_SIZES, planned, sized
from reproductions.small.findings import Done, Kept, Mean
from reproductions.small.measuring import CALIBRATED_ON, GRADIENTS, OUTPUTS
from reproductions.small.resumed import renewed
from reproductions.small.tasks import TASKS
from reproductions.small.wording import count, judged, nats, percent, points

TUNED = ", ".join(map(str, RATES))


def written(page: str, runs: Results, done: Done) -> str:
    """The page with its measured part renewed."""
    return renewed(page, measured(runs, done))


def measured(runs: Results, done: Done) -> str:
    """The measured part; what has not been measured is left out."""
    parts = [_claims(runs, done), _setting(runs, done), _rates(runs, done), _gains(runs, done), _routes(runs, done)]
    parts += [_methods(runs), _retention(runs, done), _para(runs, done), _calibration(runs, done)]
    return "\n\n".join(part for part in parts if part)


def _claims(runs: Results, done: Done) -> str:
    rows = claims(runs, done)
    if not rows:
        return ""
    lines = [("claim", "here", "verdict"), ("---", "---", "---"), *rows]
    return "\n".join([
        "## The papers' claims, at this scale", "",
        *(f"| {' | '.join(line)} |" for line in lines), "",
        "A difference counts where the 95 % interval of its mean over the seeds (Student's t, paired by seed) leaves "
        "out 0; with three seeds that takes 4.3 standard errors. All else is called noise. ± is the standard error.",
    ])  # fmt: skip


def _setting(runs: Results, done: Done) -> str:
    rates = ", ".join(f"{best_rate(runs, rank):g} at rank {rank}" for rank in RANKS)
    tried = "; ".join(f"{', '.join(f'{rate:g}' for rate in some)} at rank {rank}" for rank, some in RATES.items())
    missing = Counter(one.seed for one in planned(runs) if one not in done)
    left = "; ".join(f"{number} of seed {seed}" for seed, number in sorted(missing.items()))
    machines = "; ".join(sorted({one["machine"] for one in done.values()}))
    parts = [
        "## Setting",
        f"Measured on {machines}." if machines else "",
        f"{STEPS} steps of {BATCH} texts, AdamW, {WARMUP} steps of warm-up and then a constant rate "
        f"({HEAD:g} for the new head), all linear layers adapted, alpha = rank, seeds "
        f"{', '.join(map(str, SEEDS))}. Learning rates tried: {tried}; best on TREC-50's validation split with seed 0, "
        f"and used: {rates}.",
        f"Not measured yet: {left}." if left else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _rates(runs: Results, done: Done) -> str:
    high = best_rate(runs, SOURCE)
    rows: list[list[str]] = []
    for rank in BELOW:
        post = findings.squeezed(runs, done, SOURCE, rank)
        direct = [findings.direct(runs, rank, rate) for rate in (high, best_rate(runs, rank))]
        versus = [findings.differences(post, one) for one in direct]
        if any(versus):
            shown = [percent(findings.over_seeds(one)) for one in (post, *direct)]
            rows.append([str(rank), *shown, *(points(one) for one in versus)])
    if not rows:
        return ""
    header = ("rank", "Post-Squeeze", "direct, 64's rate", "direct, own rate", "Post − 64's rate", "Post − own rate")
    whole = percent(findings.over_seeds(findings.direct(runs, SOURCE, high)))
    parts = [
        "## The rate tuned only at the highest rank (LoRA-Squeeze, Figure 3)",
        f"Test accuracy on TREC-50; rank {SOURCE}, at its rate of {high:g}, reaches {whole}.",
        table(header, rows),
        "![Test accuracy of Post-Squeeze and of direct training by rank](rates.png)",
    ]
    return "\n\n".join(parts)


def _gains(runs: Results, done: Done) -> str:
    found = findings.gains(runs, done)
    if not found:
        return ""
    best, worst = (choose(found, key=lambda pair: found[pair].value) for choose in (max, min))
    parts = [
        "## Gain by source and target rank (LoRA-Squeeze, Figure 4)",
        "Test accuracy on TREC-50 of Post-Squeeze minus that of direct training at the target rank, each rank at its "
        "own rate.",
        "![Post-Squeeze minus direct training, by source and target rank](gains.png)",
        f"Pairs of ranks: {count(found.values())}. Best: {best[0]} → {best[1]}, {points(found[best])} "
        f"points; worst: {worst[0]} → {worst[1]}, {points(found[worst])}. Of so many, one in twenty counts by chance.",
        f"Rates were tuned at ranks {TUNED} alone. Into those: "
        f"{count(findings.tuned(found).values())}. Another rank takes a neighbour's rate, and a gain over it may be "
        "that rate's.",
    ]
    return "\n\n".join(parts)


def _routes(runs: Results, done: Done) -> str:
    rows = [
        [f"`{route}`", str(rank), points(one.accuracy), f"{one.differing} of {one.answers}", f"{one.largest:.0e}"]
        for route in ("randomized", "qr")
        for rank, one in findings.routes(runs, done, route).items()
    ]
    if not rows:
        return ""
    header = ("route", "rank", "accuracy − that of `gram`", "answers that differ", "largest difference of a loss")
    parts = [
        "## Memory-efficient against standard (LoRA-Squeeze, Figure 5)",
        f"From rank {SOURCE}, TREC-50: `randomized` is Algorithm 1, `qr` is Algorithm 2, and `gram`, with which they "
        "are compared, what this library does by default. Losses were written down to five decimals.",
        table(header, rows),
        "![Accuracy of the routes against that of gram](routes.png)",
    ]
    return "\n\n".join(parts)


def _methods(runs: Results) -> str:
    if not any('"in-squeeze"' in key for key in runs):
        return ""
    parts = [
        "## Direct, Post-, Cont- and In-Squeeze at equal steps",
        "TREC-50; the table, and what else was tried, are in [In-Squeeze](../../docs/in-squeeze.md#measured).",
        "![Test accuracy of five ways to a low rank](methods.png)",
    ]
    return "\n\n".join(parts)


def _retention(runs: Results, done: Done) -> str:
    found = findings.retention(runs, done)
    if not found:
        return ""
    rows = [
        [
            TASKS[task].title,
            percent(findings.as_trained(runs, done, task)),
            *(_kept_and_lost(by_rank.get(rank)) for rank in BELOW),
            f"{by_rank[1].share:.0%}" if 1 in by_rank else "–",
        ]
        for task, by_rank in found.items()
    ]
    header = ("task", f"rank {SOURCE}", *(f"to {rank}" for rank in BELOW), "of the gain, at 1")
    parts = [
        "## Retention by task, and the loss of accuracy (LoRA-Squeeze, Figures 6 and 7)",
        f"Adapters of rank {SOURCE}, squeezed: retained variance (mean of the layers), change of accuracy in points. "
        "Last, the share that rank 1 loses of what the adapter was better than always naming the most frequent class. "
        "All at the rate tuned on TREC-50.",
        table(header, rows),
        "![Retained variance by rank, and against the accuracy lost](retention.png)",
        _prediction(found),
    ]
    return "\n\n".join(part for part in parts if part)


def _kept_and_lost(one: Kept | None) -> str:
    return "–" if one is None else f"{one.retention.value:.1%}, {0.0 - 100 * one.lost.value:+.1f}"


def _prediction(found: dict[str, dict[int, Kept]]) -> str:
    """Whether the tasks that keep least lose most, rank by rank."""
    complete = [kept for kept in found.values() if set(kept) == set(BELOW)]
    if len(complete) < 4:
        return ""
    rows: list[list[str]] = []
    for what in ("points of accuracy", "share of the gain"):
        row = [what]
        for rank in BELOW:
            kept = [one[rank] for one in complete]
            lost = [one.share if what == "share of the gain" else one.lost.value for one in kept]
            row.append(f"{correlation([one.retention.value for one in kept], lost):+.2f}")
        rows.append(row)
    return (
        f"Rank correlation (Spearman) of retention and loss over {len(complete)} tasks, rank by rank. If low retention "
        "foretold a large loss it would be near −1; with six tasks, chance alone goes down to −0.83 one time in "
        "twenty.\n\n" + table(("lost", *(f"to {rank}" for rank in BELOW)), rows)
    )


def _para(runs: Results, done: Done) -> str:
    full = findings.over_seeds(findings.by_seed(runs, done, "", "parameters"))
    rows: list[list[str]] = []
    for size in SIZES:
        for policy in POLICIES:
            spelled = sized(policy, size)
            found = {what: findings.by_seed(runs, done, spelled, what) for what in SHOWN}
            means = {what: findings.over_seeds(values) for what, values in found.items()}
            share, energy, out = (means[what] for what in SHOWN[:3])
            if not (full and share and energy and out):
                continue
            changes = [findings.differences(found["accuracy"], one) for one in (
                findings.by_seed(runs, done, "", "accuracy"),
                findings.by_seed(runs, done, sized("fixed", size), "accuracy"),
            )]  # fmt: skip
            rows.append([
                f"`{policy}`", f"{share.value / full.value:.1%}", f"{energy.value:.1%}", f"{out.value:.1f}",
                percent(means["accuracy"]), nats(means["loss"]), points(changes[0]),
                "" if policy == "fixed" else f"{points(changes[1])}, {judged(changes[1])}" if changes[1] else "–",
            ])  # fmt: skip
    if not rows:
        return ""
    header = ("policy", "parameters", "energy kept", "left out", "accuracy", "loss", f"− rank {SOURCE}", "− `fixed`")
    parts = [
        "## PARA at 50, 25 and 10 % of the parameters",
        f"TREC-50, from rank {SOURCE}; every policy's value is the largest that stays within the budget, so PARA's two "
        "budgets, by rank and by energy, are one threshold and agree; `fixed` has whole ranks only. A layer of rank 0 "
        "is left out of the adapter and costs nothing: *left out* is the mean number of such layers.",
        table(header, rows),
        "![Accuracy and loss by parameters and policy](para.png)",
    ]
    return "\n\n".join(parts)


SHOWN = ("parameters", "energy_kept", "left_out", "accuracy", "loss")


def _calibration(runs: Results, done: Done) -> str:
    rows: list[list[str]] = []
    changes: dict[str, list[Mean]] = {OUTPUTS: [], GRADIENTS: []}
    for form in ("fixed", "params"):
        for rank, size in SMALL_SIZES.items():
            policy = f"fixed={rank}" if form == "fixed" else sized("params", size)
            for moments, counted in changes.items():
                loss, accuracy = (
                    findings.differences(
                        *(findings.by_seed(runs, done, policy, what, moments=one) for one in (moments, ""))
                    )
                    for what in ("loss", "accuracy")
                )
                if not loss:
                    continue
                counted.append(loss)
                said = Counter(findings.verdicts(runs, done, policy, moments))
                rows.append([
                    f"`{form}`", f"{size:.1%}", moments, nats(loss, sign="+"), points(accuracy),
                    ", ".join(f"{number} {verdict}" for verdict, number in said.items()),
                ])  # fmt: skip
    if not rows:
        return ""
    header = ("policy", "parameters", "in the metric of", "loss − plain", "accuracy − plain", "loss, seed by seed")
    said = "; ".join(f"in the metric of {name}, {count(some, better=-1)}" for name, some in changes.items() if some)
    parts = [
        "## Calibration against none",
        f"No claim of the papers: `calibrate` on {CALIBRATED_ON} training questions of TREC-50, measured on the test, "
        "against plain truncation by the same policy at the same size. *Seed by seed*: verdicts of a paired bootstrap "
        "over the questions, for each adapter.",
        table(header, rows),
        "![Loss with calibration minus loss without, by parameters](calibration.png)",
        f"Over the seeds, the loss is: {said}.",
    ]
    return "\n\n".join(parts)
