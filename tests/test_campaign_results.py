"""Numbers of a campaign: means with their errors, curves over seeds, gains with the right sign."""

import random
from dataclasses import replace

import pytest
from rich.console import Console

from lora_squeeze.campaign.manifest import Manifest, RunEntry
from lora_squeeze.campaign.results import Mean, curve, main_metric, mean_of, metrics_of, squeezed_against_direct
from lora_squeeze.report.campaign import gains_table


def entry(condition: str, seed: int, rank: int, **metrics: float) -> RunEntry:
    name = f"{condition}_s{seed}"
    found = RunEntry(name, condition, seed, f"runs/{name}", f"configs/{name}.toml", f"logs/{name}.log")
    return replace(found, status="finished", rank=rank, metrics=metrics)


def manifest(*runs: RunEntry) -> Manifest:
    return Manifest("now", "c.toml", {}, {}, "inline", [], [], 1, len(runs), list(runs))


def test_mean_and_standard_error():
    assert mean_of([1, 2, 3, 6]) == Mean(3, pytest.approx((14 / 3 / 4) ** 0.5), 4)
    assert mean_of([5]) == Mean(5, 0, 1)


def test_curves_are_means_of_stretches_over_seeds():
    logged = [
        [{"step": 1, "loss": 4}, {"step": 2, "loss": 2}, {"step": 4, "loss": 1}, {"step": 4, "eval_loss": 9}],
        [{"step": 1, "loss": 2}, {"step": 2, "loss": 2}, {"step": 4, "loss": 3}],
    ]
    assert curve(logged, "loss", points=2) == ((2, Mean(2.5, 0.5, 2)), (4, Mean(2, 1, 2)))
    assert curve(logged, "reward", points=2) == ()


def test_the_most_telling_metric_comes_first():
    found = manifest(entry("a", 1, 8, train_loss=1, eval_loss=2), entry("b", 1, 8, eval_accuracy=0.5))
    assert metrics_of(found) == ("eval_accuracy", "eval_loss", "train_loss")
    assert main_metric(found) == "eval_accuracy"
    assert main_metric(manifest()) == ""


def test_gains_are_positive_where_squeezing_is_better_and_compare_like_with_like():
    found = manifest(
        entry("sft~lora_rank=8", 1, 8, eval_loss=1.0, eval_accuracy=0.9),
        entry("sft~lora_rank=8", 2, 8, eval_loss=1.0, eval_accuracy=0.9),
        entry("sft~lora_rank=2", 1, 2, eval_loss=2.0, eval_accuracy=0.5),
        entry("sft~lora_rank=2", 2, 2, eval_loss=3.0, eval_accuracy=0.7),
        entry("sft~lr=0.1,lora_rank=2", 1, 2, eval_loss=100.0, eval_accuracy=0.0),
    )
    squeezed = {
        "sft~lora_rank=8_s1": {"2": {"eval_loss": 1.5, "eval_accuracy": 0.6}, "4": {"eval_loss": 1}},
        "sft~lora_rank=8_s2": {"2": {"eval_loss": 1.5, "eval_accuracy": 0.6}},
    }
    loss = squeezed_against_direct(found, squeezed, "eval_loss")
    assert loss == {(8, 2): Mean(1.0, pytest.approx(0.5), 2)}
    accuracy = squeezed_against_direct(found, squeezed, "eval_accuracy")[8, 2]
    assert accuracy.mean == pytest.approx(0)
    assert squeezed_against_direct(found, {}, "eval_loss") == {}


def colours(*gains: Mean) -> list[str]:
    """Of the cells of a row."""
    console = Console(width=20 * len(gains) + 20, force_terminal=True, color_system="standard")
    table = gains_table({(64, target): gain for target, gain in enumerate(gains, start=1)}, "eval_accuracy")
    with console.capture() as shown:
        console.print(table)
    styles = {"\x1b[32m": "green", "\x1b[31m": "red", "\x1b[2m": "dim"}
    cells = shown.get().splitlines()[-1].split("64", 1)[1].split("\x1b[0m")
    return [colour for cell in cells for code, colour in styles.items() if code in cell]


def test_gains_have_a_colour_only_where_noise_is_no_explanation():
    found = [Mean(0.02, 0.004, 3), Mean(-0.02, 0.004, 3), Mean(0.02, 0.005, 3), Mean(-0.02, 0.005, 3), Mean(0.9, 0, 1)]
    assert colours(*found) == ["green", "red", "dim", "dim", "dim"]
    assert colours(Mean(0.02, 0.005, 5), Mean(0.02, 0.005, 2)) == ["green", "dim"]


def test_gains_of_nothing_are_coloured_about_one_time_in_twenty():
    generator = random.Random(0)
    found = colours(*(mean_of(generator.gauss(0, 0.01) for _ in range(3)) for _ in range(400)))
    assert len(found) == 400
    assert sum(one != "dim" for one in found) / 400 < 0.08
