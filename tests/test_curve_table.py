"""The table of `curve`: whatever else is wide, every row says which policy it is about."""

import pytest
from rich.console import Console

from lora_squeeze.comparison import outcome_of
from lora_squeeze.measurements import Curve, CurvePoint, Estimate, Evaluated
from lora_squeeze.policies import Cost, params
from lora_squeeze.records import Spectrum
from lora_squeeze.report.quality import curve_table

METRICS = ("loss", "accuracy", "divergence", "agreement")


@pytest.mark.parametrize("width", [80, 120, 200])
def test_every_row_names_its_policy(width):
    spectra = [Spectrum("layer", 64, 64, 8, tuple(0.5**place for place in range(8)))]
    outcome = outcome_of(spectra, params(spectra, 0.25), cost=Cost({"layer": 128}, lambda _: 1_351_296))
    estimate = Estimate(0.57912345, 0.5, 0.6, 0.001912, -0.000736, 0.00433, "within noise")
    original = Evaluated("a", 8, 2_703_360, {name: Estimate(0.5772, 0.5, 0.6) for name in METRICS})
    points = (CurvePoint("params", "", outcome, dict.fromkeys(METRICS, estimate)),)
    console = Console(width=width, color_system=None)
    with console.capture() as printed:
        console.print(curve_table(Curve("model", "data", 200, original, points)))
    lines = printed.get().splitlines()
    assert any(line.startswith("Policy") for line in lines)
    assert any(line.startswith("original") for line in lines)
    assert any(line.startswith("params=0.25") for line in lines)
