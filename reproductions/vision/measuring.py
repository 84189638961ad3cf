"""Adapters, as trained and squeezed → what they answer with the images of the test, and with a grey one instead.

Every adapter goes the way of a user's: saved by PEFT, squeezed by this library into another folder, loaded by PEFT.
Every measurement is a line of JSON; what has been measured is not measured again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.machine import describe
from lora_squeeze import decompose, open_adapter, squeeze
from lora_squeeze.verbs import choose_ranks
from reproductions.small.measuring import kept
from reproductions.vision.data import Data, Question, share
from reproductions.vision.model import SeeingClassifier
from reproductions.vision.training import Encoder, Places, Trained, aligned, digest_of, encoder_of, train

BATCH = 64  # questions that are answered at once

Result = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """One adapter that is to be measured.

    to
        the rank that it is squeezed to after training; 0: as trained.
    split
        "test" or "validation".
    """

    kind: str
    rank: int
    rate: float
    seed: int
    to: int = 0
    split: str = "test"

    @property
    def trained(self) -> Trained:
        """The adapter."""
        return Trained(self.kind, self.rank, self.rate, self.seed)


Done = Mapping[Measurement, Result]


def read_measurements(path: Path) -> dict[Measurement, Result]:
    """What has been measured."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {Measurement(**one["measurement"]): one["result"] for one in map(json.loads, lines)}


def check_base(places: Places, data: Data, done: Done) -> str:
    """The digest of the model that adapters are trained on.

    Raises ValueError if what has been measured was trained on another one: the two would be mixed.
    """
    digest = digest_of(aligned(places, data))
    if others := {result["base"] for result in done.values()} - {digest}:
        raise ValueError(
            f"{places.measurements}: was measured on another aligned model ({', '.join(sorted(others))}) than the one "
            f"in {places.aligned} ({digest}). Keep what is measured with this one apart, with --results FOLDER"
        )
    return digest


def measure(trained: Trained, wanted: Iterable[Measurement], places: Places, data: Data) -> Iterator[Measurement]:
    """Measure one adapter in several ways; yields what has been written down."""
    base = digest_of(aligned(places, data))
    adapter = None if trained.kind == "none" else train(trained, places, data)
    decomposition = None
    for one in wanted:
        model: Any = SeeingClassifier.from_pretrained(aligned(places, data))
        found: Result = {}
        with tempfile.TemporaryDirectory() as scratch:
            folder = adapter
            if one.to and adapter is not None:
                decomposition = decomposition or decompose(open_adapter(adapter))
                plan = choose_ranks(decomposition, f"fixed={one.to}")
                squeeze(decomposition, plan, folder := Path(scratch) / "squeezed")
                found = kept(decomposition, plan)
            if folder is not None:
                found["parameters"] = open_adapter(folder).parameters
                model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        questions = data.test if one.split == "test" else data.validation
        seen = data.seen.test if one.split == "test" else data.seen.training
        if one.split == "test" and not one.to:
            found |= {"blind": data.blind(), "majority": data.majority()}
        result = {**scores(model, questions, seen, data, encoder_of(places, data)), **found}
        _write(places.measurements, one, {**result, "base": base, "machine": describe()})
        yield one


def scores(model: Any, questions: Sequence[Question], seen: Tensor, data: Data, encode: Encoder) -> Result:
    """Accuracy and loss with the images, accuracy with a grey one, and every answer as a letter: a is the first.

    Without an image, what is answered depends on the question alone: each wording is asked once.
    """
    model.eval()
    logits = answered(model, questions, seen[[one.image for one in questions]], encode)
    labels = torch.tensor([data.answers.index(one.answer) for one in questions])
    chosen = logits.argmax(dim=1)
    once = list({one.text: one for one in questions}.values())
    blind = answered(model, once, data.seen.grey.expand(len(once), -1, -1), encode).argmax(dim=1).tolist()
    by_text = {one.text: data.answers[number] for one, number in zip(once, blind, strict=True)}
    return {
        "accuracy": share((chosen == labels).tolist()),
        "ablated": share(by_text[one.text] == one.answer for one in questions),
        "loss": float(cross_entropy(logits, labels)),
        "predicted": "".join(chr(ord("a") + number) for number in chosen.tolist()),
    }


@torch.inference_mode()
def answered(model: Any, questions: Sequence[Question], seen: Tensor, encode: Encoder) -> Tensor:
    """Logits (questions, answers) in the order of the questions, of which those of like length are asked together."""
    order = sorted(range(len(questions)), key=lambda place: len(questions[place].text))
    found: list[Tensor] = []
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        found.append(model(**encode([questions[place] for place in places], seen[places])).logits)
    logits = torch.cat(found)
    return logits[torch.tensor(order).argsort()]


def _write(path: Path, measurement: Measurement, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"measurement": asdict(measurement), "result": result}) + "\n")
