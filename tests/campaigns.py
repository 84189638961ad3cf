"""The folder of a campaign as one leaves it behind, without training anything."""

from __future__ import annotations

import json
from pathlib import Path

from lora_squeeze.campaign.manifest import Manifest, RunEntry, SqueezeEntry, write_manifest
from lora_squeeze.training.record import RunRecord, write_record
from tests.adapters import make_adapter

CONDITIONS = {"sft~lora_rank=8": 8, "sft~lora_rank=2": 2}


def make_campaign(folder: Path, *, shift: float = 0.0, seeds: tuple[int, ...] = (1, 2), finished: bool = True) -> Path:
    """Two conditions × seeds; the losses are known numbers, moved by `shift`."""
    folder.mkdir(parents=True)
    entries = [_run(folder, *one, shift, finished) for one in _cases(seeds)]
    first = entries[0]
    squeeze = SqueezeEntry("finished", first.name, 8, 4, 0.95, 6) if finished else SqueezeEntry("pending")
    manifest = Manifest(
        timestamp="2026-01-01T00:00:00+00:00",
        config_file="c.toml",
        config={},
        environment={"python": "3.11"},
        executor="inline",
        conditions=list(CONDITIONS),
        seeds=list(seeds),
        max_steps=4,
        num_runs=len(entries),
        runs=entries,
        squeeze=squeeze,
    )
    write_manifest(manifest, folder)
    if finished:
        squeezed = {f"sft~lora_rank=8_s{seed}": {"2": {"eval_loss": 1.5 + shift}} for seed in seeds}
        (folder / "squeezed.json").write_text(json.dumps(squeezed))
    return folder


def _cases(seeds: tuple[int, ...]) -> list[tuple[str, int, int]]:
    return [(condition, rank, seed) for condition, rank in CONDITIONS.items() for seed in seeds]


def _run(folder: Path, condition: str, rank: int, seed: int, shift: float, finished: bool) -> RunEntry:
    name = f"{condition}_s{seed}"
    place = folder / "runs" / name
    entry = RunEntry(name, condition, seed, f"runs/{name}", f"configs/{name}.toml", f"logs/{name}.log")
    if finished:
        make_adapter(place / "final", r=rank, seed=seed)
        steps = [{"step": step, "loss": 4.0 - 0.5 * step + seed / 10} for step in (1, 2, 3, 4)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        metrics = {"eval_loss": 1.0 + 8 / rank / 4 + seed / 10 + shift, "train_loss": 1.0}
        write_record(_record(rank, metrics), place / "run.json")
    return entry


def _record(rank: int, metrics: dict[str, float]) -> RunRecord:
    return RunRecord(
        method="sft",
        model="tiny",
        adapter="final",
        source_rank=rank,
        rank=rank,
        steps=4,
        examples=10,
        held_out=2,
        trained_parameters=100,
        metrics=metrics,
        seconds=1.0,
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:00:01+00:00",
        peak_memory=1,
        settings={},
        environment={},
    )
