"""TOML → the runs of a campaign: every condition with every seed. Pure: nothing is read or written.

A condition overrides any key of a run: by its name where only one section has it (`lora_rank = 8`), or
with the section (`data.source = "b.jsonl"`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from lora_squeeze.errors import SettingsError
from lora_squeeze.sections import ONE_WILL_DO, build, choice, keys_of, read_toml, suggestion
from lora_squeeze.settings import check_squeeze
from lora_squeeze.training.settings import RunSettings, check

__all__ = ["Campaign", "CampaignSettings", "PlannedRun", "campaign_of", "read_campaign"]

SEEDS = (42, 101, 202, 303, 404, 505, 606, 707)

# What is the same for all runs of a campaign, and so belongs into no condition.
_COMMON = ("squeeze", "resume", "logging")
_SAFE = re.compile(r"[^A-Za-z0-9.+=,~_-]+")
_LONGEST = 100  # characters of a folder's name


@dataclass(frozen=True)
class CampaignSettings:
    """The `[campaign]` section."""

    seeds: list[int] = field(default_factory=lambda: list(SEEDS))
    max_steps: int = 0  # of every run; 0: [training] max_steps
    conditions: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # [[campaign.conditions]]
    parallel: bool = False  # several runs at a time, each in a process of its own
    max_workers: int = 0  # at most so many at a time; 0: all
    stagger_seconds: float = 0.0  # between two starts
    executor: str = choice(("", "inline", "processes", "ray"), "")  # "": processes if parallel, else inline
    retries: int = 0  # how often a failed run is started again, from its last checkpoint
    cpus_per_run: float = 1.0  # ray
    gpus_per_run: float = 0.0  # ray
    placement: str = choice(("SPREAD", "DEFAULT"), "SPREAD")  # ray: over the nodes, or packed
    ray_address: str = ""  # ray: of a running cluster; "": that of RAY_ADDRESS, or else a local one
    use_recommended_rank: bool = False  # train the runs after the first at the rank that its squeeze recommends
    squeeze_every_run: bool = False  # write every run's squeezed adapter, not only the first one's
    summary_script: str = ""  # Python script that is run at the end, with the campaign's folder as first argument
    summary_args: list[str] = field(default_factory=list[str], metadata=ONE_WILL_DO)  # its further arguments


@dataclass(frozen=True)
class PlannedRun:
    """One condition with one seed. `folder` is its name with what a file system may not like replaced.

    names_rank
        whether its condition sets `lora_rank`, be it to what all runs have.
    """

    name: str
    folder: str
    condition: str
    seed: int
    settings: RunSettings
    names_rank: bool


@dataclass(frozen=True)
class Campaign:
    """A whole file: what it says (`document`), and the runs that follow from it."""

    settings: CampaignSettings
    common: RunSettings
    runs: tuple[PlannedRun, ...]
    document: Mapping[str, Any]

    @property
    def executor(self) -> str:
        """Where the runs are executed."""
        return self.settings.executor or ("processes" if self.settings.parallel else "inline")

    @property
    def workers(self) -> int:
        """How many runs at a time."""
        several = self.settings.parallel or self.executor == "ray"
        return min(self.settings.max_workers or len(self.runs), len(self.runs)) if several else 1


def read_campaign(path: Path) -> Campaign:
    """Read a campaign's TOML file. Raises SettingsError for anything unknown, mistyped, missing or contradictory."""
    return campaign_of(read_toml(path), path)


def campaign_of(document: Mapping[str, Any], file: Path | str) -> Campaign:
    """The campaign that a TOML document describes; `file` is for messages."""
    if "campaign" not in document:
        raise SettingsError(f"{file}: section [campaign] is missing")
    rest = {name: section for name, section in document.items() if name != "campaign"}
    settings = build(_File, {"campaign": document["campaign"]}, file).campaign
    common = build(RunSettings, rest, file)
    _check(settings, common, file)
    runs: list[PlannedRun] = []
    for number, condition in enumerate(settings.conditions or [{}], start=1):
        place = f"{file}: [[campaign.conditions]] number {number}"
        overrides = _by_section(condition, place)
        for seed in settings.seeds:
            runs.append(_planned(rest, settings, condition, overrides, seed, place))
    _check_distinct(runs, file)
    return Campaign(settings, common, tuple(runs), deepcopy(dict(document)))


@dataclass(frozen=True)
class _File:
    campaign: CampaignSettings


def _planned(
    rest: Mapping[str, Any],
    campaign: CampaignSettings,
    condition: Mapping[str, Any],
    overrides: Mapping[str, Mapping[str, Any]],
    seed: int,
    place: str,
) -> PlannedRun:
    document: dict[str, Any] = deepcopy(dict(rest))
    document.pop("squeeze", None)  # is the campaign's business
    if campaign.max_steps:
        document.setdefault("training", {})["max_steps"] = campaign.max_steps
    for section, keys in overrides.items():
        document.setdefault(section, {}).update(keys)
    document.setdefault("training", {})["seed"] = seed
    settings = build(RunSettings, document, place)
    check(settings, place)
    label = _label(condition, settings)
    return PlannedRun(
        name=f"{label}_s{seed}",
        folder=_folder_name(f"{label}_s{seed}"),
        condition=label,
        seed=seed,
        settings=settings,
        names_rank="lora_rank" in overrides.get("model", {}),
    )


def _by_section(condition: Mapping[str, Any], place: str) -> dict[str, dict[str, Any]]:
    """Overrides with their sections: {"model": {"lora_rank": 8}}."""
    sections = {
        name: keys_of(hint)
        for name, hint in get_type_hints(RunSettings).items()
        if name not in _COMMON and isinstance(hint, type)
    }
    found: dict[str, dict[str, Any]] = {}
    for key, value in condition.items():
        if key in sections and isinstance(value, Mapping):
            found.setdefault(key, {}).update(value)
            continue
        homes = [name for name, keys in sections.items() if key in keys]
        if key == "seed":
            raise SettingsError(f"{place}: seeds are those of [campaign] seeds")
        if not homes:
            raise SettingsError(f"{place}: unknown key '{key}'{_meant(key, sections)}")
        if len(homes) > 1:
            ways = " or ".join(f"{home}.{key}" for home in homes)
            raise SettingsError(f"{place}: '{key}' is a key of several sections; write {ways}")
        found.setdefault(homes[0], {})[key] = value
    return found


def _meant(key: str, sections: Mapping[str, Mapping[str, str]]) -> str:
    if key in _COMMON:
        return f"; [{key}] is the same for all runs"
    return suggestion(key, list(dict.fromkeys(one for keys in sections.values() for one in keys)))


def _label(condition: Mapping[str, Any], settings: RunSettings) -> str:
    """`advantage+transform~key=value,…`; for other methods than grpo their name instead of the two."""
    modes = ("advantage_mode", "transform_mode")
    algorithm = settings.algorithm
    prefix = settings.method
    if settings.method == "grpo":
        prefix = f"{algorithm.advantage_mode or 'grpo'}+{algorithm.transform_mode or 'none'}"
    others = [f"{key}={_shown(value)}" for key, value in condition.items() if key not in (*modes, "method")]
    return f"{prefix}~{','.join(others)}" if others else prefix


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}={_shown(one)}" for key, one in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _folder_name(name: str) -> str:
    """A name without separators; where something had to change, a checksum keeps different names apart."""
    safe = _SAFE.sub("-", name)
    if safe == name and len(name) <= _LONGEST:
        return name
    return f"{safe[: _LONGEST - 9].rstrip('.-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _check(settings: CampaignSettings, common: RunSettings, file: Path | str) -> None:
    problems: list[str] = []
    if not settings.seeds:
        problems.append("seeds is empty: at least one run is needed")
    if len(set(settings.seeds)) < len(settings.seeds):
        problems.append(f"seeds names a seed twice: {settings.seeds}")
    if any(seed < 0 for seed in settings.seeds):
        problems.append("seeds must be at least 0")
    for key in ("max_steps", "max_workers", "stagger_seconds", "retries", "cpus_per_run", "gpus_per_run"):
        if getattr(settings, key) < 0:
            problems.append(f"{key} must be at least 0, not {getattr(settings, key)}")
    if settings.parallel and settings.executor == "inline":
        problems.append('executor = "inline" runs one after the other: leave out parallel, or the executor')
    for key in ("use_recommended_rank", "squeeze_every_run"):
        if getattr(settings, key) and common.squeeze is None:
            problems.append(f"{key} needs a section [squeeze]")
    if settings.squeeze_every_run and common.squeeze is not None and not common.squeeze.output_path:
        problems.append("squeeze_every_run needs [squeeze] output_path: where shall they be written?")
    if settings.summary_args and not settings.summary_script:
        problems.append("summary_args needs a summary_script")
    if problems:
        raise SettingsError(f"{file}: [campaign] {problems[0]}")
    if common.squeeze is not None:
        check_squeeze(common.squeeze, file)


def _check_distinct(runs: list[PlannedRun], file: Path | str) -> None:
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        if run.name in seen:
            raise SettingsError(f"{file}: two of the [[campaign.conditions]] are the same: {run.condition}")
        seen[run.name] = run
