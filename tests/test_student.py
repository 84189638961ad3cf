"""Student's t against its tables, and means of nothing but noise."""

import random
import statistics

import pytest

from lora_squeeze.student import sign_of, standard_errors


# Fisher and Yates, table III.
@pytest.mark.parametrize(
    ("count", "expected"),
    [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (6, 2.571), (11, 2.228), (31, 2.042), (121, 1.980)],
)
def test_as_in_the_tables(count, expected):
    assert standard_errors(count) == pytest.approx(expected, abs=5e-4)


def test_it_falls_steadily_to_that_of_the_normal_distribution():
    counts = [*range(2, 60), 1000, 1001, 10**9]
    found = [standard_errors(count) for count in counts]
    assert found == sorted(found, reverse=True)
    assert standard_errors(1000) == pytest.approx(standard_errors(1001), abs=3e-6)
    assert found[-1] == pytest.approx(1.959964, abs=1e-6)
    assert standard_errors(1) == float("inf")


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_means_of_noise_have_a_sign_one_time_in_twenty(count):
    generator = random.Random(0)
    signs = []
    for _ in range(4000):
        values = [generator.gauss(0, 1) for _ in range(count)]
        signs.append(sign_of(statistics.mean(values), statistics.stdev(values) / count**0.5, count))
    assert 0.04 < sum(map(abs, signs)) / len(signs) < 0.06


def test_one_value_alone_has_none():
    assert sign_of(0.9, 0.0, 1) == 0
    assert (sign_of(0.9, 0.01, 3), sign_of(-0.9, 0.01, 3), sign_of(0.03, 0.01, 3)) == (1, -1, 0)
