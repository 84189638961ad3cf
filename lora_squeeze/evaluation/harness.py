"""Standard tasks by name, through EleutherAI's lm-evaluation-harness (the extra `lm-eval`).

Its numbers are taken as they are. Where a metric is the mean of what it says of each document, the
bootstrap pairs adapters document by document, as on one's own data; elsewhere (corpus perplexities,
F1…) its own standard errors are added up, which knows nothing of pairs and is more cautious.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import DataError, ModelError
from lora_squeeze.evaluation.bootstrap import DRAWS, estimates, judged
from lora_squeeze.evaluation.scoring import Scores
from lora_squeeze.evaluation.subject import Contestant, Subject, activate
from lora_squeeze.extras import require
from lora_squeeze.measurements import Estimate, Evaluated, Evaluation
from lora_squeeze.student import standard_errors

__all__ = ["evaluate_tasks", "refuse_classifier"]


def evaluate_tasks(
    subject: Subject,
    contestants: Sequence[Contestant],
    tasks: Sequence[str],
    *,
    include: Sequence[str] = (),
    limit: int = 0,
    few_shot: int | None = None,
    batch_size: int = 16,
    draws: int = DRAWS,
    seed: int = 0,
    on_adapter: Callable[[str], None] | None = None,
) -> list[Evaluation]:
    """Run lm-eval tasks with every adapter: one record for each task (of a group: for each of its tasks).

    include
        folders with YAML files of one's own tasks.
    limit
        documents of each task; 0: all. few_shot: examples in the prompt; None: as the task says.

    Raises MissingExtra, DataError for tasks that do not exist, ModelError for a classifier.
    """
    if subject.task != "causal-lm":
        raise ModelError(f"{subject.base}: lm-eval's tasks are for language models; this is a classifier")
    evaluator, manager = require("lm_eval.evaluator", "lm-eval"), require("lm_eval.tasks", "lm-eval").TaskManager
    wrapped = require("lm_eval.models.huggingface", "lm-eval").HFLM
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known = manager(include_path=list(include) or None)
    if unknown := [task for task in tasks if not known.match_tasks([task])]:
        raise DataError(f"lm-eval knows no task '{unknown[0]}'; list them with: lm-eval ls tasks")
    results: list[Mapping[str, Any]] = []
    cached = subject.model.config.use_cache
    subject.model.config.use_cache = True  # some tasks generate
    try:
        for contestant in contestants:
            activate(subject, contestant)
            results.append(
                evaluator.simple_evaluate(
                    model=wrapped(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch_size),
                    tasks=list(tasks),
                    task_manager=known,
                    num_fewshot=few_shot,
                    limit=limit or None,
                    bootstrap_iters=1000,
                )
            )
            if on_adapter is not None:
                on_adapter(contestant.label)
    finally:
        subject.model.config.use_cache = cached
    names = sorted(results[0]["samples"])
    return [_evaluation(subject, contestants, results, name, draws=draws, seed=seed) for name in names]


def refuse_classifier(adapter: Adapter) -> None:
    """Raise ModelError for an adapter that no task can be asked of, before its base model is loaded for nothing."""
    if adapter.config.get("task_type") == "SEQ_CLS":
        raise ModelError(f"{adapter.source}: lm-eval's tasks are for language models; this is a classifier")


@dataclass(frozen=True)
class _Reported:
    """A number that lm-eval gives for a task: "acc,none" is its metric acc after its filter none."""

    metric: str
    filter: str
    value: float
    error: float


def _evaluation(
    subject: Subject,
    contestants: Sequence[Contestant],
    results: Sequence[Mapping[str, Any]],
    task: str,
    *,
    draws: int,
    seed: int,
) -> Evaluation:
    reported = [_reported(one["results"][task]) for one in results]
    scores = [_by_document(one["samples"][task], values) for one, values in zip(results, reported, strict=True)]
    paired = [name for name in reported[0] if all(name in one for one in scores)]
    found = estimates(scores, paired, draws=draws, seed=seed) if paired else [{} for _ in scores]
    higher = results[0].get("higher_is_better", {}).get(task, {})
    documents = len({one["doc_id"] for one in results[0]["samples"][task]})
    adapters: list[Evaluated] = []
    for number, (one, own, values) in enumerate(zip(contestants, found, reported, strict=True)):
        metrics = {
            name: judged(
                own.get(name) or _from_errors(value, reported[0][name], documents, first=number == 0),
                higher_is_better=bool(higher.get(value.metric, True)),
                examples=documents,
            )
            for name, value in values.items()
        }
        adapters.append(Evaluated(one.label, one.rank, one.parameters, metrics))
    return Evaluation(subject.base, f"lm-eval {task}", documents, 0, tuple(adapters))


def _reported(values: Mapping[str, Any]) -> dict[str, _Reported]:
    """Name to show → number, of what lm-eval says of a task."""
    found: dict[str, _Reported] = {}
    for key, value in values.items():
        metric, comma, chain = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{chain}")
        known = float(error) if isinstance(error, int | float) else math.nan
        found[metric if chain == "none" else f"{metric} ({chain})"] = _Reported(metric, chain, float(value), known)
    return found


def _by_document(samples: Sequence[Mapping[str, Any]], reported: Mapping[str, _Reported]) -> Scores:
    """The metrics whose mean over documents is what was reported."""
    scores: Scores = {}
    for name, one in reported.items():
        chosen = sorted((sample for sample in samples if sample["filter"] == one.filter), key=lambda x: x["doc_id"])
        numbers = [sample.get(one.metric) for sample in chosen]
        if numbers and all(isinstance(number, int | float) for number in numbers):
            column = torch.tensor(numbers, dtype=torch.float64)
            if math.isclose(float(column.mean()), one.value, rel_tol=1e-6, abs_tol=1e-9):
                scores[name] = (column, torch.ones_like(column))
    return scores


def _from_errors(own: _Reported, original: _Reported, documents: int, *, first: bool) -> Estimate:
    low, high = _around(own.value, own.error, documents)
    if first:
        return Estimate(own.value, low, high)
    difference = own.value - original.value
    ends = _around(difference, math.hypot(own.error, original.error), documents)
    return Estimate(own.value, low, high, difference, *ends)


def _around(value: float, error: float, documents: int) -> tuple[float, float] | tuple[None, None]:
    """A 95 % interval; None, None where lm-eval gave no error, or one of a single document."""
    if documents < 2 or not math.isfinite(error):
        return None, None
    spread = standard_errors(documents) * error
    return value - spread, value + spread
