"""Squeezed adapters → what they answer to every text of a test: one load of the model for each adapter.

Every measurement is a line of JSON; what has been measured is not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.calibration import gather
from benchmarks.machine import describe
from lora_squeeze import Decomposition, Ranks, decompose
from lora_squeeze.comparison import outcome_of, policies_at
from lora_squeeze.compression import file_cost
from lora_squeeze.errors import RankError
from lora_squeeze.evaluation.measure import Trial, squeezed, trial_of
from lora_squeeze.evaluation.rows import batches_of
from lora_squeeze.evaluation.subject import Contestant, Subject, activate, loaded, open_subject
from lora_squeeze.verbs import choose_ranks
from reproductions.small.adapters import Places, Trained, train
from reproductions.small.tasks import TASKS, texts_of

CALIBRATED_ON = 500  # texts of the training split
OUTPUTS, GRADIENTS = "outputs", "outputs and gradients"

Result = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """One squeezed adapter that is to be measured.

    policy
        "": as trained; "fixed=8"; or "params@0.25": the largest value that stays within so much of the parameters.
    route, moments
        of the decomposition: its method, and "" or the metric that it is made in.
    """

    task: str
    rank: int
    rate: float
    seed: int
    policy: str = ""
    route: str = "gram"
    moments: str = ""

    @property
    def trained(self) -> Trained:
        """The adapter."""
        return Trained(self.task, self.rank, self.rate, self.seed)


def read_measurements(path: Path) -> dict[Measurement, Result]:
    """What has been measured."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {Measurement(**one["measurement"]): one["result"] for one in map(json.loads, lines)}


def measure(trained: Trained, wanted: Iterable[Measurement], places: Places) -> Iterator[Measurement]:
    """Measure one adapter in several ways; yields what has been written down."""
    texts = texts_of(trained.task)
    folder = train(trained, places)
    subject = open_subject([str(folder)], base=places.model, labels=texts.labels, dtype="f32", device="cpu")
    trial = trial_of(subject, texts.test, batch_size=64, max_length=TASKS[trained.task].max_length)

    @cache
    def decomposed(route: str, moments: str) -> Decomposition:
        adapter = subject.adapters["default"]
        if not moments:
            return decompose(adapter, method=route)
        activate(subject, loaded(subject))
        seen = gather(subject, texts.training[:CALIBRATED_ON], gradients=moments == GRADIENTS)
        return decompose(adapter, moments=seen)

    known: dict[tuple[str, str, tuple[int, ...]], Result] = {}  # policies often agree on their ranks
    for one in wanted:
        if one.policy:
            found = decomposed(one.route, one.moments)
            plan = planned(found, one.policy)
            key = one.route, one.moments, tuple(plan.by_layer.values())
            if key not in known:
                known[key] = answers(subject, squeezed(subject, found, [plan])[0], trial)
            result = {**known[key], **kept(found, plan)}
        else:
            result = {**answers(subject, loaded(subject), trial), "majority": texts.majority}
        _write(places.measurements, one, result)
        yield one


def _write(path: Path, measurement: Measurement, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {**result, "machine": describe()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"measurement": asdict(measurement), "result": result}) + "\n")


@torch.inference_mode()
def answers(subject: Subject, contestant: Contestant, trial: Trial) -> Result:
    """Accuracy and loss, and for every text the class it is given and the loss."""
    activate(subject, contestant)
    predicted, losses, right = [0] * trial.count, [0.0] * trial.count, 0
    for batch in batches_of(trial.rows, subject.reader, batch_size=trial.batch_size, device=subject.device):
        logits = subject.model(**batch.inputs).logits
        chosen = logits.argmax(dim=1)
        right += int((chosen == batch.labels).sum())
        each = cross_entropy(logits, batch.labels, reduction="none").tolist()
        for row, number, loss in zip(batch.rows, chosen.tolist(), each, strict=True):
            predicted[row.example], losses[row.example] = number, round(loss, 5)
    return {
        "accuracy": right / trial.count,
        "loss": mean(losses),
        "parameters": contestant.parameters,
        "predicted": predicted,
        "losses": losses,
    }


def kept(decomposition: Decomposition, plan: Ranks) -> Result:
    """What a plan keeps: of the energy of all layers together, and of each layer's on average."""
    outcome = outcome_of(decomposition.spectra, plan, cost=file_cost(decomposition.adapter))
    retained = [one.retained_variance(plan.by_layer[one.name]) for one in decomposition.spectra if one.energy > 0]
    return {
        "plan": plan.policy,
        "largest_rank": outcome.largest_rank,
        "left_out": outcome.layers_left_out,
        "energy_kept": outcome.energy_kept,
        "retention": mean(retained or [1.0]),
    }


def planned(decomposition: Decomposition, policy: str) -> Ranks:
    """The ranks that a measurement's policy asks for. Raises RankError if it cannot go that low."""
    name, at, fraction = policy.partition("@")
    if not at:
        return choose_ranks(decomposition, policy)
    plans: Sequence[Ranks] = policies_at(decomposition.spectra, float(fraction), cost=file_cost(decomposition.adapter))
    for plan in plans:
        if plan.policy.startswith(f"{name}="):
            return plan
    raise RankError(f"{policy}: this policy cannot go so low")
