"""Policies at equal parameters on really trained adapters: energy kept and held-out quality.

    make demo demo-lm && python -m benchmarks.policies

Takes the adapters that the demos trained, sets every policy's value so that it just stays within
50, 25, 12.5 and 6.25 % of the parameters, and scores each result on the demos' held-out questions.
Writes docs/policy-comparison.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track

from benchmarks.machine import describe, table
from lora_squeeze import Decomposition, decompose, open_adapter, squeeze
from lora_squeeze.comparison import outcome_of, policies_at
from lora_squeeze.compression import file_cost
from lora_squeeze.records import Outcome

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
FRACTIONS = (0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class Row:
    """One policy at one budget: what it kept and how the squeezed adapter scored."""

    outcome: Outcome
    correct: int
    questions: int
    loss: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200, help="held-out questions for the language model")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "policy-comparison.md")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sections = [_intro()]
    for title, folder, evaluate in (
        ("MiniLM, TREC with 50 classes", ROOT / "build/demo/original", _classifier()),
        ("SmolLM2-135M, TREC with 6 classes", ROOT / "build/demo-lm/original", _language_model(options.questions)),
    ):
        if not folder.exists():
            raise SystemExit(f"{folder} is missing: run make demo demo-lm first")
        sections.append(_section(title, folder, evaluate))
        options.out.write_text("\n".join(sections), encoding="utf-8")
    print(f"written: {options.out}")


def _section(title: str, folder: Path, evaluate: Callable[[Path], Any]) -> str:
    start = time.monotonic()
    decomposition = decompose(open_adapter(folder))
    cost = file_cost(decomposition.adapter)
    original = evaluate(folder)
    lines = [
        f"## {title}",
        "",
        f"Original, rank {decomposition.adapter.rank}: accuracy {original.accuracy:.1%} "
        f"(± {original.standard_error:.1%} standard error, {original.questions} questions), loss {original.loss:.3f}.",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for fraction in FRACTIONS:
            plans = policies_at(decomposition.spectra, fraction, cost=cost)
            rows: list[Row] = []
            known: dict[tuple[int, ...], Any] = {}
            for plan in track(plans, f"{title}, {fraction:.2%}"):
                ranks = tuple(plan.by_layer.values())
                if ranks not in known:  # policies often agree
                    known[ranks] = _score(decomposition, plan, Path(scratch, "adapter"), evaluate)
                score = known[ranks]
                outcome = outcome_of(decomposition.spectra, plan, cost=cost, fraction=fraction)
                rows.append(Row(outcome, score.correct, score.questions, score.loss))
            lines += ["", f"### {fraction:.2%} of the parameters", "", *_table(rows)]
    lines += ["", f"({time.monotonic() - start:.0f} s)", ""]
    return "\n".join(lines)


def _score(decomposition: Decomposition, plan: Any, output: Path, evaluate: Callable[[Path], Any]) -> Any:
    squeeze(decomposition, plan, output, overwrite=True)
    return evaluate(output)


def _table(rows: Sequence[Row]) -> list[str]:
    header = ("policy", "parameters", "energy kept", "worst layer", "largest rank", "left out", "accuracy", "loss")
    return [
        table(
            header,
            (
                (
                    f"`{row.outcome.policy}`",
                    f"{row.outcome.parameters / row.outcome.source_parameters:.2%}",
                    f"{row.outcome.energy_kept:.2%}",
                    f"{row.outcome.worst_layer:.2%}",
                    str(row.outcome.largest_rank),
                    str(row.outcome.layers_left_out),
                    f"{row.correct / row.questions:.1%}",
                    f"{row.loss:.3f}",
                )
                for row in sorted(rows, key=lambda one: -one.outcome.energy_kept)
            ),
        )
    ]


def _classifier() -> Callable[[Path], Any]:
    import squeeze_classifier as demo
    from packaged import minilm, read_examples, split, trec
    from peft import PeftModel
    from transformers import AutoTokenizer

    source = str(minilm())
    examples = read_examples(trec())
    _, held_out = split(examples, held_out=0.2, seed=0)
    classes = sorted({example.label for example in examples})
    index = {label: number for number, label in enumerate(classes)}
    encode = partial(demo.batch_of, AutoTokenizer.from_pretrained(source), index)

    def evaluate(folder: Path) -> Any:
        model = PeftModel.from_pretrained(demo.base_model(source, len(classes)), folder)
        return demo.score(model, encode, held_out)

    return evaluate


def _language_model(questions: int) -> Callable[[Path], Any]:
    import squeeze_language_model as demo
    from packaged import read_examples, smollm2, split, trec
    from peft import PeftModel
    from transformers import AutoTokenizer

    source = str(smollm2())
    examples = [demo.coarse(example) for example in read_examples(trec())]
    _, held_out = split(examples, held_out=0.2, seed=0)
    answers = sorted({example.label for example in examples})
    task = demo.Task(AutoTokenizer.from_pretrained(source), "Question: {text} Type:")

    def evaluate(folder: Path) -> Any:
        return demo.score(
            PeftModel.from_pretrained(demo.base_model(source), folder), task, answers, held_out[:questions]
        )

    return evaluate


def _intro() -> str:
    torch.set_grad_enabled(False)
    return "\n".join(
        [
            "# Policies compared at equal parameters",
            "",
            "Written by `python -m benchmarks.policies` from the adapters of `make demo` and `make demo-lm`; one",
            f"training each, seed 0. {describe()}. Every policy's value is set as high as the budget allows; what it",
            "keeps and scores is measured on the adapter that was written and loaded with PEFT.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
