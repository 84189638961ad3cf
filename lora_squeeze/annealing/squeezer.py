"""In-Squeeze in a training loop of your own: one call after every optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lora_squeeze.annealing.change import check_balance
from lora_squeeze.annealing.live import factors_of, sites, unwrapped
from lora_squeeze.annealing.loading import follow_loaded_ranks
from lora_squeeze.annealing.rates import Rates, apply_rates, warm, wrap_scheduler
from lora_squeeze.annealing.replicas import check_processes
from lora_squeeze.annealing.schedule import Schedule
from lora_squeeze.annealing.sharding import reshard
from lora_squeeze.annealing.switch import Switch, switch
from lora_squeeze.annealing.targets import Targets, parse_targets, within
from lora_squeeze.annealing.transport import check_optimizer, innermost
from lora_squeeze.errors import RankError

__all__ = ["Squeezer"]

_log = logging.getLogger("lora_squeeze")


class Squeezer:
    """Lowers the rank of a live adapter as a schedule says, and carries the optimizer along.

        squeezer = Squeezer(model, optimizer, schedule)
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            squeezer.step()

    model
        a PEFT model, also inside of DistributedDataParallel or torch.compile.
    optimizer
        one, or several of them.
    policy
        "uniform": the schedule's rank in every layer; "params", any other policy's spelling, or a function
        (spectra, rank) → Ranks: ranks per layer under the budget that the stage's rank allows.
    state
        "transport" the optimizer's state, or "reset" it at every switch.
    balance
        "keep" the sizes of A and B, or make them "balanced" as the paper does.
    learning_rate, warmup_steps, learning_rates, lr_scheduler
        what happens to the rate at a switch: "continue", "rewarm" or "restart", and a base rate by rank
        (see `Rates`). A scheduler is needed for the last two to reach it.
    step
        optimizer steps that were made before, where training is resumed.
    on_switch
        called with every Switch.

    An adapter above the rank of the stage at `step` is squeezed at once: so Cont-Squeeze is a schedule
    of one stage. From then on the model takes on the ranks of checkpoints that are loaded into it.
    Raises a LoraSqueezeError, before anything is changed, for what cannot be squeezed: an optimizer that
    is not known, DeepSpeed ZeRO, sharded factors, variants of LoRA.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        schedule: Schedule,
        *,
        policy: str | Targets = "uniform",
        state: str = "transport",
        balance: str = "keep",
        learning_rate: str = "continue",
        warmup_steps: int | None = None,
        learning_rates: Mapping[int, float] | None = None,
        lr_scheduler: Any = None,
        adapter_name: str = "default",
        step: int = 0,
        on_switch: Callable[[Switch], None] | None = None,
    ) -> None:
        given = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        self.model, self.schedule = model, schedule
        self.optimizers = [innermost(one) for one in given]
        self.switches: list[Switch] = []
        self.steps = step
        self._uniform = policy == "uniform"
        self._targets = parse_targets(policy) if isinstance(policy, str) else policy
        self._options = {"state": state, "balance": balance, "adapter_name": adapter_name}
        self._adapter_name, self._on_switch = adapter_name, on_switch
        self._rates = Rates(learning_rate, warmup_steps, learning_rates or {})
        self._scheduler = lr_scheduler
        check_balance(balance)
        self._factors = self._check(state)
        follow_loaded_ranks(model, adapter_name)
        wrap_scheduler(lr_scheduler, self._rates, schedule)
        if step == 0:
            self._begin_stage()
        layers = factors_of(model, sites(model, adapter_name)).layers.values()
        if not within(layers, self.rank, uniform=self._uniform):
            self._squeeze()
        self._warm()

    @property
    def rank(self) -> int:
        """The rank of the stage in force."""
        return self.schedule.rank_at(self.steps)

    def step(self) -> Switch | None:
        """Count an optimizer step; at the end of a stage, squeeze. Returns what was done, if anything."""
        before = self.schedule.stage_at(self.steps)
        self.steps += 1
        done = None
        if self.schedule.stage_at(self.steps) != before:
            done = self._squeeze()
            self._begin_stage()
        self._warm()
        return done

    def state_dict(self) -> dict[str, int]:
        """What to save beside model and optimizer: the number of steps."""
        return {"step": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after as many steps; load model and optimizer, too."""
        self.steps = state["step"]
        self._warm()

    def _check(self, state: str) -> list[nn.Parameter]:
        """The factors, which keep their identity, once everything is known to work."""
        for optimizer in self.optimizers:
            check_optimizer(optimizer, state=state)
        reshard(unwrapped(self.model))
        found = sites(self.model, self._adapter_name)
        check_processes(self.model, found)
        self._rates.check(self.schedule, self._scheduler)
        largest = max(site.rank for site in found.values())
        rank = self.rank
        if largest < rank:
            raise RankError(
                f"at step {self.steps} the schedule asks for rank {rank}, but the adapter '{self._adapter_name}' has "
                f"{largest}: a schedule starts at the adapter's own rank (r={rank} in its LoraConfig), or below"
            )
        return [parameter for site in found.values() for parameter in (site.down, site.up)]

    def _squeeze(self) -> Switch:
        rank = self.rank
        done = switch(
            self.model, self.optimizers, lambda spectra: self._targets(spectra, rank), step=self.steps, **self._options
        )
        self.switches.append(done)
        _log.info(done.line())
        if self._on_switch is not None:
            self._on_switch(done)
        return done

    def _begin_stage(self) -> None:
        for one in self.optimizers:
            apply_rates(one, self._scheduler, self._rates, self.schedule, step=self.steps, factors=self._factors)

    def _warm(self) -> None:
        if self._scheduler is None:
            for one in self.optimizers:
                warm(one, self._rates, self.schedule, step=self.steps, factors=self._factors)
