"""The campaigns of reproductions/ at a size that a test can run, and its scripts beside one another."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lora_squeeze.campaign.spec import Campaign, campaign_of
from lora_squeeze.sections import read_toml

HERE = Path(__file__).parent.parent / "reproductions"
sys.path.insert(0, str(HERE))
import accuracy  # noqa: E402
import generation  # noqa: E402
import grids  # noqa: E402
import measures  # noqa: E402
import tasks  # noqa: E402
import vision_tasks  # noqa: E402

__all__ = ["HERE", "accuracy", "generation", "grids", "measures", "reduced", "score", "tasks", "vision_tasks"]


def reduced(path: Path, model: str, names: Collection[str], ranks: set[int], **training: Any) -> Campaign:
    """A campaign with some tasks, one seed, few ranks and steps; where the rank falls while training, it falls from 8.

    training
        other keys of `[training]`.
    """
    document = read_toml(path)
    document["campaign"] |= {"seeds": [42], "summary_script": "", "summary_args": []}
    kept = [one for one in document["campaign"]["conditions"] if Path(one["data"]["source"]).parent.name in names]
    if "rates" in path.name:
        kept = [one for one in kept if one["lr"] in (0.01, 0.03)]
    for one in kept:
        if schedule := one.get("schedule"):
            fewer = {"minimum=200": "minimum=1", "cont=200": "cont=2", "cont=700": "cont=3"}
            one |= {"lora_rank": 8, "alpha": 8, "max_steps": 15, "schedule": fewer.get(schedule, schedule)}
        elif "max_steps" in one:
            one["max_steps"] = 2 if one["max_steps"] == 10_200 else 3
        if "rewarm_steps" in one:
            one["rewarm_steps"] = 1
    document["campaign"]["conditions"] = [one for one in kept if one["lora_rank"] in ranks]
    document["model"] |= {"model": model, "device": "cpu"}
    document["training"] |= {"max_steps": 3, "batch_size": 2, "warmup_steps": 1, "data_workers": 0, **training}
    return campaign_of(document, path)


def score(path: Path, folder: Path) -> list[Any]:
    """What the campaign would do at its end, in this process."""
    arguments = read_toml(path)["campaign"]["summary_args"]
    assert arguments == [] or arguments[0] == "--to"
    return accuracy.measure(folder, [f"fixed={one}" if one.isdecimal() else one for one in arguments[1:]])
