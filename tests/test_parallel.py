"""Many layers at once: in order, a few at a time, and without a trace in torch's settings."""

import threading

import pytest
import torch

from lora_squeeze.parallel import ordered_map, runs


def test_results_come_in_the_order_of_the_items(four_workers):
    first_may_finish = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert first_may_finish.wait(30)
        elif item == 3:
            first_may_finish.set()
        return item * item

    assert list(ordered_map(work, range(50))) == [item * item for item in range(50)]


def test_no_more_than_two_results_a_worker_are_waiting(four_workers):
    started: list[int] = []
    results = ordered_map(lambda item: started.append(item) or item, range(100))
    for taken in range(1, 30):
        next(results)
        assert len(started) <= taken + 2 * 4
    results.close()
    assert len(started) < 100


def test_an_exception_comes_where_its_result_would_have(four_workers):
    def work(item: int) -> int:
        if item == 5:
            raise KeyError(item)
        return item

    results = ordered_map(work, range(100))
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError):
        next(results)


def test_each_worker_has_one_blas_thread_and_the_setting_comes_back(four_workers):
    assert set(ordered_map(lambda _: torch.get_num_threads(), range(8))) == {1}
    assert torch.get_num_threads() == 4


def test_nothing_to_do():
    assert list(ordered_map(str, [])) == []


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 100, 1000])
def test_runs_hold_every_item_in_order_and_grow_shorter_towards_the_end(four_workers, count):
    lengths = [len(run) for run in runs(range(count))]
    assert [item for run in runs(range(count)) for item in run] == list(range(count))
    assert lengths == sorted(lengths, reverse=True)
    if count >= 100:
        assert lengths[0] == 4
    if count >= 8:  # enough for every worker at the end
        assert lengths[-8:] == [1] * 8
