"""In-Squeeze for transformers' Trainer and every trainer built on it: glue around `Squeezer`."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_squeeze.annealing.change import check_balance
from lora_squeeze.annealing.live import live_adapter
from lora_squeeze.annealing.loading import follow_loaded_ranks
from lora_squeeze.annealing.rates import Rates
from lora_squeeze.annealing.schedule import Schedule, parse_schedule
from lora_squeeze.annealing.squeezer import Squeezer
from lora_squeeze.annealing.switch import Switch
from lora_squeeze.annealing.targets import Targets, parse_targets
from lora_squeeze.annealing.transport import check_state
from lora_squeeze.errors import SettingsError
from lora_squeeze.extras import require

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    TrainerCallback = require("transformers", "train").TrainerCallback

__all__ = ["SqueezeCallback"]

_log = logging.getLogger("lora_squeeze")

# Where a checkpoint's trainer_state.json keeps the schedule that it was made under.
_SAVED = "SqueezeSchedule"


class SqueezeCallback(TrainerCallback):
    """Lowers the rank during `trainer.train()`, as a schedule says.

        Trainer(model, args, callbacks=[SqueezeCallback("minimum=50", target=8)], …)

    schedule
        a `Schedule`, or the spelling of one ("standard", "minimum", "cont=200", "64@0, 8@75%", …): then
        the number of steps is the Trainer's, and the ranks go
    ranks
        through these, or
    target, spacing
        from the adapter's own rank down to `target`, "geometric" (halving) or "linear".
    policy, state, balance, learning_rate, warmup_steps, learning_rates, adapter_name
        as in `Squeezer`. The Trainer's own scheduler is the one that is warmed up or begun anew.

    Give it to the Trainer when it is made (`callbacks=[…]`): from then on the model takes on the rank of
    the checkpoint that a training is resumed from. Every switch is logged as a line, and its numbers
    ("squeeze/rank", …) go to the Trainer's own loggers and into its `log_history`.
    """

    def __init__(
        self,
        schedule: Schedule | str = "minimum",
        *,
        ranks: Sequence[int] | None = None,
        target: int | None = None,
        spacing: str = "geometric",
        policy: str | Targets = "uniform",
        state: str = "transport",
        balance: str = "keep",
        learning_rate: str = "continue",
        warmup_steps: int | None = None,
        learning_rates: Mapping[int, float] | None = None,
        adapter_name: str = "default",
    ) -> None:
        if isinstance(schedule, Schedule) and (ranks is not None or target is not None):
            raise SettingsError("a Schedule has its ranks; give ranks or a target with the spelling of one")
        if isinstance(schedule, str) and "@" not in schedule and ranks is None and target is None:
            raise SettingsError(f"schedule '{schedule}' needs target=RANK, or ranks=(…)")
        Rates(learning_rate, warmup_steps, learning_rates or {})
        check_state(state)
        check_balance(balance)
        if isinstance(policy, str):
            parse_targets(policy)
        self.schedule = schedule
        self.squeezer: Squeezer | None = None
        self._ranks, self._target, self._spacing = ranks, target, spacing
        self._adapter_name = adapter_name
        self._options: dict[str, Any] = {
            "policy": policy,
            "state": state,
            "balance": balance,
            "learning_rate": learning_rate,
            "warmup_steps": warmup_steps,
            "learning_rates": learning_rates,
            "adapter_name": adapter_name,
        }
        self._source: int | None = None
        self._unreported: list[Switch] = []

    @property
    def switches(self) -> Sequence[Switch]:
        """What was done since this training was begun or resumed."""
        return () if self.squeezer is None else tuple(self.squeezer.switches)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the model take on the ranks of a checkpoint before the Trainer loads one."""
        if kwargs.get("model") is not None:
            follow_loaded_ranks(kwargs["model"], self._adapter_name)
            self._source = live_adapter(kwargs["model"], self._adapter_name).rank

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin, or go on, with the schedule."""
        model = kwargs["model"]
        schedule = self._schedule_for(state, live_adapter(model, self._adapter_name).rank)
        if args.load_best_model_at_end and len(schedule.stages) > 1:
            _log.warning(
                "load_best_model_at_end may bring back a checkpoint of an earlier stage, at its higher rank; the last "
                "checkpoint has rank %d",
                schedule.ranks[-1],
            )
        self.squeezer = Squeezer(
            model,
            kwargs["optimizer"],
            schedule,
            lr_scheduler=kwargs.get("lr_scheduler"),
            step=state.global_step,
            on_switch=self._unreported.append,
            **self._options,
        )
        self._report(args, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the optimizer step, and squeeze where a stage ends; before the Trainer logs and saves."""
        if self.squeezer is not None:
            self.squeezer.step()
            self._report(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so if the training ended before the schedule did."""
        if self.squeezer is not None and self.squeezer.rank > self.squeezer.schedule.ranks[-1]:
            _log.warning(
                "training stopped at step %d of %d, at rank %d; rank %d was not reached: squeeze the saved adapter",
                state.global_step,
                self.squeezer.schedule.steps,
                self.squeezer.rank,
                self.squeezer.schedule.ranks[-1],
            )

    def _schedule_for(self, state: TrainerState, rank: int) -> Schedule:
        saved: Any = (state.stateful_callbacks or {}).get(_SAVED)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(self.schedule, Schedule):
            schedule = self.schedule
        else:
            # Where training is resumed, the adapter may have left its first rank long ago.
            source = self._source or rank
            if saved is not None:
                source = Schedule.from_json(saved["attributes"]["schedule"]).ranks[0]
            schedule = parse_schedule(
                self.schedule,
                steps=state.max_steps,
                ranks=self._ranks,
                source=None if self._ranks is not None else source,
                target=self._target,
                spacing=self._spacing,
            )
        callbacks: Any = state.stateful_callbacks
        callbacks[_SAVED] = {"args": {}, "attributes": {"schedule": schedule.to_json()}}
        return schedule

    def _report(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Hand the numbers of each switch to the Trainer's loggers, as `Trainer.log` would."""
        for done in self._unreported:
            logs: dict[str, float] = {**done.metrics(), "epoch": state.epoch or 0.0}
            state.log_history.append({**logs, "step": state.global_step})
            handler = self._handler()
            if handler is not None:
                handler.call_event("on_log", args, state, control, logs=logs)
        self._unreported.clear()

    def _handler(self) -> Any:
        """The object that calls the Trainer's callbacks: callbacks are not told, so it is looked for."""
        kind = require("transformers.trainer_callback", "train").CallbackHandler
        handlers: list[Any] = [one for one in gc.get_objects() if issubclass(type(one), kind)]
        return next((one for one in handlers if any(own is self for own in one.callbacks)), None)
