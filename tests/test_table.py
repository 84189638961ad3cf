"""Records as tables: nothing is computed here, so little can go wrong."""

from dataclasses import replace

import pytest
from rich.console import Console

from lora_squeeze import Compression, Ranks, Spectrum, analyze
from lora_squeeze.campaign.results import Mean
from lora_squeeze.measurements import Curve, CurvePoint, Estimate, Evaluated, Evaluation, KeepStep, Kept
from lora_squeeze.records import Outcome, SqueezedLayer, Verification
from lora_squeeze.report.campaign import curves_table, gains_table, results_table
from lora_squeeze.report.curve_plot import plot_curve
from lora_squeeze.report.quality import curve_table, evaluation_table, kept_table
from lora_squeeze.report.table import (
    analysis_table,
    comparison_table,
    compression_table,
    layers_table,
    plan_table,
    verification_table,
)

FLAT = Spectrum("model.[0].flat", 10, 6, 4, (1.0, 1.0, 1.0, 1.0))
ZERO = Spectrum("zero", 10, 6, 4, (0.0, 0.0, 0.0, 0.0))


def text(renderable) -> str:
    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_the_recommended_row_and_no_other_is_marked():
    shown = text(analysis_table(analyze([FLAT], source="here", min_variance_retention=0.5)))
    assert [line.split()[0] for line in shown.splitlines() if "<--" in line] == ["2"]
    assert "Mean Var%" in shown


def test_a_recommendation_outside_the_candidates_still_has_its_last_line():
    shown = text(analysis_table(analyze([FLAT], target_ranks=[1, 2])))
    assert "<--" not in shown
    assert "Recommended rank: 4 (>= 95% variance retained)" in shown


def test_every_layer_has_a_line_with_its_name_as_it_is():
    lines = text(layers_table(analyze([FLAT, ZERO]))).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["model.[0].flat", "4", "2", "25.00%", "50.00%", "100.00%"],
        ["zero", "4", "0", "zero", "zero", "zero"],
    ]


COMPRESSION = Compression(
    source="in",
    output="out/[here]",
    policy="fixed=2",
    layers=(SqueezedLayer(FLAT, 2, 0.5**0.5), SqueezedLayer(ZERO, 2, 0.0)),
    bytes_before=4000,
    bytes_after=1000,
    parameters_before=128,
    parameters_after=64,
    notes=("a [note]",),
)


def test_a_compression_shows_what_it_cost():
    shown = text(compression_table(COMPRESSION, layers=True))
    for part in (
        "out/[here]",
        "fixed=2",
        "128 → 64 (50.0%)",
        "4.0 kB → 1.0 kB (25.0%)",
        "50.00%",
        "7.07e-01",
        "a [note]",
    ):
        assert part in shown
    assert "→ 2" in next(line for line in shown.splitlines() if line.startswith("model.[0].flat"))


# From a hand-edited ranks.json, a header, a manifest, somebody's task: as markup, [/] alone would be an error.
NAMED = "my [bold]own[/bold] [/]"
MEAN = Mean(0.5, 0.1, 2)
ESTIMATE = Estimate(0.5, 0.4, 0.6)
ORIGINAL = Evaluated("a", 8, 100, {NAMED: ESTIMATE})
OUTCOME = Outcome(NAMED, 0.5, 64, 128, 0.9, 0.8, 2, 0, 1000)
SQUEEZED = replace(COMPRESSION, policy=NAMED)


def curve_of(label):
    return Curve("base", "data", 9, ORIGINAL, (CurvePoint("x", label, OUTCOME, ORIGINAL.metrics),))


@pytest.mark.parametrize(
    "shown",
    [
        lambda: plan_table(Ranks(NAMED, {"a": 2}), OUTCOME),
        lambda: comparison_table([OUTCOME], source="here", fractions=[0.5], policies=[]),
        lambda: compression_table(SQUEEZED),
        lambda: verification_table(Verification("out", "in", (), SQUEEZED)),
        lambda: kept_table(Kept("loss", 0.1, False, 0.5, 0.6, 9, (KeepStep(NAMED, 64, 0.5, True, 1.0),), COMPRESSION)),
        lambda: kept_table(Kept(NAMED, 0.1, False, 0.5, 0.6, 9, (KeepStep("x", 64, 0.5, True, 1.0),), COMPRESSION)),
        lambda: curve_table(curve_of(NAMED)),
        lambda: results_table([("x", {NAMED: MEAN})], [NAMED]),
        lambda: curves_table({"x": [(1, MEAN)]}, NAMED),
        lambda: gains_table({(8, 4): MEAN}, NAMED),
    ],
)
def test_texts_from_files_are_shown_as_they_are(shown):
    assert NAMED in text(shown()).replace("My [", "my [")


def test_names_of_metrics_too():
    shown = text(evaluation_table(Evaluation("base", "data", 9, 0, (ORIGINAL,))))
    assert NAMED.capitalize() in shown


def test_a_dollar_is_no_mathematics_in_the_figure_of_a_curve(tmp_path):
    pytest.importorskip("matplotlib")
    plot_curve(curve_of(r"$\nonsense{$"), tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").stat().st_size > 1000
