"""Rewards of a group → advantages, against the formulas written out."""

import pytest
import torch

from lora_squeeze.errors import SettingsError
from lora_squeeze.training.advantages import ADVANTAGES, advantage_of, dr_grpo, grpo, maxrl, transform_of

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])


def test_grpo_divides_by_the_spread_of_the_group():
    one = grpo(REWARDS)[0]
    spread = (((0.75**2) + 3 * 0.25**2) / 3) ** 0.5  # of a sample, as TRL takes it
    assert one.tolist() == pytest.approx([0.75 / spread, *[-0.25 / spread] * 3], rel=1e-3)


def test_dr_grpo_does_not_divide():
    assert dr_grpo(REWARDS)[:2].tolist() == [[0.75, -0.25, -0.25, -0.25], [0.25, 0.25, 0.25, -0.75]]


def test_maxrl_divides_by_the_mean():
    assert maxrl(REWARDS)[0].tolist() == pytest.approx([3, -1, -1, -1])
    assert maxrl(REWARDS)[1].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, -1])


@pytest.mark.parametrize("mode", ADVANTAGES)
def test_groups_in_which_all_are_equal_teach_nothing_and_others_add_up_to_nothing(mode):
    advantages = advantage_of(mode)(REWARDS)
    assert advantages.shape == REWARDS.shape
    assert torch.equal(advantages[2:], torch.zeros(2, 4))
    assert torch.allclose(advantages.sum(dim=1), torch.zeros(4), atol=1e-5)


def test_one_s_own_are_imported_and_none_is_none():
    assert advantage_of("torch.nn.functional.relu")(REWARDS - 1).max() == 0
    assert transform_of("none") is None
    assert transform_of("torch.clone") is torch.clone


def test_modes_that_there_are_not():
    with pytest.raises(SettingsError, match="'gpro' is unknown; known are grpo, dr_grpo, maxrl"):
        advantage_of("gpro")
    with pytest.raises(SettingsError, match="'gtpo' is unknown; known are none"):
        transform_of("gtpo")
