"""Logits → what each example scored, for several adapters that take turns on every batch.

All metrics are ratios of sums over examples, Σ a_i / Σ b_i, which is what the bootstrap needs:

    loss         −log p of what counts (nats), per token of a text, per question or text otherwise
    accuracy     the likeliest answer, or class, is the right one
    accuracy-norm  the same with log p divided by the answer's length in characters
    divergence   KL(original ‖ adapter) of the next token, the answer or the class (nats)
    agreement    both find the same token, answer or class likeliest

"perplexity" is e^loss. The first adapter is the original of the last two. Adapters take turns inside
of each batch, so the original's distributions are never kept for longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from lora_squeeze.data import Choice, Example, Labelled
from lora_squeeze.encoding import IGNORED
from lora_squeeze.errors import DataError, ModelError
from lora_squeeze.evaluation.rows import Batch, Kind
from lora_squeeze.evaluation.subject import Contestant, Subject, activate

__all__ = ["METRICS", "RELATIVE", "Questions", "Scores", "metrics_for", "questions_of", "score"]

METRICS: dict[Kind, tuple[str, ...]] = {
    "texts": ("loss", "perplexity", "divergence", "agreement"),
    "choices": ("loss", "accuracy", "accuracy-norm", "divergence", "agreement"),
    "classes": ("loss", "accuracy", "divergence", "agreement"),
}
RELATIVE = ("divergence", "agreement")  # to the original: no difference is taken of these

_NUMBERS_AT_A_TIME = 1 << 26  # float32 probabilities: 256 MiB

Scores = dict[str, tuple[Tensor, Tensor]]  # metric → (a, b), each (examples,) float64


@dataclass(frozen=True)
class Questions:
    """The answers of each example: how many, which is right, and how long each is."""

    right: Tensor  # (examples,)
    sizes: Tensor  # (examples, most answers), characters; 0: there is no such answer


def metrics_for(kind: Kind, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The metrics of such data, or those asked for. Raises DataError for one that they do not have."""
    known = METRICS[kind]
    for metric in wanted:
        if metric not in known:
            raise DataError(f"metric '{metric}' cannot be had of {kind}; their metrics are {', '.join(known)}")
    return tuple(wanted) or known


def questions_of(examples: Sequence[Example], labels: Sequence[str]) -> Questions:
    """The answers of questions, or the classes of texts. Raises DataError for a class that is not in `labels`."""
    answers: list[tuple[str, ...]] = []
    right: list[int] = []
    for number, example in enumerate(examples, start=1):
        if isinstance(example, Choice):
            answers.append(example.choices)
            right.append(example.answer)
        elif isinstance(example, Labelled):
            if example.label not in labels:
                raise DataError(f"example {number}: its label '{example.label}' is not one of {', '.join(labels)}")
            answers.append(tuple(labels))
            right.append(labels.index(example.label))
    most = max(map(len, answers))
    sizes = [[len(answer) or 1 for answer in one] + [0] * (most - len(one)) for one in answers]
    return Questions(torch.tensor(right), torch.tensor(sizes))


def score(
    subject: Subject,
    contestants: Sequence[Contestant],
    batches: Iterable[Batch],
    *,
    kind: Kind,
    count: int,
    questions: Questions | None = None,
) -> list[Scores]:
    """What every contestant scores on every example; the first is the original.

    count
        of examples. questions: for choices and classes.

    Raises ModelError, naming the contestant, if its numbers are not finite.
    """
    if kind == "texts":
        tally: _Tally = _Texts(len(contestants), count)
    else:
        assert questions is not None
        tally = (_Choices if kind == "choices" else _Classes)(len(contestants), questions)
    with torch.inference_mode():
        for batch in batches:
            original: Tensor | None = None
            for number, contestant in enumerate(contestants):
                activate(subject, contestant)
                found = _counted(batch, subject.model(**batch.inputs).logits)
                if order := subject.orders.get(contestant.adapter):
                    found = found[:, order]  # as the first's head has its classes
                original = found if original is None else original
                tally.add(number, batch, found, original)
    results = tally.results()
    for contestant, scores in zip(contestants, results, strict=True):
        if not all(bool(torch.isfinite(one).all()) for pair in scores.values() for one in pair):
            raise ModelError(f"{contestant.label}: the model's numbers are NaN or infinite; try --dtype f32")
    return results


class _Tally(Protocol):
    """What has been scored so far."""

    def add(self, number: int, batch: Batch, found: Tensor, original: Tensor) -> None: ...

    def results(self) -> list[Scores]: ...


class _Texts:
    """Sums over the tokens of every text: −log p, tokens, divergence, agreement."""

    def __init__(self, contestants: int, count: int) -> None:
        self.sums = torch.zeros(contestants, 4, count, dtype=torch.float64)

    def add(self, number: int, batch: Batch, found: Tensor, original: Tensor) -> None:
        rows, targets = _targets(batch)
        places = torch.tensor([row.example for row in batch.rows])[rows.cpu()]
        step = max(1, _NUMBERS_AT_A_TIME // found.shape[-1])
        for start in range(0, len(found), step):
            part = slice(start, start + step)
            log_p = functional.log_softmax(found[part].float(), dim=-1)
            log_q = log_p if number == 0 else functional.log_softmax(original[part].float(), dim=-1)
            columns = (
                -log_p.gather(-1, targets[part, None])[:, 0],
                torch.ones(len(log_p), device=log_p.device),
                (log_q.exp() * (log_q - log_p)).sum(-1),
                (log_p.argmax(-1) == log_q.argmax(-1)).float(),
            )
            for sums, column in zip(self.sums[number], columns, strict=True):
                sums.index_add_(0, places[part], column.double().cpu())

    def results(self) -> list[Scores]:
        return [
            {
                "loss": (losses, tokens),
                "perplexity": (losses, tokens),
                "divergence": (divergences, tokens),
                "agreement": (agreements, tokens),
            }
            for losses, tokens, divergences, agreements in self.sums
        ]


class _Choices:
    """log p of every answer of every question, summed over the answer's tokens."""

    own_probability = True  # the loss is that of the right answer's text, not of the choice

    def __init__(self, contestants: int, questions: Questions) -> None:
        self.questions = questions
        shape = (contestants, *questions.sizes.shape)
        self.logs = torch.where(questions.sizes > 0, 0.0, -torch.inf).double().expand(shape).clone()

    def add(self, number: int, batch: Batch, found: Tensor, original: Tensor) -> None:
        rows, targets = _targets(batch)
        taken = torch.cat([
            functional.log_softmax(part.float(), dim=-1).gather(-1, wanted[:, None])[:, 0]
            for part, wanted in zip(*(_in_steps(one, found.shape[-1]) for one in (found, targets)), strict=True)
        ])  # fmt: skip
        sums = torch.zeros(len(batch.rows), dtype=torch.float64).index_add_(0, rows.cpu(), taken.double().cpu())
        for row, total in zip(batch.rows, sums.tolist(), strict=True):
            self.logs[number, row.example, row.candidate] = total

    def results(self) -> list[Scores]:
        return [_answered(one, self.logs[0], self.questions, own_probability=self.own_probability) for one in self.logs]


class _Classes(_Choices):
    """log p of every class of every text."""

    own_probability = False

    def add(self, number: int, batch: Batch, found: Tensor, original: Tensor) -> None:
        logs = functional.log_softmax(found.double(), dim=-1).cpu()
        for row, one in zip(batch.rows, logs, strict=True):
            self.logs[number, row.example, : len(one)] = one


def _counted(batch: Batch, logits: Tensor) -> Tensor:
    """The logits that count: (tokens to be learnt, vocabulary), or (rows, classes)."""
    return logits if batch.labels.ndim == 1 else logits[:, :-1][batch.labels[:, 1:] != IGNORED]


def _targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """The row of each token that counts, and the token."""
    rows, columns = torch.nonzero(batch.labels[:, 1:] != IGNORED, as_tuple=True)
    return rows, batch.labels[rows, columns + 1]


def _in_steps(values: Tensor, width: int) -> tuple[Tensor, ...]:
    return values.split(max(1, _NUMBERS_AT_A_TIME // width))


def _answered(logs: Tensor, original: Tensor, questions: Questions, *, own_probability: bool) -> Scores:
    """logs, original: log p of every answer, (examples, answers), −inf where there is none."""
    ones = torch.ones(len(logs), dtype=torch.float64)
    right, sizes = questions.right, questions.sizes
    log_p, log_q = functional.log_softmax(logs, dim=-1), functional.log_softmax(original, dim=-1)
    terms = torch.where(sizes > 0, log_q.exp() * (log_q - log_p), torch.zeros_like(log_p))
    scores: Scores = {
        "loss": (-(logs if own_probability else log_p).gather(-1, right[:, None])[:, 0], ones),
        "accuracy": ((logs.argmax(-1) == right).double(), ones),
        "divergence": (terms.sum(-1), ones),
        "agreement": ((logs.argmax(-1) == original.argmax(-1)).double(), ones),
    }
    if own_probability:
        scores["accuracy-norm"] = (((logs / sizes.clamp(min=1)).argmax(-1) == right).double(), ones)
    return scores
