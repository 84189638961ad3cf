"""SqueezeCallback in transformers' Trainer and in TRL: ranks, checkpoints, resuming, logs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from trainer_script import SCHEDULE, STEPS, model, trainer
from transformers import TrainerCallback

from lora_squeeze import open_adapter
from lora_squeeze.annealing.callback import SqueezeCallback
from lora_squeeze.annealing.live import live_adapter
from lora_squeeze.annealing.schedule import custom, parse_schedule
from lora_squeeze.errors import RankError, SettingsError

RANKS = [8, 8, 8, 4, 4, 4, 2, 2, 2]  # after so many steps
TESTS = Path(__file__).parent


class Recorder(TrainerCallback):
    """What the Trainer's loggers get."""

    def __init__(self):
        self.logs, self.rates = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def squeezing(one):
    """A Trainer's SqueezeCallback."""
    return next(callback for callback in one.callback_handler.callbacks if isinstance(callback, SqueezeCallback))


def weights(one):
    return [parameter.detach().clone() for parameter in one.parameters() if parameter.requires_grad]


def equal(one, two):
    return all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The whole training, without interruption, and what its loggers got."""
    recorder = Recorder()
    folder = tmp_path_factory.mktemp("unbroken")
    one = trainer(folder, recorder)
    one.train()
    return one, folder, recorder


def test_every_checkpoint_loads_at_its_true_rank(unbroken):
    _, folder, _ = unbroken
    for step in range(1, STEPS + 1):
        checkpoint = folder / f"checkpoint-{step}"
        assert open_adapter(checkpoint).rank == RANKS[step]
        loaded = PeftModel.from_pretrained(model().unload(), str(checkpoint))
        assert {module.r["default"] for module in loaded.modules() if hasattr(module, "lora_A")} == {RANKS[step]}
    end = PeftModel.from_pretrained(model().unload(), str(folder / f"checkpoint-{STEPS}"), is_trainable=True)
    assert equal(weights(end), weights(unbroken[0].model))


def test_switches_are_logged_as_numbers(unbroken):
    one, _, recorder = unbroken
    callback = squeezing(one)
    assert [(done.step, done.rank_before, done.rank) for done in callback.switches] == [(3, 8, 4), (6, 4, 2)]
    expected = [(done.step, done.metrics()) for done in callback.switches]
    logged = [(step, logs) for step, logs in recorder.logs if "squeeze/rank" in logs]
    assert [(step, {key: logs[key] for key in logs if key != "epoch"}) for step, logs in logged] == expected
    history = [entry for entry in one.state.log_history if "squeeze/rank" in entry]
    assert [(entry["step"], entry["squeeze/rank"]) for entry in history] == [(3, 4), (6, 2)]
    assert len([entry for entry in one.state.log_history if "loss" in entry]) == STEPS


@pytest.mark.parametrize("step", [2, 3, 5, 6])
def test_resuming_in_any_stage_reaches_the_weights_of_the_unbroken_run(unbroken, tmp_path, step):
    one, folder, recorder = unbroken
    again = Recorder()
    resumed = trainer(tmp_path, again)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert equal(weights(resumed.model), weights(one.model))
    assert again.rates == recorder.rates[step:]
    assert live_adapter(resumed.model).rank == 2
    assert open_adapter(tmp_path / f"checkpoint-{STEPS}").rank == 2


def test_resuming_after_sigkill_reaches_the_weights_of_the_unbroken_run(unbroken, tmp_path):
    script = [sys.executable, str(TESTS / "trainer_script.py"), str(tmp_path), "--kill-after", "4"]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in range(1, 5)]
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(resumed.model), weights(unbroken[0].model))


def test_spellings_take_steps_from_the_trainer_and_ranks_from_the_adapter(tmp_path):
    one = trainer(tmp_path, schedule="minimum=1", options={"target": 2})
    one.train()
    assert squeezing(one).squeezer.schedule == parse_schedule("minimum=1", source=8, target=2, steps=STEPS)
    saved = json.loads((tmp_path / f"checkpoint-{STEPS - 1}" / "trainer_state.json").read_text())
    assert "minimum=1" in saved["stateful_callbacks"]["SqueezeSchedule"]["attributes"]["schedule"]
    resumed = trainer(
        tmp_path, schedule="minimum=1", options={"target": 2}, restore_callback_states_from_checkpoint=True
    )
    # Even a script that builds its model at the checkpoint's rank goes on with the same schedule.
    squeezing(resumed)._source = 2
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS - 1}"))
    assert equal(weights(resumed.model), weights(one.model))


def test_post_squeeze_happens_before_the_last_save(tmp_path):
    one = trainer(tmp_path, schedule="post", options={"target": 1}, save_steps=STEPS)
    one.train()
    assert open_adapter(tmp_path / f"checkpoint-{STEPS}").rank == 1


def test_cont_squeeze_warms_up_at_a_rate_of_its_own(tmp_path):
    recorder = Recorder()
    one = trainer(
        tmp_path,
        recorder,
        schedule="cont=4",
        options={"target": 2, "learning_rate": "rewarm", "warmup_steps": 2, "learning_rates": {2: 3e-2}},
        lr_scheduler_type="constant_with_warmup",
    )
    one.train()
    assert recorder.rates == pytest.approx([0, 5e-3, 1e-2, 1e-2, 1.5e-2, 3e-2, 3e-2, 3e-2])
    logged = [logs["learning_rate"] for _, logs in recorder.logs if "learning_rate" in logs]
    assert logged == pytest.approx(recorder.rates)


def test_a_curve_that_begins_anew_in_every_stage(tmp_path):
    recorder = Recorder()
    one = trainer(tmp_path, recorder, options={"learning_rate": "restart"}, warmup_steps=0)
    one.train()
    # linear from 1e-2 to 0 over each stage: 3, 3 and 2 steps
    thirds, halves = [1, 1 - 3 / 8, 1 - 5 / 8], [1, 1 - 4 / 8]
    assert [rate * 100 for rate in recorder.rates] == pytest.approx([*thirds, *thirds, *halves])


def test_the_best_checkpoint_comes_back_at_its_own_rank(tmp_path, caplog):
    one = trainer(
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="loss",
        learning_rate=10.0,  # the first checkpoint is the best one
    )
    one.train()
    assert one.state.best_global_step < 3
    assert live_adapter(one.model).rank == 8
    assert "may bring back a checkpoint of an earlier stage" in caplog.text


def test_a_training_that_stops_early_says_at_which_rank(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    trainer(tmp_path, Stop()).train()
    assert "stopped at step 4 of 8, at rank 4; rank 2 was not reached" in caplog.text


def test_each_switch_is_a_line_in_the_log(tmp_path, caplog):
    caplog.set_level("INFO", "lora_squeeze")
    trainer(tmp_path, schedule="post", options={"target": 4}, max_steps=1, save_steps=9).train()
    (line,) = [record.message for record in caplog.records if "step 1: rank" in record.message]
    assert "rank 8 → 4" in line
    assert "of the variance retained, the update changes by" in line


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("minimum",), SettingsError, "needs target=RANK"),
        ((custom([(0, 8)], 3), {"target": 2}), SettingsError, "a Schedule has its ranks"),
        (("8@0", {"learning_rate": "hot"}), SettingsError, "known are continue, rewarm, restart"),
        (("8@0", {"policy": "best"}), RankError, "unknown policy 'best'"),
        (("8@0", {"state": "guess"}), SettingsError, "known are transport, reset"),
        (("8@0", {"balance": "even"}), SettingsError, "known are keep, balanced"),
    ],
)
def test_mistakes_are_told_before_the_training(arguments, error, message):
    schedule, *rest = arguments
    with pytest.raises(error, match=message):
        SqueezeCallback(schedule, **(rest[0] if rest else {}))


def test_schedules_are_what_the_script_uses():
    assert [parse_schedule(SCHEDULE, steps=STEPS).rank_at(step) for step in range(STEPS + 1)] == RANKS
