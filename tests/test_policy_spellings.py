"""Policies as they are spelled, POLICY=VALUE: each is its function, and what cannot be read is named."""

import numpy as np
import pytest
from test_policies_by_layer_and_pool import random_spectra, spectrum

from lora_squeeze.errors import RankError
from lora_squeeze.policies import (
    POLICIES,
    cumulative,
    effective_rank,
    energy,
    fixed,
    knee,
    optimal_threshold,
    para_energy,
    para_rank,
    params,
    parse_policy,
    sigma_ratio,
    size,
    stable_rank,
    variance,
)

SPELLINGS = {
    "fixed=3": (fixed, 3),
    "variance=0.9": (variance, 0.9),
    "energy=0.9": (energy, 0.9),
    "para-rank=0.25": (para_rank, 0.25),
    "para-energy=.9": (para_energy, 0.9),
    "params=0.25": (params, 0.25),
    "params=2000": (params, 2000),
    "sigma-ratio=10": (sigma_ratio, 10),
    "cumulative=0.8": (cumulative, 0.8),
    "stable-rank=2": (stable_rank, 2),
    "effective-rank=0.5": (effective_rank, 0.5),
    "optimal-threshold=0.1": (optimal_threshold, 0.1),
    "knee=1.5": (knee, 1.5),
    " energy = 0.9 ": (energy, 0.9),
}
WITHOUT_VALUE = ["variance", "stable-rank", "effective-rank", "optimal-threshold", "knee"]


@pytest.mark.parametrize(("spelling", "call"), SPELLINGS.items(), ids=SPELLINGS)
def test_a_spelling_is_the_function_of_that_name(spelling, call):
    function, value = call
    spectra = random_spectra(1)
    policy = parse_policy(spelling)
    assert policy.choose(spectra).by_layer == function(spectra, value).by_layer
    assert policy.name == function.__name__.replace("_", "-")
    assert policy.spelling == spelling


@pytest.mark.parametrize("name", WITHOUT_VALUE)
def test_some_policies_need_no_value(name):
    spectra = random_spectra(1)
    assert parse_policy(name).choose(spectra) == POLICIES[name](spectra)


def test_every_policy_is_spelled_in_these_tests():
    assert {parse_policy(spelling).name for spelling in SPELLINGS} == set(POLICIES) - {"size"}
    assert POLICIES["size"] is size


@pytest.mark.parametrize("name", sorted(set(POLICIES) - set(WITHOUT_VALUE)))
@pytest.mark.parametrize("separator", ["", "="])
def test_a_missing_value_is_named(name, separator):
    with pytest.raises(RankError, match=name):
        parse_policy(name + separator)


@pytest.mark.parametrize(
    "spelling", ["", "=", "=0.9", "Energy=0.9", "para_rank=0.5", "rank=4", "energy:0.9", "energy0.9"]
)
def test_an_unknown_name_is_answered_with_those_that_exist(spelling):
    with pytest.raises(RankError) as caught:
        parse_policy(spelling)
    assert all(name in str(caught.value) for name in POLICIES)


@pytest.mark.parametrize(
    "spelling",
    ["energy=", "energy=much", "energy=0,9", "energy=90%", "energy=0.9=1", "fixed=4.5", "fixed=four", "knee="],
)
def test_a_value_that_cannot_be_read_is_named(spelling):
    with pytest.raises(RankError, match=spelling.partition("=")[0]):
        parse_policy(spelling)


@pytest.mark.parametrize(
    "spelling",
    ["energy=nan", "energy=1.1", "energy=-1", "params=inf", "params=0", "fixed=0", "sigma-ratio=0.5", "knee=0"],
)
def test_a_value_that_makes_no_sense_is_refused_when_it_is_used(spelling):
    with pytest.raises(RankError, match=r"is not possible"):
        parse_policy(spelling).choose(random_spectra(0))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_says_what_it_does(name):
    documentation = POLICIES[name].__doc__
    assert documentation
    first_line = documentation.splitlines()[0]
    assert len(first_line) > 30


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"size"}))
def test_a_plan_says_which_policy_made_it_and_can_be_spelled_again(name):
    spectra = random_spectra(2)
    value = {"fixed": 4, "sigma-ratio": 3.0}.get(name, 0.5)
    plan = POLICIES[name](spectra, value)
    assert plan.policy == f"{name}={value:g}"
    assert parse_policy(plan.policy).choose(spectra) == plan


@pytest.mark.parametrize("budget", [1234, 1_234_567, 123_456_789])
def test_a_plan_tells_a_number_of_parameters_to_the_last_digit(budget):
    spectra = [spectrum("a", 0.9 ** np.arange(64.0), out=600)]
    assert params(spectra, budget).policy == f"params={budget}"
