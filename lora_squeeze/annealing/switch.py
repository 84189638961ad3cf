"""One switch: new ranks for a live model and its optimizers, all of it or nothing.

First everything is decided and computed beside what is there; only then parameters, gradients,
optimizer state and configuration are exchanged. If that fails, all of them are put back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_squeeze.adapter import Adapter
from lora_squeeze.annealing import eightbit
from lora_squeeze.annealing.change import Change, changes_to, decomposed
from lora_squeeze.annealing.live import Site, factors_of, place, record_ranks, sites, unwrapped
from lora_squeeze.annealing.replicas import agreed, check_processes, on_device, rebuild_reducers
from lora_squeeze.annealing.sharding import gathered, is_sharded, reshard
from lora_squeeze.annealing.transport import Carry, carried, check_optimizer, innermost
from lora_squeeze.errors import RankError
from lora_squeeze.records import Ranks, Spectrum

__all__ = ["Choose", "Switch", "switch"]

Choose = Callable[[Sequence[Spectrum]], Ranks]


@dataclass(frozen=True)
class Switch:
    """What a switch did, and what it cost.

    rank
        the largest rank of any layer afterwards; rank_before: before.
    retained_variance
        the share of Σσ² over all layers that is still there.
    relative_change
        ‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all layers: √(1 − retained_variance); worst_change: of the layer
        `worst_layer`.
    dead
        directions that carried nothing and start anew.
    """

    step: int
    ranks: Ranks
    rank_before: int
    rank: int
    retained_variance: float
    relative_change: float
    worst_layer: str
    worst_change: float
    dead: int
    parameters_before: int
    parameters_after: int
    seconds: float

    def line(self) -> str:
        """One line for the log."""
        dead = f", {self.dead} directions start anew" if self.dead else ""
        return (
            f"step {self.step}: rank {self.rank_before} → {self.rank}, {self.parameters_before:,} → "
            f"{self.parameters_after:,} parameters, {self.retained_variance:.2%} of the variance retained, the update "
            f"changes by {self.relative_change:.2%} (worst layer {self.worst_change:.2%}){dead}, {self.seconds:.2f} s"
        )

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger."""
        return {
            "squeeze/rank": self.rank,
            "squeeze/retained_variance": self.retained_variance,
            "squeeze/relative_change": self.relative_change,
            "squeeze/worst_layer_change": self.worst_change,
            "squeeze/dead_directions": self.dead,
            "squeeze/parameters": self.parameters_after,
            "squeeze/seconds": self.seconds,
        }


@dataclass(frozen=True)
class _Decision:
    ranks: Ranks
    spectra: tuple[Spectrum, ...]
    changes: Mapping[str, Change]


@dataclass(frozen=True)
class _Exchange:
    """A module's tensors, gradients and optimizer state, to be put in (or back)."""

    site: Site
    down: Tensor
    up: Tensor
    gradients: tuple[Tensor | None, Tensor | None]
    alpha: float | None = None  # None: what follows from scale and rank


def switch(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    choose: Choose,
    *,
    step: int = 0,
    state: str = "transport",
    balance: str = "keep",
    adapter_name: str = "default",
) -> Switch:
    """Lower the ranks of a live model's adapter, and carry the optimizers' state along.

    choose
        spectra → ranks; as every policy. No layer may get more than its own rank, or less than 1.
    state
        "transport", or "reset" to let the factors' state start anew.
    balance
        "keep" or "balanced" (see `lora_squeeze.annealing.change`).

    To be called between optimizer steps. Gradients that are there (accumulation) are carried along, too.
    Every process gets the factors' change from process 0. Raises a LoraSqueezeError before anything is
    changed; after any other error, model and optimizers are as they were.
    """
    start = time.perf_counter()
    optimizers = [innermost(optimizer) for optimizer in optimizers]
    for optimizer in optimizers:
        check_optimizer(optimizer, state=state)
    reshard(unwrapped(model))
    found = sites(model, adapter_name)
    check_processes(model, found)
    adapter = factors_of(model, found)
    # Every process takes part in gathering shards, and only process 0 looks at them.
    layers = {name: adapter.load(name) for name in adapter.layers}
    adapter = replace(adapter, load=layers.__getitem__)
    decision = agreed(lambda: _decide(adapter, choose, balance=balance))
    moved = {name: site for name, site in found.items() if _changes(site, decision)}
    carries = _carries(moved, decision)
    exchanges = [_exchange(site, carries) for site in moved.values()]
    states = [carried(optimizer, carries, state=state) for optimizer in optimizers]
    _commit(model, found, exchanges, list(zip(optimizers, states, strict=True)))
    rebuild_reducers(model)
    after = sum(spec.parameters for site in found.values() for spec in site.specs())
    return replace(_report(decision, adapter), step=step, parameters_after=after, seconds=time.perf_counter() - start)


def _decide(adapter: Adapter, choose: Choose, *, balance: str) -> _Decision:
    """Process 0's part: all spectra, the ranks, and each layer's change (on the CPU, to be sent)."""
    layers = {name: adapter.load(name) for name in adapter.layers}
    found, spectra = decomposed(layers, adapter.layers)
    ranks = choose(spectra)
    for name, spec in adapter.layers.items():
        rank = ranks.by_layer.get(name, 0)
        if not 1 <= rank <= spec.rank:
            raise RankError(f"layer '{name}': rank {rank} is not between 1 and its own rank {spec.rank}")
    changing = {
        name: layer
        for name, layer in layers.items()
        if balance == "balanced" or ranks.by_layer[name] < adapter.layers[name].rank
    }
    changes = changes_to(ranks.by_layer, changing, found, balance=balance)
    return _Decision(ranks, spectra, {name: _on_cpu(change) for name, change in changes.items()})


def _on_cpu(change: Change) -> Change:
    fresh = None if change.fresh is None else change.fresh.cpu()
    return replace(change, p=change.p.cpu(), q=change.q.cpu(), fresh=fresh)


def _changes(site: Site, decision: _Decision) -> bool:
    """Whether any part of a module changes. All of its parts then have one new rank."""
    there = [part for part in site.parts if part in decision.changes]
    ranks = {decision.ranks.by_layer[part] for part in site.parts}
    if len(ranks) > 1:
        raise RankError(f"the parts of module '{site.name}' are stored together and have one rank, not {sorted(ranks)}")
    return bool(there)


def _carries(found: Mapping[str, Site], decision: _Decision) -> dict[nn.Parameter, Carry]:
    carries: dict[nn.Parameter, Carry] = {}
    for site in found.values():
        device = site.down.device
        changes = tuple(
            replace(
                change,
                p=on_device(change.p, device),
                q=on_device(change.q, device),
                fresh=None if change.fresh is None else on_device(change.fresh, device),
            )
            for change in (decision.changes[part] for part in site.parts)
        )
        carries[site.down] = Carry(site, "down", changes)
        carries[site.up] = Carry(site, "up", changes)
    return carries


def _exchange(site: Site, carries: Mapping[nn.Parameter, Carry]) -> _Exchange:
    changes = carries[site.down].changes
    downs, ups = site.downs(gathered(site.down)), site.ups(gathered(site.up))
    down = site.as_down(torch.stack([change.down(one) for change, one in zip(changes, downs, strict=True)]))
    up = site.as_up(torch.stack([change.up(one) for change, one in zip(changes, ups, strict=True)]))
    gradients = tuple(
        None if parameter.grad is None else carries[parameter](parameter.grad, "gradient")
        for parameter in (site.down, site.up)
    )
    return _Exchange(site, down.contiguous(), up.contiguous(), (gradients[0], gradients[1]))


def _commit(
    model: nn.Module,
    found: Mapping[str, Site],
    exchanges: Sequence[_Exchange],
    states: Sequence[tuple[Optimizer, Mapping[nn.Parameter, dict[str, Any]]]],
) -> None:
    """Exchange everything; put everything back if that fails."""
    before = [_as_it_is(exchange.site) for exchange in exchanges]
    old_states = [{p: optimizer.state.get(p, {}) for p in new} for optimizer, new in states]
    adapter_name = next(iter(found.values())).adapter
    configs: dict[str, Any] = unwrapped(model).peft_config  # pyright: ignore[reportAssignmentType]
    config = configs[adapter_name]
    try:
        for exchange in exchanges:
            _put(exchange)
        for optimizer, new in states:
            _put_states(optimizer, new)
        record_ranks(model, adapter_name, found)
    except BaseException:
        for exchange in before:
            _put(exchange)
        for (optimizer, _), old in zip(states, old_states, strict=True):
            _put_states(optimizer, old)
        configs[adapter_name] = config
        raise
    for (optimizer, _), old in zip(states, old_states, strict=True):
        for one in old.values():
            eightbit.release(optimizer, one)


def _as_it_is(site: Site) -> _Exchange:
    alpha = site.module.lora_alpha[site.adapter]
    down, up = (gathered(one) if is_sharded(one) else one.data for one in (site.down, site.up))
    return _Exchange(site, down, up, (site.down.grad, site.up.grad), alpha)


def _put(exchange: _Exchange) -> None:
    site = exchange.site
    place(site, exchange.down, exchange.up, scale=site.scale)
    site.down.grad, site.up.grad = exchange.gradients
    if exchange.alpha is not None:
        site.module.lora_alpha[site.adapter] = exchange.alpha


def _put_states(optimizer: Optimizer, states: Mapping[nn.Parameter, dict[str, Any]]) -> None:
    for parameter, state in states.items():
        if state:
            optimizer.state[parameter] = state
        else:
            optimizer.state.pop(parameter, None)


def _report(decision: _Decision, adapter: Adapter) -> Switch:
    ranks = decision.ranks.by_layer
    energy = sum(spectrum.energy for spectrum in decision.spectra)
    retained = sum(spectrum.retained_energy(ranks[spectrum.name]) for spectrum in decision.spectra)
    share = retained / energy if energy > 0 else 1.0
    lost = {one.name: math.sqrt(max(1 - one.retained_variance(ranks[one.name]), 0.0)) for one in decision.spectra}
    worst = max(lost, key=lambda name: lost[name])
    return Switch(
        step=0,
        ranks=decision.ranks,
        rank_before=adapter.rank,
        rank=decision.ranks.largest,
        retained_variance=share,
        relative_change=math.sqrt(max(1 - share, 0.0)),
        worst_layer=worst,
        worst_change=lost[worst],
        dead=sum(change.rank - change.kept for change in decision.changes.values()),
        parameters_before=adapter.parameters,
        parameters_after=0,
        seconds=0.0,
    )
