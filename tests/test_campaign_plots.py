"""A campaign as figures: what is drawn is what the tables say."""

import xml.etree.ElementTree as ET
from functools import partial

import pytest

from lora_squeeze.campaign.results import Mean
from lora_squeeze.report.campaign_plots import plot_curves, plot_gains
from lora_squeeze.report.plots import draw_with

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def text_of(file):
    return " ".join("".join(ET.parse(file).getroot().itertext()).split())


def test_curves_name_every_condition(tmp_path):
    curves = {
        "sft~lora_rank=32": [(10, Mean(0.5, 0.02, 2)), (20, Mean(0.3, 0.01, 2))],
        r"$\frac{1}$<b>": [(10, Mean(0.6, 0.0, 1))],
    }
    draw_with(partial(plot_curves, curves=curves, metric="loss"), tmp_path / "curves.svg")
    said = text_of(tmp_path / "curves.svg")
    assert all(part in said for part in ("sft~lora_rank=32", r"$\frac{1}$<b>", "loss", "step"))


def test_gains_stand_where_source_and_target_meet(tmp_path):
    gains = {(32, 4): Mean(0.0207, 0.0088, 2), (32, 8): Mean(-0.011, 0.0, 1), (8, 4): Mean(0.0, 0.0, 1)}

    class Figure:
        """Lends the figure out once it has been drawn."""

        drawn = None

        def plot(self, figure):
            plot_gains(figure, gains, "eval_accuracy")
            self.drawn = figure

    lent = Figure()
    draw_with(lent.plot, tmp_path / "gains.svg")
    axes = lent.drawn.axes[0]
    places = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    assert places == {(0, 1): "+0.0207\n± 0.0088", (1, 1): "-0.011", (0, 0): "+0"}
    assert [text.get_text() for text in axes.get_xticklabels()] == ["4", "8"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["8", "32"]
    image = axes.images[0]
    assert image.norm(0.0) == pytest.approx(0.5)  # white is no gain
    assert "target rank" in text_of(tmp_path / "gains.svg")
