"""What happens beside the training steps: lines in metrics.jsonl, and word to whoever watches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from transformers import TrainerCallback

from lora_squeeze.training.folder import RunFolder

__all__ = ["OnLog", "Recorder"]

OnLog: TypeAlias = Callable[[int, int, Mapping[str, float]], None]


class Recorder(TrainerCallback):
    """Writes what is logged to metrics.jsonl, keeps the last value of each metric, and tells `on_log`.

    `on_log(step, steps, metrics)` is also called, with no metrics, at each step.
    """

    def __init__(self, folder: RunFolder, on_log: OnLog | None = None) -> None:
        self.latest: dict[str, float] = {}
        self._folder = folder
        self._on_log = on_log

    def remember(self) -> None:
        """Begin with what was logged before the training was interrupted."""
        for entry in self._folder.read_metrics():
            self.latest.update({key: value for key, value in entry.items() if key != "step"})

    def on_step_end(self, args: Any, state: Any, control: Any, **_given: Any) -> None:
        if self._on_log is not None and state.is_world_process_zero:
            self._on_log(state.global_step, state.max_steps, {})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_given: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        numbers = {key: float(value) for key, value in logs.items() if isinstance(value, int | float)}
        self.latest.update(numbers)
        with self._folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **numbers}) + "\n")
        if self._on_log is not None:
            self._on_log(state.global_step, state.max_steps, numbers)
