"""TRL's GRPO with rewards from `lora_squeeze.training.rewards` and advantages of one's choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from lora_squeeze.data import Answered
from lora_squeeze.errors import TrainingError
from lora_squeeze.training.advantages import Advantage, Transform
from lora_squeeze.training.rewards import Reward

__all__ = ["GroupTrainer", "as_reward_function"]


def as_reward_function(reward: Reward, examples: Sequence[Answered]) -> Any:
    """A reward of one completion as TRL calls it: with a batch, whose column `place` says which examples they are."""

    def rewards(completions: Sequence[Any], place: Sequence[int], **_columns: Any) -> list[float]:
        return [_rewarded(reward, one, examples[at]) for one, at in zip(completions, place, strict=True)]

    rewards.__name__ = getattr(reward, "__name__", "reward")
    return rewards


def _rewarded(reward: Reward, completion: Any, example: Answered) -> float:
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    try:
        return float(reward(text, example))
    except Exception as error:
        raise TrainingError(f"the reward failed with {error!r} on the completion {text[:60]!r}") from error


class GroupTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages are `advantage(rewards)`, then `transform`ed."""

    def __init__(self, *, advantage: Advantage, transform: Transform | None, **options: Any) -> None:
        super().__init__(**options)
        self._advantage = advantage
        self._transform = transform
        self._rewards = torch.empty(0)

    def _calculate_rewards(self, *arguments: Any, **options: Any) -> Any:
        """Keep what TRL gathers of all processes, (completions, reward functions)."""
        self._rewards = super()._calculate_rewards(*arguments, **options)
        return self._rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        model: Any = self.model
        group = self.num_generations if model.training else self.num_generations_eval
        rewards = self._rewards.nansum(dim=1).view(-1, group or 1)
        advantages = self._advantage(rewards)
        if advantages.shape != rewards.shape:
            raise TrainingError(
                f"the advantage function made {tuple(advantages.shape)} of rewards of shape {tuple(rewards.shape)}"
            )
        here = len(batch["advantages"])
        start = self.accelerator.process_index * here
        batch["advantages"] = advantages.reshape(-1)[start : start + here].to(batch["advantages"])
        if self._transform is not None:
            batch["advantages"] = _transformed(self._transform, batch)
        return batch


def _transformed(transform: Transform, batch: dict[str, Any]) -> torch.Tensor:
    advantages = transform(batch["advantages"], batch)
    allowed = (tuple(batch["advantages"].shape), tuple(batch["completion_mask"].shape))
    if tuple(advantages.shape) not in allowed:
        raise TrainingError(
            f"the transform made {tuple(advantages.shape)} of advantages; it must be {allowed[0]} or {allowed[1]}"
        )
    return advantages
