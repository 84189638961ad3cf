"""Accuracy of every run of a campaign, as trained and squeezed: the papers' measure, on the whole test files.

    python reproductions/accuracy.py logs/4b-direct --to 1 2 4 8
    python reproductions/accuracy.py logs/para --to para-rank=0.25 fixed=16

writes accuracy.json into the campaign's folder (what is there is not measured again) and prints means over tasks.
Of questions with choices, the likeliest answer counts; free answers are generated greedily and have to match.
The runs of a task and a seed share one load of the model.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_squeeze.campaign.manifest import RunEntry, read_manifest, refreshed, run_folder
from lora_squeeze.campaign.results import mean_of
from lora_squeeze.data import Answered, read_examples
from lora_squeeze.decomposition import decompose
from lora_squeeze.encoding import IGNORED, encode
from lora_squeeze.evaluation.measure import evaluate, squeezed, trial_of
from lora_squeeze.evaluation.subject import Contestant, Subject, activate, loaded, open_subject
from lora_squeeze.formats.folder import new_file
from lora_squeeze.training.settings import RunSettings, read_run_settings
from lora_squeeze.verbs import choose_ranks, outcome

FILE = "accuracy.json"
LONGEST_ANSWER = 32  # tokens


@dataclass(frozen=True)
class Measured:
    """One adapter's accuracy on one task.

    source_rank, rank
        that training began at, and the largest now.
    policy
        by which it was squeezed after training, "" for as trained; energy_kept: the share that this kept.
    how
        "direct", or the schedule by which the rank fell while training.
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
    subject = open_subject(finals, base=model.model, dtype=model.dtype, device=model.device)
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
    scores = _accuracies(subject, contestants, examples, batch_size)
    return [
        Measured(
            run=entry.name,
            task=Path(source).parent.name,
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
        )
        for (entry, one, policy, kept), contestant, score in zip(rows, contestants, scores, strict=True)
    ]


def _accuracies(
    subject: Subject, contestants: Sequence[Contestant], examples: Sequence[Any], batch_size: int
) -> list[float]:
    if isinstance(examples[0], Answered):
        return [exact_matches(subject, one, examples, batch_size=batch_size) for one in contestants]
    trial = trial_of(subject, examples, batch_size=batch_size)
    found = evaluate(subject, contestants, trial, metrics=["accuracy"], draws=1)
    return [one.metrics["accuracy"].value for one in found.adapters]


@torch.no_grad()
def exact_matches(subject: Subject, contestant: Contestant, examples: Sequence[Answered], *, batch_size: int) -> float:
    """The share of examples whose greedy completion is one of the row's `accepted`, but for case and white space."""
    activate(subject, contestant)
    tokenizer, right = subject.tokenizer, 0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        prompts = [_prompt(one, tokenizer) for one in batch]
        width = max(map(len, prompts))
        ids = [[tokenizer.pad_token_id] * (width - len(one)) + one for one in prompts]
        mask = [[0] * (width - len(one)) + [1] * len(one) for one in prompts]
        written = subject.model.generate(
            input_ids=torch.tensor(ids, device=subject.device),
            attention_mask=torch.tensor(mask, device=subject.device),
            max_new_tokens=LONGEST_ANSWER,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        for one, tokens in zip(batch, written, strict=True):
            answer = tokenizer.decode(tokens[width:], skip_special_tokens=True)
            right += _plain(answer) in [_plain(text) for text in one.fields["accepted"]]
    return right / len(examples)


def _prompt(example: Answered, tokenizer: Any) -> list[int]:
    encoded = encode(example, tokenizer)
    return [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label == IGNORED]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def summary(measured: Sequence[Measured]) -> list[str]:
    """Means over tasks, then over seeds ± s.e.m., a line for every way; of these, only tasks that all seeds have."""
    ways: defaultdict[tuple[Any, ...], defaultdict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for one in measured:
        ways[one.how, one.source_rank, one.lr, one.steps, one.policy][one.seed][one.task] = one.accuracy
    lines = [f"{'how':<12} {'rank':>4} {'lr':>6} {'steps':>6}  {'squeezed by':<18} {'accuracy':>16}  tasks"]
    for (how, rank, lr, steps, policy), seeds in sorted(ways.items()):
        tasks = set.intersection(*(set(by_task) for by_task in seeds.values()))
        if tasks:
            mean = mean_of(mean_of(by_task[task] for task in tasks).mean for by_task in seeds.values())
            shown = f"{mean.mean:.2%} ± {mean.error:.2%}"
            lines.append(f"{how:<12} {rank:>4} {lr:>6g} {steps:>6}  {policy:<18} {shown:>16}  {len(tasks)}")
    return lines


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
