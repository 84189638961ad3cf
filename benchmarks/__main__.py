"""`python -m benchmarks`: run all benchmarks and write what they found to docs/benchmarks.md."""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import accuracy, cuda, peft_conversion, peft_merging, seventy_thousand_modules, speed
from benchmarks.machine import describe

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of every timing (default: %(default)s)")
    names = ("speed", "accuracy", "modules", "peft", "merging", "cuda")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME",
                        help=f"some of {', '.join(names)}; the page is then printed, not written")  # fmt: skip
    parser.add_argument("--output", type=Path, default=PAGE, help="the page to write (default: docs/benchmarks.md)")
    arguments = parser.parse_args()
    sections: dict[str, Callable[[Path], str]] = {
        "speed": partial(speed.section, rounds=arguments.rounds),
        "accuracy": accuracy.section,
        "modules": seventy_thousand_modules.section,
        "peft": peft_conversion.section,
        "merging": peft_merging.section,
        "cuda": partial(cuda.section, rounds=arguments.rounds),
    }
    start = time.perf_counter()
    parts = []
    with tempfile.TemporaryDirectory(prefix="lora-squeeze-benchmarks-") as scratch:
        for name in arguments.only or sections:
            print(f"{name} …", file=sys.stderr, flush=True)
            parts.append(sections[name](Path(scratch)))
    parts.insert(0, _introduction(time.perf_counter() - start))
    page = "\n\n".join(parts) + "\n"
    print(page)
    if not arguments.only:
        arguments.output.write_text(page, encoding="utf-8")
        print(f"written to {arguments.output}", file=sys.stderr)


def _introduction(seconds: float) -> str:
    today = datetime.datetime.now(tz=datetime.timezone.utc).date()
    return (
        "# Benchmarks\n\n"
        "Written by `make bench` (`python -m benchmarks`), not by hand; every ratio compares runs that took turns on "
        "one machine. Ratios carry over to other machines better than seconds do.\n\n"
        f"{today}, in {seconds / 60:.1f} minutes on: {describe()}."
    )


if __name__ == "__main__":
    main()
