"""Figures as PNG and SVG, and for the terminal."""

import io
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from click.testing import CliRunner

from lora_squeeze import decompose, open_adapter
from lora_squeeze.analysis import analyze
from lora_squeeze.cli import main
from lora_squeeze.errors import MissingExtra
from lora_squeeze.exploration import explore_analysis
from lora_squeeze.records import Spectrum
from lora_squeeze.report.plots import FIGURES, FORMATS, draw
from lora_squeeze.verbs import explore_adapter
from tests.adapters import make_adapter, pair, write_raw

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
HOSTILE = r"layers.0.$\frac{1}$<script>&"


def run(*arguments: object):
    return CliRunner().invoke(main, [str(one) for one in arguments])


def text_of(svg: bytes) -> str:
    return " ".join(ET.fromstring(svg).itertext())


def test_plots_are_written_as_png_and_svg(tmp_path):
    adapter = make_adapter(tmp_path / "a", r=6)
    done = run("report", adapter, "--plots", tmp_path / "plots", "--policy", "energy=0.8")
    assert done.exit_code == 0, done.output
    names = {f"{name}.{form}" for name in FIGURES for form in FORMATS}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == names
    for name in FIGURES:
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "energy=0.8" in text_of((tmp_path / "plots" / "chosen-ranks.svg").read_bytes())
    assert "self_attn.q_proj" in text_of((tmp_path / "plots" / "effective-rank.svg").read_bytes())
    again = run("report", adapter, "--plots", tmp_path / "plots")
    assert again.exit_code == 1
    assert "already exists" in again.output
    assert run("report", adapter, "--plots", tmp_path / "plots", "--overwrite").exit_code == 0


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_input_gives_the_same_figure(tmp_path, form):
    spectra = [Spectrum(f"layers.{i}.q", 32, 32, 8, tuple(0.7 ** (k + i) for k in range(8))) for i in range(4)]
    exploration = explore_analysis(analyze(spectra))
    for name in FIGURES:
        one, other = (tmp_path / f"{name}-{which}.{form}" for which in "ab")
        draw(name, exploration, one)
        draw(name, exploration, other)
        assert one.read_bytes() == other.read_bytes(), name


def test_names_are_neither_mathematics_nor_markup(tmp_path):
    tensors = {**pair(HOSTILE, 8, 4, 8), **{k: torch.zeros_like(v) for k, v in pair("layers.1.z", 8, 4, 8).items()}}
    exploration = explore_adapter(decompose(open_adapter(write_raw(tmp_path / "a", tensors))))
    for name in FIGURES:
        draw(name, exploration, tmp_path / f"{name}.svg")
    assert r"$\frac{1}$<script>&" in text_of((tmp_path / "energy.svg").read_bytes())


@pytest.mark.parametrize("least", [9.0, 2.0, 0.5, 1e-4])
def test_singular_values_of_any_spread_are_labelled_in_plain_numbers(tmp_path, least):
    values = tuple(10 * (least / 10) ** (place / 7) for place in range(8))
    exploration = explore_analysis(analyze([Spectrum("layer", 40, 30, 8, values)]))
    draw("spectra", exploration, tmp_path / "spectra.svg")
    labels = text_of((tmp_path / "spectra.svg").read_bytes())
    assert "mathdefault" not in labels
    ticks = re.findall(
        r"(?<![\w.])\d[\d.]*(?:e[+-]?\d+)?(?![\w.])", labels.partition("component")[2].partition("singular value")[0]
    )
    assert len(ticks) >= 2


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises((MissingExtra, ModuleNotFoundError)) as raised:
        draw("energy", explore_analysis(analyze([Spectrum("a", 4, 4, 2, (1.0, 0.5))])), tmp_path / "x.png")
    assert raised.type is MissingExtra
    assert "pip install 'lora-squeeze[plots]'" in str(raised.value)


def test_without_an_output_figures_are_shown_in_the_terminal(tmp_path):
    adapter = make_adapter(tmp_path / "a", r=8)
    done = run("report", adapter)
    assert done.exit_code == 0, done.output
    spectra = decompose(open_adapter(adapter)).spectra
    first = re.search(r"^self_attn\.q_proj +(\d+) +(\d+)", done.output, re.MULTILINE)
    named = {s.name: s.effective_rank for s in spectra}
    assert [int(first[1]), int(first[2])] == [round(named[f"model.layers.{i}.self_attn.q_proj"]) for i in (0, 1)]
    bars = re.findall(r"^ +(\d+)  (█*▓*░*) *[\d.]+%", done.output, re.MULTILINE)
    assert [int(rank) for rank, _ in bars] == [1, 2, 4, 8]
    assert [len(bar) for _, bar in bars] == sorted(len(bar) for _, bar in bars)
    assert bars[-1][1] == "█" * 40


def test_many_layers_are_folded_in_the_terminal():
    from rich.console import Console

    from lora_squeeze.report.terminal import exploration_figures

    spectra = [Spectrum(f"layers.{i}.q", 32, 32, 2, (1.0, 0.5)) for i in range(40)]
    console = Console(width=80, file=io.StringIO())
    console.print(exploration_figures(explore_analysis(analyze(spectra)), width=80))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("q ") for line in lines) >= 3
    assert any(re.search(r" 38 +39$", line.rstrip()) for line in lines)
