"""The papers' experiments at a small scale: measures what is missing, and writes the page and its figures.

    make reproduce-small                    # or, in pieces: ARGS="--minutes 8"

What `make bench-in-squeeze` trained is squeezed; adapters of other tasks are trained here. Every measurement is a
line of JSON in results/measurements.jsonl beside the page, and is not made again. One process at a time.
"""

from __future__ import annotations

import sys
import time
from itertools import groupby
from pathlib import Path

from benchmarks.in_squeeze_runs import tuning
from reproductions.small.adapters import Places, keep_runs, ready
from reproductions.small.experiments import planned
from reproductions.small.figures import draw
from reproductions.small.measuring import measure, read_measurements
from reproductions.small.page import written
from reproductions.small.resumed import parser_of, prepare

PAGE = Path(__file__).parent / "README.md"


def work(places: Places, minutes: float) -> None:
    """Measure until all that can be is measured, or time is up."""
    until = time.monotonic() + 60 * minutes
    while time.monotonic() < until:
        runs, done = places.runs(), read_measurements(places.measurements)
        pending = [one for one in planned(runs) if one not in done]
        groups = [(trained, list(some)) for trained, some in groupby(pending, key=lambda one: one.trained)]
        trained, wanted = next((group for group in groups if ready(group[0], places, runs)), (None, []))
        if trained is None:
            return
        for one in measure(trained, wanted, places):
            print(one, file=sys.stderr, flush=True)
            if time.monotonic() >= until:
                return


def main() -> None:
    parser = parser_of(__doc__, own=Places("").own, results=Places("").results)
    parser.add_argument("--in-squeeze", type=Path, default=Places("").in_squeeze, help="what bench-in-squeeze made")
    options = parser.parse_args()
    prepare()
    from packaged import minilm

    places = Places(str(minilm()), options.in_squeeze, options.out, options.results)
    try:
        keep_runs(places)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    runs = places.runs()
    if missing := [run.name for run in tuning() if run.key not in runs]:
        raise SystemExit(
            f"{places.kept_runs}: {len(missing)} runs by which the rates are tuned are missing: make bench-in-squeeze"
        )
    work(places, options.minutes)
    runs, done = places.runs(), read_measurements(places.measurements)
    left = sum(one not in done for one in planned(runs))
    print(f"{len(done)} measurements made, {left} to be made", file=sys.stderr)
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), runs, done), encoding="utf-8")
    draw(runs, done, PAGE.parent)


if __name__ == "__main__":
    main()
