"""Attempt hostile files for as long as one likes: python tests/fuzz.py [SECONDS] [TARGET…].

What fails is shrunk, put into tests/corpus/found-…, and tried by `make test` from then on.
"""

import hashlib
import sys
import time
import traceback

from hostile import attempt, keep
from hostile_files import TARGETS
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

ROUND = 100  # examples before the next target has its turn


def one_round(name: str, number: int) -> tuple[int, BaseException | None]:
    """Attempt ROUND cases; how many there were, and what went wrong."""
    count, failing = 0, None

    @seed(number)
    @settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(TARGETS[name])
    def run(case):
        nonlocal count, failing
        count += 1
        try:
            attempt(case)
        except BaseException:
            failing = case
            raise

    try:
        run()
    except BaseException as error:
        if failing is None:
            raise
        digest = hashlib.sha256(repr(sorted(failing.items())).encode()).hexdigest()[:8]
        keep(failing, f"found-{digest}")
        return count, error
    return count, None


def main(seconds: float, names: list[str]) -> int:
    """Take the targets in turn until the time is over; the exit code says whether anything failed."""
    end, number, found = time.monotonic() + seconds, int(time.time()), 0
    counts = dict.fromkeys(names or TARGETS, 0)
    while time.monotonic() < end:
        for name in counts:
            count, error = one_round(name, number)
            counts[name] += count
            if error is not None:
                found += 1
                error.__notes__ = []  # the case, at length
                traceback.print_exception(error)
                print(f"FOUND in {name}, seed {number}: now in tests/corpus")
            number += 1
            if time.monotonic() > end:
                break
    for name, count in counts.items():
        print(f"{count:8,} {name}")
    print(f"{found} found")
    return 1 if found else 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(main(float(arguments[0]) if arguments else 60, arguments[1:]))
