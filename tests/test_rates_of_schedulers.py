"""A learning rate by rank under the schedulers of torch and transformers: the rate asked for, and then their curve."""

import pytest
import torch
from accelerate import Accelerator
from loops import SCHEDULE, adamw, loop, rates
from test_switch import build
from torch.optim import lr_scheduler as of_torch
from transformers import get_scheduler

from lora_squeeze.annealing.squeezer import Squeezer
from lora_squeeze.errors import SettingsError

STEPS, SWITCH, SECOND = 7, 3, 5  # of SCHEDULE
BASE, OTHER = 1e-3, 1e-2


def falling(optimizer, slope=0.1):
    return of_torch.LambdaLR(optimizer, lambda step: 1 - slope * step)


def in_turn(*milestones):
    """Schedulers one after the other: a warm-up, then others."""

    def made(optimizer):
        parts = [
            of_torch.LinearLR(optimizer, 0.5, total_iters=2),
            falling(optimizer),
            of_torch.CosineAnnealingLR(optimizer, 4, eta_min=1e-4),
        ]
        return of_torch.SequentialLR(optimizer, parts[: len(milestones) + 1], list(milestones))

    return made


def nested(optimizer):
    chained = of_torch.ChainedScheduler(
        [of_torch.ConstantLR(optimizer, 0.5, 2), of_torch.ExponentialLR(optimizer, 0.9)]
    )
    return of_torch.SequentialLR(optimizer, [chained, falling(optimizer)], [4])


def named(name, **specific):
    return lambda optimizer: get_scheduler(
        name, optimizer, num_warmup_steps=2, num_training_steps=STEPS, scheduler_specific_kwargs=specific or None
    )


FOLLOWING = {
    "LambdaLR": falling,
    "MultiplicativeLR": lambda optimizer: of_torch.MultiplicativeLR(optimizer, lambda step: 1 - 0.05 * step),
    "StepLR": lambda optimizer: of_torch.StepLR(optimizer, 2, 0.5),
    "MultiStepLR": lambda optimizer: of_torch.MultiStepLR(optimizer, [2, 4], 0.5),
    "ConstantLR until after the switch": lambda optimizer: of_torch.ConstantLR(optimizer, 0.5, 4),
    "LinearLR": lambda optimizer: of_torch.LinearLR(optimizer, 1.0, 0.2, 6),
    "ExponentialLR": lambda optimizer: of_torch.ExponentialLR(optimizer, 0.8),
    "PolynomialLR": lambda optimizer: of_torch.PolynomialLR(optimizer, 9, 2.0),
    "CosineAnnealingLR": lambda optimizer: of_torch.CosineAnnealingLR(optimizer, 8),
    "CosineAnnealingLR down to a floor": lambda optimizer: of_torch.CosineAnnealingLR(optimizer, 8, eta_min=2e-4),
    "CosineAnnealingLR that turns": lambda optimizer: of_torch.CosineAnnealingLR(optimizer, 3, eta_min=2e-4),
    "CosineAnnealingWarmRestarts": lambda optimizer: of_torch.CosineAnnealingWarmRestarts(optimizer, 4, eta_min=2e-4),
    "SequentialLR, the milestone before": in_turn(2),
    "SequentialLR, the milestone at the switch": in_turn(3),
    "SequentialLR, the milestone after": in_turn(4),
    "SequentialLR of three": in_turn(2, 4),
    "SequentialLR of three, down to a floor": in_turn(1, 2),
    "SequentialLR of LambdaLRs": lambda optimizer: of_torch.SequentialLR(
        optimizer, [falling(optimizer), falling(optimizer, 0.05)], [4]
    ),
    "ChainedScheduler of LambdaLRs": lambda optimizer: of_torch.ChainedScheduler(
        [falling(optimizer), falling(optimizer, 0.05)]
    ),
    "ChainedScheduler": lambda optimizer: of_torch.ChainedScheduler(
        [of_torch.ExponentialLR(optimizer, 0.9), of_torch.StepLR(optimizer, 2, 0.5)]
    ),
    "SequentialLR with a ChainedScheduler": nested,
    "constant_with_warmup": named("constant_with_warmup"),
    "linear": named("linear"),
    "cosine": named("cosine"),
    "cosine_with_restarts": named("cosine_with_restarts"),
    "cosine_with_min_lr": named("cosine_with_min_lr", min_lr_rate=0.1),
    "polynomial": named("polynomial", lr_end=1e-5),
    "inverse_sqrt": named("inverse_sqrt"),
    "warmup_stable_decay": named("warmup_stable_decay", num_decay_steps=3),
}


def curve_of(make, base):
    """The rate of every step if the base had been this one from the start."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=base)
    optimizer.defaults["lr"] = BASE  # from which transformers' polynomial takes how far down its curve goes
    scheduler = make(optimizer)
    seen = []
    for _ in range(STEPS):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def squeezed(make, wrap=lambda scheduler, optimizer: scheduler, by_rank=None):
    model = build()
    optimizer = adamw(model, lr=BASE)
    scheduler = wrap(make(optimizer), optimizer)
    squeezer = Squeezer(model, optimizer, SCHEDULE, learning_rates=by_rank or {4: OTHER}, lr_scheduler=scheduler)
    return rates(loop(model, optimizer, squeezer, STEPS, scheduler=scheduler)), scheduler, optimizer


@pytest.mark.parametrize("name", FOLLOWING)
def test_the_rate_of_a_rank_goes_on_as_the_scheduler_says(name):
    make = FOLLOWING[name]
    before, after = curve_of(make, BASE), curve_of(make, OTHER)
    seen, scheduler, optimizer = squeezed(make)
    assert seen == pytest.approx(before[:SWITCH] + after[SWITCH:], rel=1e-6)
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    seen, *_ = squeezed(make, by_rank={8: OTHER, 4: BASE, 2: 3e-3})
    assert seen == pytest.approx(after[:SWITCH] + before[SWITCH:SECOND] + curve_of(make, 3e-3)[SECOND:], rel=1e-6)


def test_inside_of_accelerate_it_is_the_same():
    accelerator = Accelerator(cpu=True)

    def wrapped(scheduler, optimizer):
        accelerator.prepare(optimizer)
        return accelerator.prepare_scheduler(scheduler)

    make = in_turn(4)
    seen, *_ = squeezed(make, wrapped)
    assert seen == pytest.approx(curve_of(make, BASE)[:SWITCH] + curve_of(make, OTHER)[SWITCH:])


def test_a_training_that_is_resumed_keeps_the_rate_of_its_rank():
    make = in_turn(4)
    model = build()
    optimizer = adamw(model, lr=BASE)
    scheduler = make(optimizer)
    squeezer = Squeezer(model, optimizer, SCHEDULE, learning_rates={4: OTHER}, lr_scheduler=scheduler)
    loop(model, optimizer, squeezer, SWITCH, scheduler=scheduler)
    again = build(r=4)
    resumed = adamw(again, lr=BASE)
    going_on = make(resumed)
    resumed.load_state_dict(optimizer.state_dict())
    going_on.load_state_dict(scheduler.state_dict())
    squeezer = Squeezer(again, resumed, SCHEDULE, learning_rates={4: OTHER}, lr_scheduler=going_on, step=SWITCH)
    seen = rates(loop(again, resumed, squeezer, STEPS - SWITCH, scheduler=going_on))
    assert seen == pytest.approx(curve_of(make, OTHER)[SWITCH:])


def test_a_scheduler_that_waits_for_a_plateau_goes_on_from_the_rate_of_the_rank():
    class OnPlateau:
        """Nothing ever gets better: after each wait, half the rate."""

        def __init__(self, scheduler):
            self.scheduler = scheduler

        def step(self):
            self.scheduler.step(1.0)

    model = build()
    optimizer = adamw(model, lr=BASE)
    scheduler = named("reduce_lr_on_plateau", patience=1, factor=0.5)(optimizer)
    squeezer = Squeezer(model, optimizer, SCHEDULE, learning_rates={4: OTHER}, lr_scheduler=scheduler)
    seen = rates(loop(model, optimizer, squeezer, STEPS, scheduler=OnPlateau(scheduler)))
    # The third step without a gain halves the rate, and the switch comes after it.
    assert seen == pytest.approx([BASE, BASE, BASE, OTHER, OTHER, OTHER / 2, OTHER / 2])


class Own(of_torch.LambdaLR):
    def get_lr(self):
        return [5e-4 for _ in self.base_lrs]


class Renamed(of_torch.StepLR):
    """Computes its rates as StepLR does."""


FIXED = {
    "OneCycleLR": lambda optimizer: of_torch.OneCycleLR(optimizer, max_lr=BASE, total_steps=STEPS),
    "CyclicLR": lambda optimizer: of_torch.CyclicLR(optimizer, 1e-4, BASE, cycle_momentum=False),
    "SWALR": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, 1e-4),
    "GreedyLR": named("greedy"),
    "Own": lambda optimizer: Own(optimizer, lambda step: 1.0),
}


@pytest.mark.parametrize("inside", ["alone", "inside of another"])
@pytest.mark.parametrize("name", FIXED)
def test_a_scheduler_that_returns_to_rates_of_its_own_is_refused(name, inside):
    model = build()
    optimizer = adamw(model, lr=BASE)
    try:
        scheduler = FIXED[name](optimizer)
    except ValueError:
        pytest.skip("this transformers has no such scheduler")
    if inside != "alone":
        scheduler = of_torch.SequentialLR(optimizer, [falling(optimizer), scheduler], [4])
    before = [dict(group, params=None) for group in optimizer.param_groups]
    with pytest.raises(SettingsError, match=rf"and not {name}, which may return to its own; use one of LambdaLR,"):
        Squeezer(model, optimizer, SCHEDULE, learning_rates={4: OTHER}, lr_scheduler=scheduler)
    assert [dict(group, params=None) for group in optimizer.param_groups] == before
    Squeezer(model, optimizer, SCHEDULE, lr_scheduler=scheduler)  # without rates by rank it goes on as it is


def test_a_class_of_ones_own_that_computes_as_a_known_one_does_is_taken():
    seen, *_ = squeezed(lambda optimizer: Renamed(optimizer, 2, 0.5))
    assert seen == pytest.approx([1e-3, 1e-3, 5e-4, 5e-3, 2.5e-3, 2.5e-3, 1.25e-3])
