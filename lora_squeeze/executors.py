"""Many jobs, so many at a time: in this process, in processes of their own, or on a Ray cluster.

A job that crashes takes nothing else with it (but for `inline`, where only exceptions are contained).
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any, Protocol

from lora_squeeze.errors import LoraSqueezeError, reason_of
from lora_squeeze.extras import require
from lora_squeeze.worker import Ending, Job, perform, spawn, verdict

__all__ = ["EXECUTORS", "Pool", "Resources", "execute", "pool_of"]

EXECUTORS = ("inline", "processes", "ray")


@dataclass(frozen=True)
class Resources:
    """Of each job, as Ray counts them; `placement` is SPREAD (over the nodes) or DEFAULT (packed)."""

    cpus: float = 1.0
    gpus: float = 0.0
    placement: str = "SPREAD"
    address: str = ""  # of a running cluster; "": the one of RAY_ADDRESS, or else a local one


class Pool(Protocol):
    """Where jobs run."""

    @property
    def running(self) -> int:
        """How many have been started and not yet been waited for."""
        ...

    def start(self, job: Job) -> None:
        """Begin a job."""
        ...

    def wait(self) -> tuple[Job, Ending]:
        """The next job that ends, and how."""
        ...

    def close(self) -> None:
        """End whatever still runs."""
        ...


def execute(
    take: Callable[[], Job | None],
    pool: Pool,
    *,
    workers: int,
    stagger_seconds: float = 0.0,
    on_start: Callable[[Job], None],
    on_end: Callable[[Job, Ending], None],
) -> None:
    """Run jobs until none is left.

    take
        the next job; None while there is none to start, for now or for good.
    on_end
        may make `take` give more. Both are called in this thread.
    """
    begun = float("-inf")
    try:
        while True:
            while pool.running < workers and (job := take()) is not None:
                time.sleep(max(0.0, begun + stagger_seconds - time.monotonic()))
                begun = time.monotonic()
                on_start(job)
                pool.start(job)
            if not pool.running:
                return
            on_end(*pool.wait())
    finally:
        pool.close()


def pool_of(executor: str, *, workers: int, resources: Resources | None = None) -> Pool:
    """The pool that an executor's name stands for. Raises MissingExtra for ray without Ray."""
    if executor == "inline":
        return _Inline()
    if executor == "processes":
        return _Processes(workers)
    return _Ray(resources or Resources())


class _Inline:
    """Each job at once, in this process."""

    def __init__(self) -> None:
        self._ended: list[tuple[Job, Ending]] = []

    @property
    def running(self) -> int:
        return len(self._ended)

    def start(self, job: Job) -> None:
        Path(job.log).parent.mkdir(parents=True, exist_ok=True)
        with Path(job.log).open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            ending = perform(job)
        self._ended.append((job, ending))

    def wait(self) -> tuple[Job, Ending]:
        return self._ended.pop(0)

    def close(self) -> None:
        self._ended.clear()


class _Processes:
    """A process for each job; with several GPUs, one GPU for each in turn."""

    def __init__(self, workers: int) -> None:
        self._ended: queue.Queue[tuple[Job, int]] = queue.Queue()
        self._processes: dict[str, Popen[bytes]] = {}
        self._slots = dict.fromkeys(range(workers), "")
        self._shared = _shares(workers)

    @property
    def running(self) -> int:
        return len(self._processes)

    def start(self, job: Job) -> None:
        slot = next(slot for slot, name in self._slots.items() if not name)
        self._slots[slot] = job.name
        given = Job(job.name, job.function, job.arguments, job.log, {**self._shared(slot), **job.environment})
        process = self._processes[job.name] = spawn(given)
        threading.Thread(target=lambda: self._ended.put((job, process.wait())), daemon=True).start()

    def wait(self) -> tuple[Job, Ending]:
        job, code = self._ended.get()
        del self._processes[job.name]
        self._slots[next(slot for slot, name in self._slots.items() if name == job.name)] = ""
        return job, verdict(job, code)

    def close(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            with suppress(Exception):
                process.wait(timeout=10)
            process.kill()


def _shares(workers: int) -> Callable[[int], dict[str, str]]:
    """What each slot gets of the processors and GPUs, unless the environment says otherwise."""
    threads = str(max((os.cpu_count() or 1) // max(workers, 1), 1))
    torch = require("torch", "train")
    gpus = torch.cuda.device_count() if workers > 1 else 0
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = listed.split(",") if listed else [str(number) for number in range(gpus)]

    def share(slot: int) -> dict[str, str]:
        given = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads}
        return {**given, "CUDA_VISIBLE_DEVICES": names[slot % len(names)]} if gpus > 1 else given

    return share


class _Ray:
    """A Ray task for each job, which runs it in a process of its own on whichever node it is given."""

    def __init__(self, resources: Resources) -> None:
        self._ray = require("ray", "ray")
        self._own = not self._ray.is_initialized()
        if self._own:
            try:
                self._ray.init(address=resources.address or None, log_to_driver=False, logging_level="ERROR")
            except Exception as error:  # whatever a cluster that is not there raises
                raise LoraSqueezeError(f"Ray cannot be started or reached: {error}") from error
        self._options = {
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            "max_retries": 0,  # retries are counted by whoever hands out the jobs
            "scheduling_strategy": resources.placement,
        }
        self._jobs: dict[Any, Job] = {}

    @property
    def running(self) -> int:
        return len(self._jobs)

    def start(self, job: Job) -> None:
        self._jobs[self._ray.remote(**self._options)(_in_task).remote(job)] = job

    def wait(self) -> tuple[Job, Ending]:
        (ended,), _ = self._ray.wait(list(self._jobs), num_returns=1)
        job = self._jobs.pop(ended)
        try:
            return job, verdict(job, self._ray.get(ended))
        except Exception as error:  # a node or the task's own process was lost
            return job, Ending(1, f"Ray lost it: {reason_of(error)}")

    def close(self) -> None:
        for task in self._jobs:
            with suppress(Exception):
                self._ray.cancel(task, force=True)
        if self._own:
            self._ray.shutdown()


def _in_task(job: Job) -> int:
    return spawn(job).wait()
