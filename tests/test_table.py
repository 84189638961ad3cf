"""Records as tables: nothing is computed here, so little can go wrong."""

from rich.console import Console

from lora_squeeze import Compression, Spectrum, analyze
from lora_squeeze.records import SqueezedLayer
from lora_squeeze.report.table import analysis_table, compression_table, layers_table

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


def test_a_compression_shows_what_it_cost():
    record = Compression(
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
    shown = text(compression_table(record, layers=True))
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
