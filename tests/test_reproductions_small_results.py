"""reproductions/small/results: the page follows from them, and its verdicts change with them."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from reproductions.small import page  # noqa: E402
from reproductions.small.adapters import Places  # noqa: E402
from reproductions.small.claims import claims  # noqa: E402
from reproductions.small.experiments import SIZES, measurement, sized  # noqa: E402
from reproductions.small.measuring import read_measurements  # noqa: E402

PAGE = ROOT / "reproductions" / "small" / "README.md"


def test_the_page_follows_from_the_results_beside_it() -> None:
    kept = Places("")
    text = PAGE.read_text(encoding="utf-8")
    assert page.written(text, kept.runs(), read_measurements(kept.measurements)) == text


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ((0.002, 0.003, 0.002), "confirmed"),
        ((0.0103, 0.0065, 0.0065), "within noise"),
        ((0.03, 0.031, 0.03), "not confirmed"),
    ],
)
def test_less_than_a_point_is_what_the_interval_says(lost: tuple[float, ...], said: str) -> None:
    kept = Places("")
    results, done = kept.runs(), read_measurements(kept.measurements)
    for seed, change in enumerate(lost):
        whole = done[measurement(results, seed, "")]["accuracy"]
        for size in SIZES[1:]:
            done[measurement(results, seed, sized("para-rank", size))]["accuracy"] = whole - change
    assert next(one for one in claims(results, done) if "less than 1 %" in one[0])[2] == said
