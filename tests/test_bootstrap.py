"""Intervals of means and of differences: as wide as their standard errors say, and noise is called noise."""

import pytest
import torch
from test_hub import server  # noqa: F401

from lora_squeeze.evaluation.bootstrap import estimates


def scores_of(numbers, metric="accuracy", weights=None):
    column = torch.as_tensor(numbers, dtype=torch.float64)
    return {metric: (column, torch.ones_like(column) if weights is None else torch.as_tensor(weights).double())}


def normal(count, *, mean=0.0, seed=0):
    return mean + torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    numbers = normal(400)
    (found,) = estimates([scores_of(numbers)], ["accuracy"])
    error = float(numbers.std() / 20)
    assert found["accuracy"].value == pytest.approx(float(numbers.mean()))
    assert found["accuracy"].high - found["accuracy"].low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found["accuracy"].verdict == ""


def test_pairs_see_differences_that_are_smaller_than_the_spread():
    numbers = normal(300)
    first, second = estimates(
        [scores_of(numbers, "loss"), scores_of(numbers + 0.01 + 0.02 * normal(300, seed=1), "loss")], ["loss"]
    )
    assert second["loss"].verdict == "worse"
    assert second["loss"].difference_low > 0
    assert first["loss"].low < second["loss"].low < first["loss"].high  # which the intervals alone do not show
    assert estimates([scores_of(numbers), scores_of(numbers + 0.01)], ["accuracy"])[1]["accuracy"].verdict == "better"


def test_the_same_and_noise_are_called_so():
    numbers = normal(200)
    same, noise = (
        estimates([scores_of(numbers), scores_of(other)], ["accuracy"])[1]["accuracy"].verdict
        for other in (numbers.clone(), numbers[torch.randperm(200, generator=torch.Generator().manual_seed(3))])
    )
    assert (same, noise) == ("same", "within noise")


def test_a_difference_of_chance_is_called_noise_about_as_often_as_it_claims():
    verdicts = [
        estimates([scores_of(normal(100, seed=2 * k)), scores_of(normal(100, seed=2 * k + 1))], ["accuracy"], draws=300)
        for k in range(200)
    ]
    noise = sum(one[1]["accuracy"].verdict == "within noise" for one in verdicts) / len(verdicts)
    assert 0.89 <= noise <= 0.99


def test_texts_weigh_as_many_tokens_as_they_have():
    (found,) = estimates([scores_of([10.0, 1.0], "loss", [10, 1])], ["loss"])
    assert found["loss"].value == pytest.approx(1.0)
    (found,) = estimates(
        [{"perplexity": (torch.tensor([2.0, 4.0]).double(), torch.tensor([2.0, 2.0]).double())}], ["perplexity"]
    )
    assert found["perplexity"].value == pytest.approx(torch.tensor(1.5).exp().item())


def test_the_same_seed_gives_the_same_interval():
    numbers = normal(50)
    runs = [estimates([scores_of(numbers)], ["accuracy"], seed=seed)[0]["accuracy"] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
