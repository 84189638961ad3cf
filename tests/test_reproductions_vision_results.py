"""reproductions/vision/results: the page follows from them, and its verdicts change with them."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from reproductions.vision import page  # noqa: E402
from reproductions.vision.claims import claims  # noqa: E402
from reproductions.vision.measuring import Measurement, read_measurements  # noqa: E402
from reproductions.vision.training import SOURCE, Places  # noqa: E402

PAGE = ROOT / "reproductions" / "vision" / "README.md"


def test_the_page_follows_from_the_results_beside_it() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page.written(text, read_measurements(Places("").measurements)) == text


def test_every_score_of_the_test_stands_beside_that_with_a_grey_image() -> None:
    done = read_measurements(Places("").measurements)
    assert done
    assert all(0 <= result["ablated"] <= 1 for result in done.values())
    tested = [result for one, result in done.items() if one.split == "test"]
    assert len({len(result["predicted"]) for result in tested}) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [((-0.3, -0.31, -0.3), "confirmed"), ((-0.3, 0.1, 0.1), "within noise"), ((0.1, 0.11, 0.1), "not confirmed")],
)
def test_a_collapse_is_what_the_interval_says(changes: tuple[float, ...], said: str) -> None:
    done = read_measurements(Places("").measurements)
    for one in [one for one in done if one.to == 1]:
        whole: Measurement = replace(one, to=0)
        assert one.rank == SOURCE
        done[one]["accuracy"] = done[whole]["accuracy"] + changes[one.seed]
    assert next(found for claim, _, found in claims(done) if claim.startswith("An extreme gap")) == said
