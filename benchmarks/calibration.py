"""Truncation on data against plain truncation, on really trained adapters and data that neither has seen.

    make demo demo-lm && python -m benchmarks.calibration

Takes the adapters that the demos trained. Moments come from examples they were trained on; output error,
loss and accuracy are measured on held-out ones. Writes docs/calibration-results.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.machine import describe, table
from lora_squeeze import Decomposition, Ranks, decompose
from lora_squeeze.calibration import calibrate
from lora_squeeze.data import Choice, Example, Labelled
from lora_squeeze.evaluation.bootstrap import estimates
from lora_squeeze.evaluation.measure import Trial, run, squeezed, trial_of
from lora_squeeze.evaluation.rows import Row, batches_of, digest_of, learnt_rows
from lora_squeeze.evaluation.scoring import Scores
from lora_squeeze.evaluation.subject import Subject, loaded, open_subject
from lora_squeeze.measurements import Estimate
from lora_squeeze.moments import Moments, Seen
from lora_squeeze.verbs import choose_ranks

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
POLICIES = ("fixed={rank}", "params={share}")
METRICS = ("weights", "outputs", "outputs and gradients")


@dataclass(frozen=True)
class Case:
    """An adapter with its model, examples to calibrate on and held-out ones."""

    title: str
    subject: Subject
    training: Sequence[Example]
    held_out: Sequence[Example]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where the demos' adapters are")
    parser.add_argument("--only", choices=("classifier", "language-model"), help="one of the two; printed, not written")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "calibration-results.md")
    options = parser.parse_args()
    sections = [_intro()]
    if options.only != "language-model":
        sections.append(section(classifier(options.build, 500, 600), (16, 8, 4, 2)))
    if options.only != "classifier":
        sections.append(section(language_model(options.build, 100, 80), (8, 2)))  # a forward pass takes long here
    page = "\n".join(sections)
    if options.only:
        print(page)
    else:
        options.out.write_text(page, encoding="utf-8")
        print(f"written: {options.out}")


def classifier(build: Path, examples: int, held_out: int) -> Case:
    """MiniLM on TREC's 50 classes."""
    from packaged import minilm, read_examples, split, trec

    everything = read_examples(trec())
    training, test = split(everything, held_out=0.2, seed=0)
    labels = sorted({one.label for one in everything})
    subject = open_subject([str(build / "demo/original")], base=str(minilm()), labels=labels, dtype="f32", device="cpu")
    texts = [[Labelled(one.text, one.label) for one in part] for part in (training[:examples], test[:held_out])]
    return Case("MiniLM, TREC with 50 classes", subject, *texts)


def language_model(build: Path, examples: int, held_out: int) -> Case:
    """SmolLM2 on TREC's 6 classes: the loss of the word for the class."""
    import squeeze_language_model as demo
    from packaged import read_examples, smollm2, split, trec

    everything = [demo.coarse(one) for one in read_examples(trec())]
    training, test = split(everything, held_out=0.2, seed=0)
    subject = open_subject([str(build / "demo-lm/original")], base=str(smollm2()), dtype="f32", device="cpu")
    answers = tuple(sorted({one.label for one in everything}))
    texts = [
        [Choice(one.text, answers, answers.index(one.label)) for one in part]
        for part in (training[:examples], test[:held_out])
    ]
    return Case("SmolLM2-135M, TREC with 6 classes", subject, *texts)


def section(case: Case, ranks: Sequence[int]) -> str:
    adapter = case.subject.adapters["default"]
    plain_moments, moments, held_out = (
        gather(case.subject, examples, gradients=gradients)
        for examples, gradients in ((case.training, False), (case.training, True), (case.held_out, False))
    )
    decompositions = dict(
        zip(METRICS, (decompose(adapter, moments=one) for one in (None, plain_moments, moments)), strict=True)
    )
    plans = {
        (policy, rank, metric): choose_ranks(found, policy.format(rank=rank, share=rank / adapter.rank))
        for policy in POLICIES
        for rank in ranks
        for metric, found in decompositions.items()
    }
    contestants = [loaded(case.subject)]
    for (_, _, metric), plan in plans.items():
        contestants += squeezed(case.subject, decompositions[metric], [plan])
    rows = rows_for(case.subject, case.held_out)
    classes = case.subject.task == "sequence-classification"
    # Of a language model the right answers alone: all six would take six times as long.
    trial = (
        trial_of(case.subject, case.held_out, batch_size=64)
        if classes
        else Trial("texts", len(case.held_out), tuple(rows), None, 64)
    )
    original, *scores = run(case.subject, contestants, trial)
    measured = dict(zip(plans, scores, strict=True))
    shown = [metric for metric in ("loss", "accuracy") if metric in original]
    first = estimates([original], shown)[0]
    lines = [
        f"## {case.title}",
        "",
        f"Original, rank {adapter.rank}: " + ", ".join(_own(metric, first[metric]) for metric in shown) + ".",
        f"Calibrated on {len(case.training)} examples ({plain_moments.tokens:,} tokens), measured on "
        f"{len(case.held_out)} held-out ones.",
        "",
        _table(plans, decompositions, measured, original, held_out, shown),
        "",
    ]
    return "\n".join(lines)


def rows_for(subject: Subject, examples: Sequence[Example]) -> list[Row]:
    """Each example with its right answer, in the words of the demo that trained the adapter."""
    prompt = "Question: {text} Type:"
    return learnt_rows(examples, subject.reader, task=subject.task, labels=subject.labels, prompt=prompt)


def gather(subject: Subject, examples: Sequence[Example], *, gradients: bool) -> Moments:
    rows = rows_for(subject, examples)
    batches = batches_of(rows, subject.reader, batch_size=32)
    seen = Seen("", digest_of(examples), len(examples))
    return calibrate(subject.model, batches, seen=seen, gradients=gradients)


def output_error(decomposition: Decomposition, plan: Ranks, held_out: Moments) -> float:
    """√(Σ E‖(ΔW − ΔW') x‖² / Σ E‖ΔW x‖²) over layers, on data of which only the moments are needed."""
    lost = total = 0.0
    for name, rank in plan.by_layer.items():
        layer, found = decomposition.adapter.load(name), decomposition.basis(name)
        gram = layer.up.double().T @ layer.up.double() * layer.scale**2
        moment = held_out.means(name)[0]
        rest = torch.eye(len(moment), dtype=torch.float64) - found.p[:, :rank] @ found.q[:rank]
        lost += float((gram * (rest @ moment @ rest.T)).sum())
        total += float((gram * moment).sum())
    return (lost / total) ** 0.5


def _table(
    plans: dict[tuple[str, int, str], Ranks],
    decompositions: dict[str, Decomposition],
    measured: dict[tuple[str, int, str], Scores],
    original: Scores,
    held_out: Moments,
    shown: Sequence[str],
) -> str:
    header = ["policy", "truncation in the metric of", "output error", *shown]
    header += [f"{metric}, against weights" for metric in shown]
    rows: list[list[str]] = []
    for (policy, rank, metric), plan in plans.items():
        own = measured[policy, rank, metric]
        against = estimates([measured[policy, rank, METRICS[0]], own], shown)[1]
        spelled = plan.policy if metric == METRICS[0] else ""
        row = [f"`{spelled}`" if spelled else "", metric, f"{output_error(decompositions[metric], plan, held_out):.2%}"]
        row += [_value(name, own) for name in shown]
        row += ["" if metric == METRICS[0] else _difference(name, against[name]) for name in shown]
        rows.append(row)
    return table(header, rows)


def _own(metric: str, estimate: Estimate) -> str:
    return f"{metric} {_text(metric, estimate.value)} ({_text(metric, estimate.low)} to {_text(metric, estimate.high)})"


def _value(metric: str, scores: Scores) -> str:
    top, bottom = scores[metric]
    return _text(metric, float(top.sum() / bottom.sum()))


def _difference(metric: str, estimate: Estimate) -> str:
    assert estimate.difference is not None
    text = f"{100 * estimate.difference:+.1f}" if metric == "accuracy" else f"{estimate.difference:+.4f}"
    return f"{text} {estimate.verdict}"


def _text(metric: str, value: float) -> str:
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.4f}"


def _intro() -> str:
    return "\n".join(
        [
            "# Calibration, measured",
            "",
            f"Written by `python -m benchmarks.calibration`. {describe()}. Adapters of `make demo` and `make demo-lm`,",
            "one training each, seed 0; moments from examples of the training data. The output error is",
            "√(Σ E‖(ΔW − ΔW')x‖² / Σ E‖ΔW x‖²) over all layers on held-out data, each layer with the inputs that the",
            "original adapter gives it. “Against weights” compares with plain truncation by the same policy, paired,",
            "with its verdict from 2,000 bootstrap draws.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
