"""Adapters → what they score on examples, with intervals: one load of the base model for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lora_squeeze.compression import compress
from lora_squeeze.data import Example
from lora_squeeze.decomposition import Decomposition
from lora_squeeze.evaluation.bootstrap import DRAWS, estimates
from lora_squeeze.evaluation.rows import PROMPT, Kind, Row, batches_of, kind_of, rows_of
from lora_squeeze.evaluation.scoring import Questions, Scores, metrics_for, questions_of, score
from lora_squeeze.evaluation.subject import Contestant, Subject, contestant_of, label_of
from lora_squeeze.measurements import Evaluated, Evaluation
from lora_squeeze.records import Ranks

__all__ = ["Trial", "evaluate", "evaluated", "run", "squeezed", "trial_of"]


@dataclass(frozen=True)
class Trial:
    """Examples, encoded once for a subject; they can be run as often as needed."""

    kind: Kind
    count: int
    rows: tuple[Row, ...]
    questions: Questions | None
    batch_size: int

    @property
    def steps(self) -> int:
        """How many rows a run takes, for a progress bar."""
        return len(self.rows)


def trial_of(
    subject: Subject,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    max_length: int = 0,
    prompt: str = PROMPT,
) -> Trial:
    """Encode examples. Raises DataError for what does not fit the model or cannot be encoded."""
    kind = kind_of(examples, subject.task)
    rows = rows_of(
        examples, subject.reader, task=subject.task, labels=subject.labels, prompt=prompt, max_length=max_length
    )
    questions = None if kind == "texts" else questions_of(examples, subject.labels)
    return Trial(kind, len(examples), tuple(rows), questions, batch_size)


def run(
    subject: Subject,
    contestants: Sequence[Contestant],
    trial: Trial,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> list[Scores]:
    """What contestants score on every example; the first is the original."""
    batches = batches_of(
        trial.rows, subject.reader, batch_size=trial.batch_size, device=subject.device, on_batch=on_batch
    )
    return score(subject, contestants, batches, kind=trial.kind, count=trial.count, questions=trial.questions)


def evaluate(
    subject: Subject,
    contestants: Sequence[Contestant],
    trial: Trial,
    *,
    data: str = "",
    metrics: Sequence[str] = (),
    draws: int = DRAWS,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure adapters on the examples of a trial, and compare all with the first.

    metrics
        default: all that such data have (see `lora_squeeze.evaluation.scoring`).
    draws, seed
        of the bootstrap.

    Raises DataError or ModelError.
    """
    names = metrics_for(trial.kind, metrics)
    scores = run(subject, contestants, trial, on_batch=on_batch)
    tokens = int(scores[0]["loss"][1].sum()) if trial.kind == "texts" else 0
    return evaluated(subject, contestants, scores, names, data=data, tokens=tokens, draws=draws, seed=seed)


def evaluated(
    subject: Subject,
    contestants: Sequence[Contestant],
    scores: Sequence[Scores],
    metrics: Sequence[str],
    *,
    data: str = "",
    tokens: int = 0,
    draws: int = DRAWS,
    seed: int = 0,
) -> Evaluation:
    """Scores as a record: with intervals and the differences to the first."""
    found = estimates(scores, metrics, draws=draws, seed=seed)
    return Evaluation(
        base=subject.base,
        data=data,
        examples=len(scores[0][metrics[0]][0]),
        tokens=tokens,
        adapters=tuple(
            Evaluated(one.label, one.rank, one.parameters, metrics)
            for one, metrics in zip(contestants, found, strict=True)
        ),
    )


def squeezed(
    subject: Subject,
    decomposition: Decomposition,
    plans: Iterable[Ranks],
    *,
    adapter: str = "default",
    dtype: str | None = None,
) -> list[Contestant]:
    """An adapter that is loaded, with lower ranks: what `squeeze` would write, without writing it."""
    name = label_of(subject, adapter)
    return [
        contestant_of(
            subject, compress(decomposition, plan, dtype=dtype), label=f"{name} {plan.policy}", adapter=adapter
        )
        for plan in plans
    ]
