"""Every policy over a grid of its values: what a report needs so that looking is only looking up.

A grid holds the budgets and thresholds that people ask for, and between them values that are as
round as possible, chosen where the number of parameters jumps most. So at any budget each policy
has a setting close below it, and every number shown belongs to a setting that can be repeated as
`--policy NAME=VALUE`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from itertools import pairwise
from typing import Any, TypeVar

from lora_squeeze.analysis import analyze
from lora_squeeze.comparison import outcome_of
from lora_squeeze.documents import parse_json
from lora_squeeze.errors import RankError
from lora_squeeze.limits import NO_LIMITS, Limits
from lora_squeeze.policies import POLICIES, By, Cost, parse_policy
from lora_squeeze.records import Analysis, Outcome, Ranks, Verdict
from lora_squeeze.spelling import spell
from lora_squeeze.summary import Summary

__all__ = ["BUDGETS", "RETENTIONS", "Exploration", "Setting", "explore", "explore_analysis"]

Value = TypeVar("Value", int, float)

# Fractions of the parameters, and of the energy, that a report can be asked for.
BUDGETS = tuple(
    thousandths / 1000
    for first, last, step in ((2, 10, 2), (10, 50, 5), (50, 100, 10), (100, 300, 10), (300, 500, 20), (500, 1001, 50))
    for thousandths in range(first, last, step)
)
RETENTIONS = tuple(
    thousandths / 1000
    for first, last, step in ((100, 500, 100), (500, 800, 20), (800, 950, 10), (950, 990, 5), (990, 1001, 1))
    for thousandths in range(first, last, step)
)
_PER_POLICY, _FEWEST = 60, 12  # settings that a grid grows to
_MANY_LAYERS = 600  # beyond this, grids are coarser
_DIGITS = 4  # of a value that is put between two others

_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)

# The values a grid starts with, ascending or descending; between them it is refined.
_STARTS: dict[str, tuple[float, ...]] = {
    "variance": _SHARES,
    "energy": _SHARES,
    "cumulative": _SHARES,
    "para-energy": _SHARES,
    "para-rank": BUDGETS,
    "params": BUDGETS,
    "sigma-ratio": (1.0, 2.0, 5.0, 10.0, 100.0, 1e4, 1e8, 1e12),
    "stable-rank": (0.01, 0.1, 1.0, 10.0, 100.0, 1e3),
    "effective-rank": (0.01, 0.1, 1.0, 10.0, 100.0),
    "optimal-threshold": (1e6, 1e3, 10.0, 1.0, 0.1, 1e-3, 1e-6, 1e-9),
    "knee": (0.01, 0.1, 1.0, 10.0, 100.0),
}


@dataclass(frozen=True)
class Setting:
    """A policy at one value: the ranks it chooses, what they keep and cost, and which runtimes load them.

    spelling
        as `--policy` takes it.
    ranks
        of the layers, in their order.
    """

    spelling: str
    ranks: tuple[int, ...]
    outcome: Outcome
    verdicts: tuple[Verdict, ...] = ()

    @property
    def policy(self) -> str:
        """The name before the "="."""
        return self.spelling.partition("=")[0]

    def plan(self, analysis: Analysis) -> Ranks:
        """The plan that `compress --ranks` takes."""
        names = (spectrum.name for spectrum in analysis.spectra)
        return Ranks(policy=self.spelling, by_layer=dict(zip(names, self.ranks, strict=True)))


@dataclass(frozen=True)
class Exploration:
    """An adapter and every policy over a grid of its values.

    settings
        by policy, by rising number of parameters; settings with the same ranks are there once.
    summary, source_sha256
        of the adapter; None and "" if only its analysis was at hand. Then `file_bytes` are 0 and
        there are no verdicts.
    options
        of the command line that hold for every setting: limits, the runtime, the dtype.
    first
        the spelling of the setting that is to be looked at first.
    """

    analysis: Analysis
    settings: tuple[Setting, ...]
    first: str
    summary: Summary | None = None
    source_sha256: str = ""
    options: tuple[str, ...] = ()

    @cached_property
    def curves(self) -> Analysis:
        """The analysis with every rank from 1 to the source rank as a candidate."""
        ranks = range(1, self.analysis.source_rank + 1)
        return analyze(self.analysis.spectra, source=self.analysis.source, target_ranks=ranks)

    def to_json(self) -> str:
        """All fields; `from_json` reads them back. Verdicts, mostly the same, are listed once."""
        verdicts = list(dict.fromkeys(setting.verdicts for setting in self.settings))
        places = {one: place for place, one in enumerate(verdicts)}
        settings = [
            {
                "spelling": setting.spelling,
                "ranks": setting.ranks,
                "outcome": dataclasses.asdict(setting.outcome),
                "verdicts": places[setting.verdicts],
            }
            for setting in self.settings
        ]
        fields = {
            "record": "Exploration",
            "analysis": json.loads(self.analysis.to_json()),
            "settings": settings,
            "verdicts": [[dataclasses.asdict(verdict) for verdict in one] for one in verdicts],
            "first": self.first,
            "summary": json.loads(self.summary.to_json()) if self.summary else None,
            "source_sha256": self.source_sha256,
            "options": self.options,
        }
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Exploration:
        """Read what `to_json` wrote. Raises RankError if the text is something else."""
        try:
            fields = parse_json(text)
        except ValueError as error:
            raise RankError(f"not valid JSON: {error}") from error
        if not isinstance(fields, dict) or fields.pop("record", None) != "Exploration":
            raise RankError('not an Exploration record: the field "record": "Exploration" is missing')
        analysis = Analysis.from_json(json.dumps(fields.pop("analysis", None)))
        try:
            found = cls(
                analysis=analysis,
                settings=_settings(fields["settings"], fields["verdicts"]),
                first=str(fields["first"]),
                summary=Summary.from_json(json.dumps(fields["summary"])) if fields["summary"] else None,
                source_sha256=str(fields["source_sha256"]),
                options=tuple(map(str, fields["options"])),
            )
            if any(len(setting.ranks) != len(analysis.spectra) for setting in found.settings):
                raise ValueError("a setting does not have a rank for every layer")
            next(setting for setting in found.settings if setting.spelling == found.first)
        except (KeyError, TypeError, ValueError, IndexError, StopIteration) as error:
            raise RankError(f"the exploration is damaged: {error!r}") from error
        return found


def explore(
    analysis: Analysis,
    *,
    choose: Callable[[str], Ranks],
    measure: Callable[[Ranks], Outcome],
    judge: Callable[[Ranks], tuple[Verdict, ...]] = lambda _ranks: (),
    largest_file: int = 0,
    also: Iterable[str] = (),
    on_policy: Callable[[str], None] | None = None,
) -> tuple[Setting, ...]:
    """Every policy over a grid of its values.

    choose, measure, judge
        spelling → ranks, ranks → what they keep and cost, ranks → which runtimes load them.
    largest_file
        bytes of the source, the largest budget of `size`; 0 leaves that policy out.
    also
        spellings that have to be among the settings; they may raise RankError.
    on_policy
        called with the name of each policy of POLICIES when it is finished.

    Values that cannot be (a budget below the smallest ranks) are left out. Raises RankError if no
    setting is possible, with the reason why the first one is not.
    """
    names = [spectrum.name for spectrum in analysis.spectra]
    wanted = list(dict.fromkeys(also))
    per_policy = max(_FEWEST, min(_PER_POLICY, _PER_POLICY * _MANY_LAYERS // len(analysis.spectra)))
    settings: list[Setting] = []
    failures: list[RankError] = []

    def plan_at(spelling: str) -> Ranks | None:
        try:
            return choose(spelling)
        except RankError as error:
            failures.append(error)
            return None

    def setting_of(spelling: str, plan: Ranks) -> Setting | None:
        try:
            return Setting(spelling, tuple(plan.by_layer[name] for name in names), measure(plan), judge(plan))
        except RankError as error:
            if spelling in wanted:
                raise
            failures.append(error)
            return None

    for policy in POLICIES:
        asked = {spelling: choose(spelling) for spelling in wanted if parse_policy(spelling).name == policy}
        plans = _Grid(plan_at, analysis, per_policy).plans(policy, largest_file)
        found = (setting_of(*one) for one in _distinct(asked, plans))
        settings += sorted(filter(None, found), key=lambda one: (one.outcome.parameters, one.outcome.energy_kept))
        if on_policy is not None:
            on_policy(policy)
    if not settings:
        raise failures[0]
    return tuple(settings)


def explore_analysis(
    analysis: Analysis,
    policies: Sequence[str] = ("variance=0.95",),
    *,
    by: By = "mean",
    limits: Limits = NO_LIMITS,
    options: Iterable[str] = (),
    on_policy: Callable[[str], None] | None = None,
) -> Exploration:
    """What can be said without the adapter itself: no bytes, no runtimes, no `size`.

    Parameters as in `lora_squeeze.verbs.explore_adapter`.
    """
    unknown = Cost(component_bytes={}, file_size=lambda _ranks: 0)

    def choose(spelling: str) -> Ranks:
        chosen = parse_policy(spelling)
        if chosen.name == "size":
            raise RankError(f"{spelling} needs the adapter, and this is only its analysis")
        return chosen.choose(analysis.spectra, limits=limits, **({"by": by} if chosen.name == "variance" else {}))

    return Exploration(
        analysis=analysis,
        settings=explore(
            analysis,
            choose=choose,
            measure=lambda ranks: outcome_of(analysis.spectra, ranks, cost=unknown),
            also=policies,
            on_policy=on_policy,
        ),
        first=policies[0],
        options=tuple(options),
    )


@dataclass(frozen=True)
class _Grid:
    """Where a policy is looked at: round values, and more of them where the number of parameters jumps."""

    plan_at: Callable[[str], Ranks | None]
    analysis: Analysis
    per_policy: int

    def plans(self, policy: str, largest_file: int) -> dict[str, Ranks]:
        """Spelling → plan, for all values that are possible."""
        if policy == "fixed":
            spelled = [
                f"fixed={rank}" for rank in _thinned(range(1, self.analysis.source_rank + 1), 2 * self.per_policy)
            ]
        elif policy == "size":
            budgets = [_round(share * largest_file, 3) for share in _thinned(BUDGETS, self.per_policy)]
            spelled = [f"size={_bytes(budget)}" for budget in dict.fromkeys(budgets) if largest_file]
        else:
            return self._refined(policy)
        return {spelling: plan for spelling in spelled if (plan := self.plan_at(spelling))}

    def _refined(self, policy: str) -> dict[str, Ranks]:
        """More values between those that are farthest apart, until there are enough or none is left."""
        found: dict[str, Ranks] = {}
        gaps: list[tuple[float, float, float]] = []
        plans: dict[float, Ranks] = {}

        def look(value: float) -> bool:
            plan = self.plan_at(spelling := f"{policy}={spell(value)}")
            if plan is not None:
                found[spelling] = plans[value] = plan
            return plan is not None

        def push(a: float, b: float) -> None:
            if plans[a].by_layer != plans[b].by_layer:
                # Roots, so that small budgets, where a per cent is much, have more settings.
                heappush(gaps, (-abs(self._parameters(plans[a]) ** 0.5 - self._parameters(plans[b]) ** 0.5), a, b))

        starts = [value for value in _thinned(_STARTS[policy], self.per_policy) if look(value)]
        for a, b in pairwise(starts):
            push(a, b)
        distinct = len(gaps) + 1
        while gaps and distinct < self.per_policy:
            _, a, b = heappop(gaps)
            middle = _between(a, b)
            if middle is not None and look(middle):
                distinct += plans[a].by_layer != plans[middle].by_layer != plans[b].by_layer
                push(a, middle)
                push(middle, b)
        return found

    def _parameters(self, plan: Ranks) -> int:
        return sum(s.component_size * plan.by_layer[s.name] for s in self.analysis.spectra)


def _thinned(values: Sequence[Value], most: int) -> list[Value]:
    """At most about this many of them, the last one always."""
    step = -(-len(values) // most)
    return list(values[::-1][::step][::-1])


def _between(a: float, b: float) -> float | None:
    """The roundest number near the middle; None if it would need too many digits."""
    low, high = min(a, b), max(a, b)
    middle = math.sqrt(low * high) if high > 2 * low else (low + high) / 2
    rounded = (_round(middle, digits) for digits in range(1, _DIGITS + 1))
    return next((value for value in rounded if low < value < high), None)


def _distinct(asked: Mapping[str, Ranks], plans: Mapping[str, Ranks]) -> list[tuple[str, Ranks]]:
    """One spelling for each plan: those that were asked for, or else the shortest."""
    seen = {tuple(plan.by_layer.values()) for plan in asked.values()}
    kept = list(asked.items())
    for spelling in sorted(plans, key=lambda one: (len(one), one)):
        ranks = tuple(plans[spelling].by_layer.values())
        if ranks not in seen:
            seen.add(ranks)
            kept.append((spelling, plans[spelling]))
    return kept


def _settings(entries: Any, verdicts: Any) -> tuple[Setting, ...]:
    known = [tuple(map(_verdict, one)) for one in verdicts]
    return tuple(
        Setting(
            spelling=str(entry["spelling"]),
            ranks=tuple(map(int, entry["ranks"])),
            outcome=Outcome(**entry["outcome"]),
            verdicts=known[entry["verdicts"]],
        )
        for entry in entries
    )


def _verdict(fields: dict[str, Any]) -> Verdict:
    lists: dict[str, Any] = {name: tuple(map(str, fields[name])) for name in ("needs", "reasons")}
    return Verdict(**{**fields, **lists})


def _round(value: float, digits: int) -> float:
    """To this many significant digits."""
    return float(f"{value:.{digits - 1}e}")


def _bytes(count: float) -> str:
    unit, name = next((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if count >= unit)
    return f"{spell(count / unit)}{name}"
