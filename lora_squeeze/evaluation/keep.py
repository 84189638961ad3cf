"""The smallest adapter that is still good enough: bisection over plans, one decomposition for all of them.

The criterion compares with the original on the same examples; for keep = 0.99,

    accuracy   at least 0.99 times the original's
    agreement  with the original at least 0.99
    loss       at most the original's / 0.99

Plans of a policy are put in order of their size and bisected. Quality need not fall steadily with size:
bisection finds a place where a plan passes and the next smaller one that was tried does not, and what is
returned has itself been measured and has passed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_squeeze.comparison import ENDS
from lora_squeeze.decomposition import Decomposition
from lora_squeeze.errors import DataError, ModelError, RankError, SettingsError
from lora_squeeze.evaluation.bootstrap import DRAWS, LEAST, share_of_draws
from lora_squeeze.evaluation.measure import Trial, run, squeezed
from lora_squeeze.evaluation.scoring import Scores, metrics_for
from lora_squeeze.evaluation.subject import Contestant, Subject, contestant_of, loaded
from lora_squeeze.formats import open_adapter, weights_size
from lora_squeeze.measurements import CRITERIA, KeepStep, Kept
from lora_squeeze.policies import POLICIES
from lora_squeeze.records import Compression, Ranks
from lora_squeeze.spelling import spell
from lora_squeeze.verbs import choose_ranks, full_rank, squeeze

__all__ = ["SURE", "Criterion", "bisected", "judge", "keep_quality", "ladder"]

SURE = 0.95  # of the draws, for `confident`

_WHOLE, _ALLOWED = "full rank", "largest ranks allowed"  # what plans are called that are of no policy

_PLANS = 128  # of a policy with a continuous value: neighbours differ by 7 per cent


@dataclass(frozen=True)
class Criterion:
    """What an adapter has to keep.

    keep
        the share of the original's quality.
    confident
        it must hold in 95 % of the bootstrap draws, too, not only on the examples as they are.
    """

    metric: str
    keep: float
    confident: bool = False
    draws: int = DRAWS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.metric not in CRITERIA:
            raise SettingsError(f"metric '{self.metric}' cannot be kept; {', '.join(CRITERIA)} can")
        if not 0 < self.keep <= 1:
            raise SettingsError(
                f"keep={spell(self.keep)} is not possible: it is a share of the original, above 0 and up to 1"
            )

    def limit(self, original: float) -> float:
        """The number that may just be reached."""
        return {"loss": original / self.keep, "accuracy": original * self.keep, "agreement": self.keep}[self.metric]

    def holds(self, value: float, original: float) -> bool:
        """Whether this number is good enough; equal ones are, however they were rounded."""
        limit = self.limit(original)
        close = math.isclose(value, limit, rel_tol=1e-12)
        return close or (value < limit if self.metric == "loss" else value > limit)


def judge(criterion: Criterion, scores: Scores, original: Scores) -> tuple[float, bool, float]:
    """The metric, whether it passes, and the share of bootstrap draws in which it would."""
    pair = [scores[criterion.metric], original[criterion.metric]]
    value, first = (_mean_of(one, criterion.metric) for one in (scores, original))
    confidence = share_of_draws(pair, lambda drawn: criterion.holds(*drawn), draws=criterion.draws, seed=criterion.seed)
    passes = criterion.holds(value, first) and (confidence >= SURE or not criterion.confident)
    return value, passes, confidence


def bisected(count: int, passes: Callable[[int], bool]) -> int:
    """The place, of `count` in order of size, of one that passes while the next smaller one tried does not.

    The last is taken to pass and is not asked.
    """
    failing, passing = -1, count - 1
    while passing - failing > 1:
        middle = (failing + passing) // 2
        if passes(middle):
            passing = middle
        else:
            failing = middle
    return passing


def ladder(decomposition: Decomposition, policy: str, *, dtype: str | None = None, **options: Any) -> list[Ranks]:
    """Plans of one policy with rising numbers of parameters, the largest that the limits allow at the end.

    That is the adapter as it is, where they allow it.
    options
        limits, by, runtime and max_lora_rank, as `choose_ranks` takes them.

    Raises RankError for a policy that there is not or that comes with a value, and for limits that are impossible.
    """
    if "=" in policy:
        name = policy.partition("=")[0]
        raise RankError(f"policy '{policy}': its value is what is sought; say --policy {name}")
    if policy not in POLICIES:
        raise RankError(f"unknown policy '{policy}'; known are {', '.join(POLICIES)}")
    largest = _largest(decomposition, dtype=dtype, **options)
    plans: dict[int, Ranks] = {}
    for value in _values(decomposition, policy):
        try:
            plan = choose_ranks(decomposition, f"{policy}={value}", dtype=dtype, **options)
        except RankError:  # less than the smallest ranks allowed
            continue
        plans.setdefault(_parameters(decomposition, plan), plan)
    if largest.policy == _WHOLE:
        plans[_parameters(decomposition, largest)] = largest
    else:  # a plan of the policy can be asked for again by its value
        plans.setdefault(_parameters(decomposition, largest), largest)
    return [plans[size] for size in sorted(plans)]


def _largest(decomposition: Decomposition, **options: Any) -> Ranks:
    """The plan that no other of these limits and this runtime exceeds in any layer."""
    whole = full_rank(decomposition.adapter)
    allowed = choose_ranks(decomposition, f"fixed={decomposition.adapter.rank}", **options)
    return whole if allowed.by_layer == whole.by_layer else replace(allowed, policy=_ALLOWED)


def keep_quality(
    subject: Subject,
    decomposition: Decomposition,
    output: Path,
    trial: Trial,
    criterion: Criterion,
    *,
    policies: Sequence[str] = ("params",),
    dtype: str | None = None,
    runtime: str = "",
    max_lora_rank: int | None = None,
    overwrite: bool = False,
    on_step: Callable[[KeepStep], None] | None = None,
    **options: Any,
) -> Kept:
    """Write the smallest adapter that passes, after reading it back and measuring it once more.

    policies
        by name, without a value; where there are several, the smallest result of all is taken.
    options
        limits and by, as `choose_ranks` takes them.

    Raises RankError, DataError, ModelError or OutputError; nothing is written then.
    """
    metrics_for(trial.kind, [criterion.metric])
    if criterion.confident and trial.count < LEAST:
        raise DataError(
            f"{trial.count} example{'s are' if trial.count > 1 else ' is'} too few to be confident of anything: chance "
            f"alone would pass; give at least {LEAST}, or better a few hundred, or leave out --confident"
        )
    written = partial(squeeze, decomposition, dtype=dtype, runtime=runtime, max_lora_rank=max_lora_rank)
    chosen = partial(ladder, decomposition, dtype=dtype, runtime=runtime, max_lora_rank=max_lora_rank, **options)
    (original,) = run(subject, [loaded(subject)], trial)
    search = _Search(subject, decomposition, trial, criterion, original, dtype, on_step, [])
    found = min((search.rising(chosen(policy)) for policy in policies), key=lambda plans: search.parameters(plans[0]))
    plan = search.confirmed(found, written)
    compression = written(plan, output, overwrite=overwrite)
    first = _mean_of(original, criterion.metric)
    notes = (*compression.notes, *_notes(search.steps[-1], plan, trial.count))
    return Kept(
        metric=criterion.metric,
        keep=criterion.keep,
        confident=criterion.confident,
        original=first,
        limit=criterion.limit(first),
        examples=trial.count,
        steps=tuple(search.steps),
        compression=replace(compression, notes=notes),
    )


@dataclass(frozen=True)
class _Search:
    """What every measurement needs, and those that were made."""

    subject: Subject
    decomposition: Decomposition
    trial: Trial
    criterion: Criterion
    original: Scores
    dtype: str | None
    on_step: Callable[[KeepStep], None] | None
    steps: list[KeepStep]

    def rising(self, plans: Sequence[Ranks]) -> Sequence[Ranks]:
        """From the smallest that bisection finds to pass, up to the largest, which is taken to pass."""
        return plans[bisected(len(plans), lambda place: self._passes(plans[place])) :]

    def confirmed(self, plans: Sequence[Ranks], written: Callable[..., Compression]) -> Ranks:
        """The first of these plans that passes when it has been written and read back.

        Raises ModelError if not even the adapter at its own rank does, RankError if that is not allowed.
        """
        for plan in plans:
            with tempfile.TemporaryDirectory(prefix="lora-squeeze-keep-") as folder:
                written(plan, Path(folder, "adapter"))
                again = contestant_of(self.subject, open_adapter(Path(folder, "adapter")), label="as written")
                if self._measure(again, plan, ", as written").passes:
                    return plan
        if plans[-1].by_layer != full_rank(self.decomposition.adapter).by_layer:
            last, limit = self.steps[-1], self.criterion.limit(_mean_of(self.original, self.criterion.metric))
            sure = f", in {SURE:.0%} of the draws" if self.criterion.confident else ""
            raise RankError(
                f"{self.criterion.metric} is {last.value:.4g} with the largest ranks that the limits allow "
                f"({last.parameters:,} parameters, largest rank {plans[-1].largest}), and has to be "
                f"{'at most' if self.criterion.metric == 'loss' else 'at least'} {limit:.4g}{sure}: allow larger "
                "ranks, or keep less"
            )
        raise ModelError(
            "not even the adapter at its own rank passes once it is written; was it meant to have another dtype?"
        )

    def parameters(self, plan: Ranks) -> int:
        return _parameters(self.decomposition, plan)

    def _passes(self, plan: Ranks) -> bool:
        (contestant,) = squeezed(self.subject, self.decomposition, [plan], dtype=self.dtype)
        return self._measure(contestant, plan).passes

    def _measure(self, contestant: Contestant, plan: Ranks, how: str = "") -> KeepStep:
        with_original = [loaded(self.subject)] if self.criterion.metric == "agreement" else []
        scores = run(self.subject, [*with_original, contestant], self.trial)[-1]
        value, passes, confidence = judge(self.criterion, scores, self.original)
        step = KeepStep(f"{plan.policy}{how}", self.parameters(plan), value, passes, confidence)
        self.steps.append(step)
        if self.on_step is not None:
            self.on_step(step)
        return step


def _mean_of(scores: Scores, metric: str) -> float:
    top, bottom = scores[metric]
    return float(top.sum() / bottom.sum())


def _notes(confirmed: KeepStep, plan: Ranks, examples: int) -> Iterator[str]:
    if plan.policy == _WHOLE:
        yield "nothing smaller passes: this is the adapter at its own rank"
    elif examples < LEAST:
        yield f"that it passes may be noise: {examples} example{'s are' if examples > 1 else ' is'} too few to tell"
    elif confirmed.confidence < SURE:
        yield (
            f"that it passes may be noise: it would on {confirmed.confidence:.0%} of samples like these examples; "
            "--confident asks for 95%, and more examples tell more"
        )


def _values(decomposition: Decomposition, policy: str) -> Iterator[float | int]:
    if policy == "fixed":
        yield from range(1, decomposition.adapter.rank + 1)
        return
    whole = weights_size(decomposition.adapter)
    low, high = {"params": (1e-4, 1.0), "size": (whole * 1e-4, whole)}.get(policy) or ENDS[policy]
    for place in range(_PLANS):
        value = math.exp(math.log(low) + place / (_PLANS - 1) * (math.log(high) - math.log(low)))
        yield math.floor(value) if policy == "size" else float(f"{value:.4g}")


def _parameters(decomposition: Decomposition, plan: Ranks) -> int:
    return sum(spectrum.component_size * plan.by_layer[spectrum.name] for spectrum in decomposition.spectra)
