"""A small vision-language experiment: measures what is missing, and writes the page and its figure.

    make reproduce-vision                    # or, in pieces: ARGS="--minutes 8"

A frozen DINOv2-small sees the images of easy-VQA, once; MiniLM answers, with a LoRA that is trained at rank 64 and
squeezed, or trained at a low rank. Every measurement is a line of JSON in results/measurements.jsonl beside the page,
and is not made again. One process at a time.
"""

from __future__ import annotations

import sys
import time
from itertools import groupby
from pathlib import Path

from reproductions.small.resumed import parser_of, prepare
from reproductions.vision.data import Data, data_of, package_folder, seen_by_backbone
from reproductions.vision.experiments import planned
from reproductions.vision.figures import draw
from reproductions.vision.measuring import Measurement, check_base, measure, read_measurements
from reproductions.vision.page import written
from reproductions.vision.training import Places

PAGE = Path(__file__).parent / "README.md"


def pending(places: Places) -> list[Measurement]:
    """What is to be made by now."""
    done = read_measurements(places.measurements)
    return [one for one in planned(done) if one not in done]


def work(places: Places, data: Data, minutes: float) -> None:
    """Measure until all is measured, or time is up. Raises ValueError if measurements would be mixed."""
    until = time.monotonic() + 60 * minutes
    while time.monotonic() < until and (left := pending(places)):
        check_base(places, data, read_measurements(places.measurements))
        trained, wanted = next(groupby(left, key=lambda one: one.trained))
        for one in measure(trained, wanted, places, data):
            print(one, file=sys.stderr, flush=True)
            if time.monotonic() >= until:
                return


def main() -> None:
    parser = parser_of(__doc__, own=Places("").own, results=Places("").results)
    options = parser.parse_args()
    prepare()
    places = Places("", options.out, options.results)
    if options.minutes > 0 and pending(places):  # else, neither model nor data are needed
        from packaged import minilm

        places = Places(str(minilm()), options.out, options.results)
        package = package_folder()
        try:
            work(places, data_of(package, seen_by_backbone(package, places.own / "features.pt")), options.minutes)
        except ValueError as error:
            raise SystemExit(str(error)) from None
    done = read_measurements(places.measurements)
    print(f"{len(done)} measurements made, {len(pending(places))} to be made", file=sys.stderr)
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), done), encoding="utf-8")
    draw(done, PAGE.parent)


if __name__ == "__main__":
    main()
