"""Accuracy of every run of a campaign, as trained and squeezed: the papers' measure, on the whole test files.

    python reproductions/accuracy.py logs/4b-direct --to 1 2 4 8
    python reproductions/accuracy.py logs/para --to para-rank=0.25 fixed=16

writes accuracy.json into the campaign's folder (what is there is not measured again) and prints means over tasks.
Of questions with choices, the likeliest answer counts; free answers are generated greedily, and have to match or are
measured as their task's are (see `vision_tasks.py`). Where there are images, everything is measured again with a
plain grey one of the same size for each: what is still right was not seen. The runs of a task and a seed share one
load of the model.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import vision_tasks
from generation import completions
from measures import METRICS

from lora_squeeze.campaign.manifest import RunEntry, read_manifest, refreshed, run_folder
from lora_squeeze.campaign.results import mean_of
from lora_squeeze.data import Answered, Example, images_of, read_examples, without_sight
from lora_squeeze.decomposition import decompose
from lora_squeeze.evaluation.measure import evaluate, squeezed, trial_of
from lora_squeeze.evaluation.subject import Contestant, Subject, loaded, open_subject
from lora_squeeze.formats.folder import new_file
from lora_squeeze.training.settings import RunSettings, read_run_settings
from lora_squeeze.verbs import choose_ranks, outcome

FILE = "accuracy.json"
LONGEST_ANSWER = 32  # tokens
LONGEST_SEEN = 64  # where there are images: titles of books


@dataclass(frozen=True)
class Measured:
    """One adapter's accuracy on one task.

    source_rank, rank
        that training began at, and the largest now.
    policy
        by which it was squeezed after training, "" for as trained; energy_kept: the share that this kept.
    how
        "direct", or the schedule by which the rank fell while training.
    accuracy
        or what the task's measure gives instead, a mean from 0 to 1.
    grey
        the same with every image grey; None where there are no images.
    """

    run: str
    task: str
    seed: int
    steps: int
    lr: float
    how: str
    source_rank: int
    policy: str
    rank: int
    parameters: int
    energy_kept: float
    accuracy: float
    grey: float | None = None


def measure(folder: Path, policies: Sequence[str], *, batch_size: int = 16) -> list[Measured]:
    """Measure every finished run of a campaign as trained, and by every policy that leaves it a lower rank."""
    manifest = refreshed(read_manifest(folder), folder)
    found = read_measured(folder)
    known = {(one.run, one.policy) for one in found}
    groups: defaultdict[tuple[str, int], list[tuple[RunEntry, list[str]]]] = defaultdict(list)
    for entry in manifest.runs:
        if entry.status == "finished":
            settings = read_run_settings(run_folder(folder, entry).settings)
            fitting = [one for one in ("", *policies) if not one.startswith("fixed=") or int(one[6:]) < entry.rank]
            if missing := [one for one in fitting if (entry.name, one) not in known]:
                groups[settings.data.eval_source[0], entry.seed].append((entry, missing))
    for (source, _), runs in groups.items():
        found += _measure_together(folder, source, runs, batch_size)
        with new_file(folder / FILE, overwrite=True) as file:
            file.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    return found


def read_measured(folder: Path) -> list[Measured]:
    """What `measure` has written."""
    path = folder / FILE
    return [Measured(**one) for one in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def _measure_together(
    folder: Path, source: str, runs: Sequence[tuple[RunEntry, list[str]]], batch_size: int
) -> list[Measured]:
    settings = [read_run_settings(run_folder(folder, entry).settings) for entry, _ in runs]
    finals = [str(run_folder(folder, entry).final) for entry, _ in runs]
    model = settings[0].model
    examples = read_examples(source)
    subject = open_subject(
        finals,
        base=model.model,
        examples=examples,
        dtype=model.dtype,
        quantization=model.quantization,
        device=model.device,
    )
    contestants: list[Contestant] = []
    rows: list[tuple[RunEntry, RunSettings, str, float]] = []
    for name, one, (entry, policies) in zip(subject.adapters, settings, runs, strict=True):
        decomposition = decompose(subject.adapters[name])
        for policy in policies:
            kept = 1.0
            if policy:
                plan = choose_ranks(decomposition, policy)
                kept = outcome(decomposition, plan).energy_kept
                contestants += squeezed(subject, decomposition, [plan], adapter=name)
            else:
                contestants.append(loaded(subject, name))
            rows.append((entry, one, policy, kept))
    task = Path(source).parent.name
    sees = any(map(images_of, examples))
    scores = _accuracies(subject, contestants, examples, task, batch_size)
    blind = tuple(map(without_sight, examples))
    unseen = _accuracies(subject, contestants, blind, task, batch_size) if sees else [None] * len(scores)
    return [
        Measured(
            run=entry.name,
            task=task,
            seed=entry.seed,
            steps=entry.steps,
            lr=one.training.lr,
            how=one.in_squeeze.schedule or "direct",
            source_rank=one.rank,
            policy=policy,
            rank=contestant.rank,
            parameters=contestant.parameters,
            energy_kept=kept,
            accuracy=score,
            grey=grey,
        )
        for (entry, one, policy, kept), contestant, score, grey in zip(rows, contestants, scores, unseen, strict=True)
    ]


def _accuracies(
    subject: Subject, contestants: Sequence[Contestant], examples: Sequence[Example], task: str, batch_size: int
) -> list[float]:
    asked = [one for one in examples if isinstance(one, Answered)]
    if not asked:
        trial = trial_of(subject, examples, batch_size=batch_size)
        found = evaluate(subject, contestants, trial, metrics=["accuracy"], draws=1)
        return [one.metrics["accuracy"].value for one in found.adapters]
    worth = METRICS[vision_tasks.TASKS[task].metric if task in vision_tasks.TASKS else "exact"]
    longest = LONGEST_SEEN if any(map(images_of, asked)) else LONGEST_ANSWER
    written = completions(subject, contestants, asked, batch_size=batch_size, max_tokens=longest)
    return [
        sum(worth(text, one.fields["accepted"]) for text, one in zip(texts, asked, strict=True)) / len(asked)
        for texts in written
    ]


def summary(measured: Sequence[Measured]) -> list[str]:
    """Means over tasks, then over seeds ± s.e.m., a line for every way; of these, only tasks that all seeds have.

    Where there are images, the same with every image grey stands beside it.
    """
    ways: defaultdict[tuple[Any, ...], defaultdict[int, dict[str, Measured]]] = defaultdict(lambda: defaultdict(dict))
    for one in measured:
        ways[one.how, one.source_rank, one.lr, one.steps, one.policy][one.seed][one.task] = one
    sees = any(one.grey is not None for one in measured)
    beside = f" {'images grey':>16}" if sees else ""
    lines = [f"{'how':<12} {'rank':>4} {'lr':>6} {'steps':>6}  {'squeezed by':<18} {'accuracy':>16}{beside}  tasks"]
    for (how, rank, lr, steps, policy), seeds in sorted(ways.items()):
        tasks = sorted(set.intersection(*(set(by_task) for by_task in seeds.values())))
        if tasks:
            chosen = [[by_task[task] for task in tasks] for by_task in seeds.values()]
            shown = f"{_mean([[one.accuracy for one in some] for some in chosen]):>16}"
            if sees:
                grey = [[one.grey for one in some if one.grey is not None] for some in chosen]
                shown += f" {_mean(grey) if all(grey) else '':>16}"
            lines.append(f"{how:<12} {rank:>4} {lr:>6g} {steps:>6}  {policy:<18} {shown}  {len(tasks)}")
    return lines


def _mean(by_seed: Sequence[Sequence[float]]) -> str:
    mean = mean_of(mean_of(values).mean for values in by_seed)
    return f"{mean.mean:.2%} ± {mean.error:.2%}"


def gains(measured: Sequence[Measured]) -> dict[tuple[int, int], float]:
    """(source rank, target rank) → accuracy of Post-Squeeze minus that of training at the target, mean over all pairs.

    Pairs share task and seed. Where the target was trained at several rates, the source's own is compared
    (figure 3); where at one, that one (figure 4).
    """
    trained: defaultdict[tuple[str, int, int], list[Measured]] = defaultdict(list)
    for one in measured:
        if one.how == "direct" and not one.policy:
            trained[one.task, one.seed, one.source_rank].append(one)
    found: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for one in measured:
        if one.how == "direct" and one.policy.startswith("fixed="):
            target = int(one.policy.removeprefix("fixed="))
            others = trained[one.task, one.seed, target]
            fitting = others if len(others) == 1 else [other for other in others if other.lr == one.lr]
            found[one.source_rank, target] += [one.accuracy - other.accuracy for other in fitting]
    return {pair: mean_of(values).mean for pair, values in sorted(found.items()) if values}


def heatmap(found: dict[tuple[int, int], float]) -> list[str]:
    """Gains in points, source rank down, target rank across."""
    sources, targets = (sorted({pair[side] for pair in found}) for side in (0, 1))
    lines = ["gain  " + "".join(f"{f'→ {target}':>8}" for target in targets)] if found else []
    for source in sources:
        cells = [f"{100 * found[source, one]:+.2f}" if (source, one) in found else "" for one in targets]
        lines.append(f"{source:>6}" + "".join(f"{cell:>8}" for cell in cells))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of a campaign's runs, as trained and squeezed.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", nargs="*", default=[], help="ranks, or policies as POLICY=VALUE")
    parser.add_argument("--batch-size", type=int, default=16)
    chosen = parser.parse_args()
    policies = [f"fixed={one}" if one.isdecimal() else one for one in chosen.to]
    measured = measure(chosen.folder, policies, batch_size=chosen.batch_size)
    print("\n".join(summary(measured)))
    if lines := heatmap(gains(measured)):
        print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
