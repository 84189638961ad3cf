"""Where the time of one `compress_adapter` goes: `python -m benchmarks.breakdown ADAPTER OUTPUT`.

Counts the processor time of each part on one core, by wrapping the library's own functions; what
is nested in a part of another name is taken off it. Prints one JSON line: part → seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks.contender import lora_squeeze, pin, warm_up

READ, MOMENTS, CORE = "read the factors", "two second moments in float64", "r×r decomposition"
PRODUCTS, HASH = "two products, rounded, and the rounding error", "SHA-256 of the source"
WRITE, CHECK = "write, with checksums", "read back and compare"
REST, WAIT = "everything else", "waiting for the disk"

# Where each part is looked up when it is called → part.
PLACES = {
    "lora_squeeze.formats.tensors:SafetensorsFile.read": READ,
    "lora_squeeze.spectrum:second_moment": MOMENTS,
    "lora_squeeze.compression:bases": CORE,
    "lora_squeeze.compression:truncate_together": PRODUCTS,
    "lora_squeeze.formats.hashing:RunningHash.hand_in": HASH,
    "lora_squeeze.formats.hashing:RunningHash.result": HASH,
    "lora_squeeze.formats.writing:_write_block": WRITE,
    "lora_squeeze.formats.tensors:_crc32": CHECK,
}


class Clock:
    """Processor time by part, over all threads; a part pauses while another one runs inside it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._local = threading.local()
        self._lock = threading.Lock()

    def wrap(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The same function, its time booked under `part`."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            running: list[str] = self._local.__dict__.setdefault("running", [])
            self._book(running)
            running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._book(running)
                running.pop()

        return timed

    def _book(self, running: list[str]) -> None:
        now = time.thread_time()
        if running:
            with self._lock:
                self.seconds[running[-1]] += now - self._local.since
        self._local.since = now


def install(clock: Clock) -> None:
    """Put the clock around every function of PLACES."""
    for place, part in PLACES.items():
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, name = path.split(".")
        for step in outer:
            owner = getattr(owner, step)
        setattr(owner, name, clock.wrap(getattr(owner, name), part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    pin(1)
    warm_up()
    clock = Clock()
    install(clock)
    wall, busy = time.perf_counter(), time.process_time()
    lora_squeeze(arguments.adapter, arguments.output)
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    parts = {part: clock.seconds[part] for part in dict.fromkeys(PLACES.values())}
    parts[REST] = busy - sum(parts.values())
    parts[WAIT] = wall - busy
    print(json.dumps(parts))


if __name__ == "__main__":
    main()
