"""Intervals of means and of differences: as wide as their standard errors say, and noise is called noise."""

import pytest
import torch

from lora_squeeze.evaluation.bootstrap import estimates, judged
from lora_squeeze.measurements import Estimate


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


def null_of(kind, count, seed):
    """Two adapters that are equally good, on so many examples: metric, and the scores of both."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(count, generator=generator, dtype=torch.float64) for _ in "ab")
    if kind == "right or wrong":
        return "accuracy", scores_of((first > 0).double()), scores_of((second > 0).double())
    if kind == "one or the other":
        return "accuracy", scores_of((first > 0).double()), scores_of((first <= 0).double())
    weights = torch.randint(3, 100, (count,), generator=generator).double() if kind == "texts" else torch.ones(count)
    return "loss", scores_of(weights * first, "loss", weights), scores_of(weights * second, "loss", weights)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7, 10, 25, 50, 99])
@pytest.mark.parametrize("kind", ["losses", "texts", "right or wrong", "one or the other"])
def test_where_there_is_no_difference_few_examples_seldom_claim_one(kind, count):
    claimed = 0
    for seed in range(300):
        metric, first, second = null_of(kind, count, seed)
        found = estimates([first, second], [metric], draws=200, seed=seed)[1][metric]
        claimed += found.verdict in ("better", "worse")
    assert claimed / 300 <= 0.085  # 0.05 and two standard errors, of this rate and of what 200 draws leave open


def test_few_examples_have_wide_intervals_of_differences_and_no_verdict():
    for count, verdict in ((2, "too few examples"), (5, "too few examples"), (6, "better"), (30, "better")):
        found = estimates([scores_of(normal(count)), scores_of(normal(count) + 1 + normal(count, seed=1) / 100)],
                          ["accuracy"])[1]["accuracy"]  # fmt: skip
        assert found.verdict == verdict
        error = float(normal(count, seed=1).std()) / 100 / count**0.5
        student = {2: 12.706, 5: 2.776, 6: 2.571, 30: 2.045}[count]
        assert found.difference_high - found.difference_low >= 2 * student * error * 0.95


def test_one_example_has_no_interval():
    first, second = (one["accuracy"] for one in estimates([scores_of([0.0]), scores_of([1.0])], ["accuracy"]))
    assert first == Estimate(0.0, None, None)
    assert second == Estimate(1.0, None, None, 1.0, None, None, "too few examples")


def test_few_examples_that_are_all_the_same_are_so():
    assert estimates([scores_of([1.0, 2.0])] * 2, ["accuracy"])[1]["accuracy"].verdict == "same"


def test_many_examples_keep_the_middle_of_their_draws():
    numbers = normal(100).exp()  # askew, so its interval is, too
    found = estimates([scores_of(torch.zeros(100)), scores_of(numbers)], ["accuracy"])[1]["accuracy"]
    assert (found.difference_low, found.difference_high) == (found.low, found.high)


def test_without_an_interval_there_is_no_verdict():
    assert judged(Estimate(1.0, None, None, 0.5), higher_is_better=True, examples=50).verdict == ""
    assert judged(Estimate(1.0, 0.9, 1.1), higher_is_better=True, examples=50).verdict == ""
