"""In-Squeeze in a training loop of one's own, with everything that such loops have."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from adapters import LLAMA, make_adapter, output
from loops import SCHEDULE, adamw, loop, rates
from peft import PeftModel
from test_switch import KINDS, build, trained, updates

from lora_squeeze import open_adapter
from lora_squeeze.annealing.live import live_adapter
from lora_squeeze.annealing.loading import follow_loaded_ranks
from lora_squeeze.annealing.schedule import Schedule, custom, parse_schedule
from lora_squeeze.annealing.squeezer import Squeezer
from lora_squeeze.errors import RankError, SettingsError, UnsupportedAdapter
from lora_squeeze.records import Ranks


def test_the_rank_follows_the_schedule():
    model = build()
    optimizer = adamw(model)
    done = []
    squeezer = Squeezer(model, optimizer, SCHEDULE, on_switch=done.append)
    seen = loop(model, optimizer, squeezer, 7)
    assert [rank for rank, _ in seen] == [8, 8, 8, 4, 4, 2, 2]
    assert squeezer.switches == done
    assert [(one.step, one.rank_before, one.rank) for one in done] == [(3, 8, 4), (5, 4, 2)]
    assert squeezer.rank == 2
    assert squeezer.step() is None


def test_post_squeeze_is_one_switch_after_the_last_step():
    model = build()
    optimizer = adamw(model)
    squeezer = Squeezer(model, optimizer, parse_schedule("post", source=8, target=2, steps=3))
    assert [rank for rank, _ in loop(model, optimizer, squeezer, 3)] == [8, 8, 8]
    assert live_adapter(model).rank == 2


def test_cont_squeeze_starts_from_a_trained_adapter():
    model = build()
    optimizer = adamw(model)
    squeezer = Squeezer(model, optimizer, custom([(0, 2)], 4), learning_rate="rewarm")
    assert live_adapter(model).rank == 2
    assert [one.step for one in squeezer.switches] == [0]


def test_a_saved_adapter_of_any_stage_loads_at_its_rank(tmp_path):
    model = build()
    optimizer = adamw(model)
    squeezer = Squeezer(model, optimizer, SCHEDULE)
    for step in range(8):
        model.save_pretrained(str(tmp_path / str(step)))
        again = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / str(step)))
        assert open_adapter(tmp_path / str(step)).rank == SCHEDULE.rank_at(step)
        assert torch.equal(output(again.eval(), LLAMA), output(model.eval(), LLAMA))
        loop(model.train(), optimizer, squeezer, 1)


@pytest.mark.parametrize("stop", [2, 3, 4, 5, 6])
def test_resuming_reaches_the_same_weights(stop):
    def begin():
        model = build()
        optimizer = adamw(model, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
        options = {"lr_scheduler": scheduler, "learning_rate": "rewarm", "learning_rates": {4: 2e-2}}
        return model, optimizer, scheduler, options

    model, optimizer, scheduler, options = begin()
    squeezer = Squeezer(model, optimizer, SCHEDULE, **options)
    loop(model, optimizer, squeezer, stop, scheduler=scheduler)
    saved = copy.deepcopy([one.state_dict() for one in (model, optimizer, scheduler, squeezer)])
    rest = loop(model, optimizer, squeezer, 7 - stop, scheduler=scheduler)

    again, optimizer, scheduler, options = begin()
    squeezer = Squeezer(again, optimizer, SCHEDULE, **options)
    for one, state in zip((again, optimizer, scheduler, squeezer), saved, strict=True):
        one.load_state_dict(state)
    assert live_adapter(again).rank == SCHEDULE.rank_at(stop)
    assert again.peft_config["default"].r == SCHEDULE.rank_at(stop)
    assert loop(again, optimizer, squeezer, 7 - stop, scheduler=scheduler) == rest
    assert all(torch.equal(one, two) for one, two in zip(trained(again), trained(model), strict=True))


# --- learning rates -----------------------------------------------------------------------------------------------


def linear(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)


def test_the_scheduler_goes_on():
    model = build()
    optimizer = adamw(model, lr=8.0e-3)
    scheduler = linear(optimizer)
    squeezer = Squeezer(model, optimizer, SCHEDULE, lr_scheduler=scheduler)
    assert rates(loop(model, optimizer, squeezer, 7, scheduler=scheduler)) == pytest.approx(
        [8e-3, 7e-3, 6e-3, 5e-3, 4e-3, 3e-3, 2e-3]
    )


def test_rewarming_and_restarting_a_scheduler():
    for kind, expected in (
        ("rewarm", [8, 7, 6, 5 / 2, 4, 3 / 2, 2]),
        # Each stage runs through the whole curve of 7 steps: at 0, 2.33, 4.67, then 0, 3.5, then 0, 3.5.
        ("restart", [8, 6, 3, 8, 4, 8, 4]),
    ):
        model = build()
        optimizer = adamw(model, lr=8.0e-3)
        scheduler = linear(optimizer)
        squeezer = Squeezer(
            model,
            optimizer,
            SCHEDULE,
            lr_scheduler=scheduler,
            learning_rate=kind,
            warmup_steps=2 if kind == "rewarm" else None,
        )
        seen = rates(loop(model, optimizer, squeezer, 7, scheduler=scheduler))
        assert [rate * 1000 for rate in seen] == pytest.approx(expected)
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_learning_rate_for_each_rank(scheduled):
    model = build()
    head = torch.nn.Parameter(torch.ones(2))
    downs = [one for name, one in model.named_parameters() if "lora_A" in name]
    ups = [one for name, one in model.named_parameters() if "lora_B" in name]
    groups = [{"params": downs}, {"params": ups, "lr": 4e-3}, {"params": [head], "lr": 7e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) if scheduled else None
    squeezer = Squeezer(model, optimizer, SCHEDULE, learning_rates={8: 2e-3, 2: 1e-2}, lr_scheduler=scheduler)
    seen = loop(model, optimizer, squeezer, 7, scheduler=scheduler)
    base = [[2e-3, 8e-3, 7e-3]] * 5 + [[1e-2, 4e-2, 7e-3]] * 2
    decay = [0.5**step if scheduled else 1 for step in range(7)]
    for (_, found), expected, factor in zip(seen, base, decay, strict=True):
        assert found == pytest.approx([rate * factor for rate in expected])


def test_rewarming_without_a_scheduler():
    model = build()
    optimizer = adamw(model, lr=1e-3)
    squeezer = Squeezer(model, optimizer, SCHEDULE, learning_rate="rewarm", warmup_steps=2, learning_rates={2: 4e-3})
    assert rates(loop(model, optimizer, squeezer, 7)) == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4, 1e-3, 2e-3, 4e-3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": "warm"}, "known are continue, rewarm, restart"),
        ({"learning_rate": "restart"}, "pass lr_scheduler"),
        ({"learning_rate": "restart", "lr_scheduler": "StepLR"}, "a LambdaLR as .* and not StepLR"),
        ({"warmup_steps": 3}, "is for learning_rate='rewarm'"),
        ({"learning_rates": {3: 0.1}}, r"rank 3, which is not among \(8, 4, 2\)"),
        ({"learning_rates": {4: 0.0}}, "above zero"),
        ({"state": "guess"}, "known are transport, reset"),
        ({"balance": "even"}, "known are keep, balanced"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_the_start(options, message):
    model = build()
    optimizer = adamw(model)
    if "lr_scheduler" in options:
        options = {**options, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}
    with pytest.raises(SettingsError, match=message):
        Squeezer(model, optimizer, SCHEDULE, **options)


def test_a_schedule_above_the_adapters_rank_is_refused():
    model = build()
    with pytest.raises(RankError, match=r"asks for rank 16, but the adapter 'default' has 8"):
        Squeezer(model, adamw(model), custom([(0, 16)], 3))


# --- ranks by layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["params", "energy=0.9", "para-rank=0.5", "stable-rank"])
def test_a_policy_chooses_under_a_budget_that_shrinks(policy):
    model = build()
    optimizer = adamw(model)
    squeezer = Squeezer(model, optimizer, SCHEDULE, policy=policy)
    sizes = [layer.out_features + layer.in_features for layer in live_adapter(model).layers.values()]
    loop(model, optimizer, squeezer, 7)
    assert squeezer.switches[0].rank_before == 8
    for done, rank in zip(squeezer.switches, (4, 2), strict=True):
        assert done.parameters_after <= rank * sum(sizes)
        assert min(done.ranks.by_layer.values()) >= 1
        if policy == "params":
            assert done.parameters_after > rank * sum(sizes) - max(sizes)
    assert len(set(squeezer.switches[0].ranks.by_layer.values())) > 1


def test_a_policy_of_your_own():
    model = build()
    optimizer = adamw(model)

    def half_of_each(spectra, rank):
        return Ranks("half", {one.name: max(one.rank // 2, 1) for one in spectra})

    squeezer = Squeezer(model, optimizer, SCHEDULE, policy=half_of_each)
    loop(model, optimizer, squeezer, 7)
    assert [one.rank for one in squeezer.switches] == [4, 2]


@pytest.mark.parametrize("policy", ["fixed=3", "size=3MB"])
def test_policies_that_say_nothing_at_a_switch(policy):
    model = build()
    with pytest.raises(RankError, match="use 'params'"):
        Squeezer(model, adamw(model), SCHEDULE, policy=policy)


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama embedding", "experts", "convolutions"])
def test_a_model_takes_on_the_ranks_of_what_is_loaded(tmp_path, kind):
    base = KINDS[kind]
    small = build(base, seed=1)
    squeezed = Squeezer(small, adamw(small), custom([(0, 4)], 5), policy="params")
    small.save_pretrained(str(tmp_path / "small"))
    model = build(base)
    follow_loaded_ranks(model)
    follow_loaded_ranks(model)
    model.load_adapter(str(tmp_path / "small"), "default", is_trainable=True)
    assert {name: spec.rank for name, spec in live_adapter(model).layers.items()} == squeezed.switches[0].ranks.by_layer
    assert torch.equal(output(model.eval(), base), output(small.eval(), base))
    model.save_pretrained(str(tmp_path / "again"))
    assert torch.equal(
        output(PeftModel.from_pretrained(base.build(), str(tmp_path / "again")).eval(), base), output(model, base)
    )


def test_what_is_of_another_model_is_still_an_error(tmp_path):
    model = build()
    follow_loaded_ranks(model)
    other = {name: value[..., :5] for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(other)


def test_a_checkpoint_without_this_adapter_changes_no_rank(tmp_path):
    model = build()
    follow_loaded_ranks(model)
    folder = make_adapter(tmp_path / "other", LLAMA, r=3)
    model.load_adapter(str(folder), "other")
    assert (live_adapter(model, "other").rank, live_adapter(model).rank) == (3, 8)


def test_zero_3_is_refused_at_the_start():
    model = build()
    trained(model)[0].ds_id = 1
    with pytest.raises(UnsupportedAdapter, match="ZeRO-3 holds its factors in pieces"):
        Squeezer(model, adamw(model), SCHEDULE)


def test_schedules_are_records():
    assert Schedule.from_json(SCHEDULE.to_json()) == SCHEDULE


def test_a_model_that_follows_can_be_copied_and_pickled(tmp_path):
    model = build()
    follow_loaded_ranks(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        small = build(r=3, lora_alpha=6)  # of the same scale
        other.load_state_dict(small.state_dict())
        assert (live_adapter(other).rank, live_adapter(model).rank) == (3, 8)
        assert torch.equal(updates(other), updates(small))


def test_the_frozen_copy_of_an_adapter_keeps_its_configuration():
    """TRL makes one under the name "ref", with the very same configuration object."""
    model = build()
    model.add_adapter("ref", model.peft_config["default"])
    assert model.peft_config["ref"] is model.peft_config["default"]
    Squeezer(model, adamw(model), custom([(0, 2)], 5))
    assert (model.peft_config["default"].r, model.peft_config["ref"].r) == (2, 8)
    assert (live_adapter(model).rank, live_adapter(model, "ref").rank) == (2, 8)
