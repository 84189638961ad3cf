"""Which runtimes would load what a plan of ranks makes, before anything is computed for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lora_squeeze.adapter import Adapter
from lora_squeeze.compression import compress_for
from lora_squeeze.formats import as_written
from lora_squeeze.records import Ranks, Verdict
from lora_squeeze.serving import RUNTIMES, check, rank_cap

__all__ = ["judge", "remembering_judge"]


def judge(
    adapter: Adapter, ranks: Ranks, *, dtype: str | None = None, runtime: str = "", max_lora_rank: int | None = None
) -> tuple[Verdict, ...]:
    """The verdict of every runtime on this plan, in the order of RUNTIMES.

    runtime, max_lora_rank
        what the plan is written for anyway (`--for`, `--max-lora-rank`).

    Raises RankError if the plan does not fit the adapter.
    """
    plain = _written(adapter, ranks, dtype, runtime)
    verdicts: list[Verdict] = []
    for one in RUNTIMES:
        fitted = partial(_written, adapter, ranks, dtype, one)
        verdicts.append(_verdict(plain, one, fitted, max_lora_rank=max_lora_rank if one == runtime else None))
    return tuple(verdicts)


def remembering_judge(
    adapter: Adapter, *, dtype: str | None = None, runtime: str = "", max_lora_rank: int | None = None
) -> Callable[[Ranks], tuple[Verdict, ...]]:
    """`judge` for many plans of one adapter.

    Once squeezed, all layers have one scale, so a verdict depends on the largest rank, on whether
    ranks differ and on which layers are left out; it is computed once for each of these.
    """
    known: dict[tuple[int, bool, frozenset[str]], tuple[Verdict, ...]] = {}

    def remembered(ranks: Ranks) -> tuple[Verdict, ...]:
        left_out = frozenset(name for name, rank in ranks.by_layer.items() if rank == 0)
        differ = len({rank for rank in ranks.by_layer.values() if rank > 0}) > 1
        key = (ranks.largest, differ, left_out)
        if key not in known:
            known[key] = judge(adapter, ranks, dtype=dtype, runtime=runtime, max_lora_rank=max_lora_rank)
        return known[key]

    return remembered


def _verdict(plain: Adapter, runtime: str, fit: Callable[[], Adapter], *, max_lora_rank: int | None) -> Verdict:
    if not check(plain, runtime, max_lora_rank=max_lora_rank):
        return Verdict(runtime, "as it is")
    needs: list[str] = []
    larger = _cap_for(runtime, plain.rank)
    if max_lora_rank is None and larger != rank_cap(runtime, None):
        max_lora_rank = larger
        needs.append(f"a server started with --max-lora-rank {larger}")
    fitted, padded_to = plain, 0
    if check(plain, runtime, max_lora_rank=max_lora_rank):
        fitted = fit()
        needs.insert(0, f"--for {runtime}")
        padded_to = fitted.rank if _ranks(fitted) != _ranks(plain) else 0
    if problems := check(fitted, runtime, max_lora_rank=max_lora_rank):
        return Verdict(runtime, "no", reasons=tuple(problem.what for problem in problems))
    return Verdict(runtime, "fitted", needs=tuple(needs), padded_to=padded_to)


def _written(adapter: Adapter, ranks: Ranks, dtype: str | None, runtime: str) -> Adapter:
    return as_written(compress_for(adapter, ranks, runtime=runtime, dtype=dtype))


def _ranks(adapter: Adapter) -> list[int]:
    return [spec.rank for spec in adapter.layers.values()]


def _cap_for(runtime: str, rank: int) -> int | None:
    """The smallest max_lora_rank that lets this rank in; None if there is no cap or none is enough."""
    rules = RUNTIMES[runtime]
    if rules.default_max_rank is None or rank <= rules.default_max_rank:
        return rules.default_max_rank
    return next((one for one in rules.max_ranks if one >= rank), rules.default_max_rank)
