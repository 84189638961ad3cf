"""Schedules: the paper's splits, any ranks, any text, and what cannot be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_squeeze.annealing.schedule import (
    SCHEDULES,
    Schedule,
    Stage,
    cont,
    custom,
    equal,
    geometric_ranks,
    inverse,
    linear_ranks,
    minimum,
    parse_schedule,
    post,
    standard,
)
from lora_squeeze.errors import RankError, SettingsError

PAPER = (128, 64, 32, 16, 8, 4, 2, 1)


def test_the_papers_split_of_10700_steps():
    assert standard(PAPER, 10_700).lengths == (5371, 2685, 1343, 671, 336, 168, 84, 42)
    assert minimum(PAPER, 10_700).lengths == (4768, 2484, 1342, 771, 485, 343, 271, 236)


def test_equal_and_inverse():
    assert equal((4, 2, 1), 10).lengths == (4, 3, 3)
    assert inverse((4, 2, 1), 70).lengths == (10, 20, 40)


def test_post_and_cont_are_two_stages():
    assert post((64, 32, 8), 100).stages == (Stage(0, 64), Stage(100, 8))
    assert cont((64, 8), 1000).lengths == (800, 200)
    assert cont((64, 8), 1000, after=700).lengths == (300, 700)


def test_the_rank_after_each_step():
    schedule = custom([(0, 8), (3, 4), (5, 1)], 6)
    assert [schedule.rank_at(step) for step in range(9)] == [8, 8, 8, 4, 4, 1, 1, 1, 1]
    assert [schedule.stage_at(step) for step in (0, 2, 3, 6)] == [0, 0, 1, 2]
    assert post((8, 2), 4).rank_at(3) == 8
    assert post((8, 2), 4).rank_at(4) == 2


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=9, unique=True),
    st.integers(1, 20_000),
    st.sampled_from(["standard", "minimum=3", "equal", "inverse"]),
)
def test_every_step_belongs_to_one_stage(ranks, steps, spelling):
    ranks = sorted(ranks, reverse=True)
    try:
        schedule = parse_schedule(spelling, ranks=ranks, steps=steps)
    except SettingsError:
        assert steps < 3 * len(ranks) or spelling in ("standard", "inverse")
        return
    assert schedule.ranks == tuple(ranks)
    assert sum(schedule.lengths) == steps
    assert min(schedule.lengths) >= (3 if spelling == "minimum=3" else 1)
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_ranks_between_two():
    assert geometric_ranks(128, 1) == PAPER
    assert geometric_ranks(64, 8) == (64, 32, 16, 8)
    assert geometric_ranks(48, 8) == (48, 24, 12, 8)
    assert geometric_ranks(64, 4, factor=4) == (64, 16, 4)
    assert geometric_ranks(8, 8) == (8,)
    assert linear_ranks(64, 8, count=4) == (64, 45, 27, 8)
    assert linear_ranks(4, 1, count=8) == (4, 3, 2, 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_read_by_name(name):
    schedule = parse_schedule(name, source=16, target=2, steps=4000)
    assert (schedule.ranks[0], schedule.ranks[-1], schedule.steps) == (16, 2, 4000)
    again = parse_schedule(schedule.spelling, source=16, target=2, steps=4000)
    assert again == schedule


def test_spellings():
    assert parse_schedule("minimum=50", ranks=(4, 2), steps=160).lengths == (90, 70)
    assert parse_schedule("64@0, 16@50%, 4@900", steps=1000).stages == (Stage(0, 64), Stage(500, 16), Stage(900, 4))
    assert parse_schedule("standard", source=64, target=8, steps=100, spacing="linear").ranks == (64, 45, 27, 8)
    listed = custom([(0, 8), (3, 4)], 6)
    assert parse_schedule(listed.spelling, steps=6) == listed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_schedule("cosine", ranks=(2, 1), steps=9), "known are standard, minimum"),
        (lambda: parse_schedule("equal=3", ranks=(2, 1), steps=9), "unknown schedule 'equal=3'"),
        (lambda: parse_schedule("minimum=few", ranks=(2, 1), steps=9), "not a number of steps"),
        (lambda: parse_schedule("8@0, 4@x", steps=9), "'4@x' is not RANK@STEP"),
        (lambda: parse_schedule("8@0, 4@2.5", steps=9), "'4@2.5' is not RANK@STEP"),
        (lambda: parse_schedule("equal", steps=9), "needs its ranks"),
        (lambda: parse_schedule("equal", source=8, target=2, steps=9, spacing="log"), "known are geometric, linear"),
        (lambda: parse_schedule("equal", ranks=(8, 4), target=2, steps=9), r"ranks \[8, 4\] and the target 2"),
        (lambda: parse_schedule("8@0, 4@3", target=2, steps=9), "lists its ranks itself"),
        (lambda: minimum(PAPER, 100), "need 1600 steps, and there are 100"),
        (lambda: standard(PAPER, 20), "leave none for rank 4"),
        (lambda: cont((8, 2), 100), "cont=200"),
        (lambda: Schedule.from_json("{}"), "not a Schedule record"),
        (lambda: Schedule.from_json('{"record": "Ranks"}'), "it is a Ranks record"),
    ],
)
def test_what_cannot_be_read_says_why(call, message):
    with pytest.raises(SettingsError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: custom([(0, 4), (3, 8)], 9), "rank 8 cannot follow rank 4"),
        (lambda: custom([(1, 4)], 9), "it must start at 0"),
        (lambda: custom([(0, 4), (0, 2)], 9), "not after rank 4"),
        (lambda: custom([(0, 4), (10, 2)], 9), "after the last of 9 steps"),
        (lambda: custom([(0, 0)], 9), "at least 1"),
        (lambda: standard((), 9), "at least 1"),
        (lambda: inverse((4, 0), 9), "at least 1"),
        (lambda: geometric_ranks(4, 8), "from 4 down to 8"),
        (lambda: linear_ranks(8, 4, count=1), "1 ranks from 8"),
        (lambda: parse_schedule("equal", ranks=(8, 4), source=16, steps=9), "training starts at rank 16"),
        (lambda: parse_schedule("16@0, 4@3", source=8, steps=9), "starts at rank 16, but training starts at rank 8"),
    ],
)
def test_impossible_ranks_say_why(call, message):
    with pytest.raises(RankError, match=message):
        call()
