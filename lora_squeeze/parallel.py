"""Work on many layers at once: a few threads, each with one BLAS thread.

Thin matrices gain little from threads inside one product; a pool of workers over layers keeps
every core busy. Torch releases the interpreter lock in its kernels, so threads are enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

__all__ = ["ordered_map", "runs"]

# Consecutive items that a worker takes at a time, where that pays.
_RUN = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield function(item) in the order of the items, with as many workers as torch has threads.

    At most two results per worker are waiting at any time, so memory does not grow with the
    number of items. The first exception is raised where its result would have come.
    """
    workers = torch.get_num_threads()
    pending: deque[Future[Result]] = deque()
    remaining = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="lora-squeeze", initializer=_one_blas_thread) as pool:
        try:
            pending.extend(pool.submit(function, item) for item in islice(remaining, 2 * workers))
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()
            # Each worker's setting also becomes the default of threads started later.
            torch.set_num_threads(workers)


def runs(items: Sequence[Item], *, most: int = _RUN) -> Iterator[Sequence[Item]]:
    """Consecutive items that one worker should take at a time: fewer towards the end, so that all are done together."""
    start, workers = 0, torch.get_num_threads()
    while start < len(items):
        length = max(1, min(most, (len(items) - start) // (2 * workers)))
        yield items[start : start + length]
        start += length


def _one_blas_thread() -> None:
    torch.set_num_threads(1)
