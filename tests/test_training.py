"""Runs on tiny real models: every method trains, what is saved loads, a killed run goes on as if nothing had been."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quick_runs import WEIGHTS, models, quick, weights  # noqa: F401
from test_hub import server  # noqa: F401

from lora_squeeze import open_adapter
from lora_squeeze.attaching import attach_adapter, labels_of_adapter
from lora_squeeze.errors import DataError, OutputError, TrainingError
from lora_squeeze.models import load_model, load_tokenizer
from lora_squeeze.report.training import metrics_line
from lora_squeeze.sections import build, document_of, to_toml
from lora_squeeze.training import run as running
from lora_squeeze.training.folder import RunFolder
from lora_squeeze.training.record import read_record
from lora_squeeze.training.run import train
from lora_squeeze.training.settings import RunSettings

METHODS = {
    "sft": ("builtin:sums:40", "llama", "eval_loss"),
    "sft on texts": ("builtin:texts:40", "llama", "eval_mean_token_accuracy"),
    "sft on chats": ("builtin:chat:40", "llama", "eval_loss"),
    "sft on choices": ("builtin:choices:40", "llama", "eval_loss"),
    "classify": ("builtin:sentiment:40", "bert", "eval_accuracy"),
    "classify with a causal model": ("builtin:sentiment:40", "llama", "eval_accuracy"),
    "dpo": ("builtin:preferences:40", "llama", "eval_rewards/accuracies"),
    "grpo": ("builtin:arithmetic:40", "llama", "eval_reward"),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_an_adapter_that_loads(name, quick, models, tmp_path):
    source, model, metric = METHODS[name]
    method = name.split()[0]
    settings = quick(source, model, training={"method": method}, data={"eval_fraction": 0.2, "max_eval_examples": 4})
    record = train(settings, tmp_path / "run")
    assert (record.method, record.steps, record.rank, record.source_rank) == (method, 6, 4, 4)
    assert record.held_out == 4
    assert metric in record.metrics
    assert record == read_record(tmp_path / "run" / "run.json")
    assert build(RunSettings, record.settings, "again") == settings
    adapter = open_adapter(record.adapter)
    assert {layer.rank for layer in adapter.layers.values()} == {4}
    labels = labels_of_adapter(record.adapter)
    assert labels == (("negative", "positive") if method == "classify" else ())
    task = "sequence-classification" if method == "classify" else "causal-lm"
    base = load_model(str(models / model), task=task, labels=labels, device="cpu")
    attach_adapter(base, record.adapter)
    load_tokenizer(record.adapter)
    if method != "grpo":  # at random, no completion of the tiny model earns anything
        assert any(tensor.any() for key, tensor in weights(Path(record.adapter)).items() if "lora_B" in key)


def test_training_learns(quick, tmp_path):
    settings = quick("builtin:sums:10", training={"max_steps": 40, "lr": 2e-2, "save_every": 0, "batch_size": 10})
    train(settings, tmp_path)
    losses = [entry["loss"] for entry in RunFolder(tmp_path).read_metrics() if "loss" in entry]
    assert len(losses) == 40
    assert losses[-1] < 0.6 * losses[0]


def test_equal_settings_give_equal_weights_and_another_seed_does_not(quick, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(quick(training={"seed": seed, "max_steps": 2}), tmp_path / name)
    a, b, c = (weights(tmp_path / name / "final") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize("mode", ["grpo", "dr_grpo", "maxrl", "own_group.shifted"])
def test_grpo_rewards_what_is_asked_for(mode, quick, tmp_path, monkeypatch):
    (tmp_path / "own_group.py").write_text(
        "def capital(completion, example): return sum(map(str.isupper, completion)) / 3\n"
        "def shifted(rewards): return rewards - rewards.mean()\n"
        "def doubled(advantages, batch): return 2 * advantages[:, None] * batch['completion_mask']\n"
    )
    monkeypatch.chdir(tmp_path)
    settings = quick(
        "builtin:arithmetic:40",
        training={"max_steps": 30, "lr": 3e-2, "group_size": 8},
        algorithm={"advantage_mode": mode, "transform_mode": "own_group.doubled" if mode == "maxrl" else "none"},
        reward={"type": "own_group.capital"},
    )
    train(settings, "run")
    rewards = [entry["reward"] for entry in RunFolder(Path("run")).read_metrics() if "reward" in entry]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


def test_a_reward_that_fails_is_named(quick, tmp_path):
    with pytest.raises(TrainingError, match=r"the reward failed with .* on the completion"):
        train(quick("builtin:arithmetic:8", reward={"type": "operator.truediv"}), tmp_path)


def test_an_advantage_of_another_shape_is_named(quick, tmp_path):
    with pytest.raises(TrainingError, match=r"made \(\) of rewards of shape \(4, 4\)"):
        train(quick("builtin:arithmetic:8", algorithm={"advantage_mode": "torch.sum"}), tmp_path)


IN_SQUEEZE = {"schedule": "equal", "target_rank": 1, "lr_after_switch": "rewarm", "rewarm_steps": 2}


def test_in_squeeze_lowers_the_rank_while_training(quick, tmp_path):
    record = train(quick(training={"max_steps": 9}, in_squeeze=IN_SQUEEZE), tmp_path / "run")
    assert (record.source_rank, record.rank) == (4, 1)
    assert open_adapter(record.adapter).rank == 1
    logged = RunFolder(tmp_path / "run").read_metrics()
    assert [(one["step"], one["squeeze/rank"]) for one in logged if "squeeze/rank" in one] == [(3, 2), (6, 1)]
    rates = {one["step"]: one["learning_rate"] for one in logged if "learning_rate" in one}
    assert rates[4] < rates[3]
    told = [metrics_line(one) for one in logged if "squeeze/rank" in one]
    assert re.fullmatch(r"rank 1  variance retained \d+\.\d\d%  update changed by \d+\.\d\d%", told[-1])


def test_in_squeeze_counts_epochs_in_steps_and_may_choose_by_layer(quick, tmp_path):
    stages = {"schedule": "4@0, 3@50%", "rank_policy": "energy=0.8", "lr_by_rank": {"3": 1e-3}}
    settings = quick("builtin:sums:16", training={"max_steps": 0, "epochs": 2.0}, in_squeeze=stages)
    record = train(settings, tmp_path / "run")
    assert record.steps == 8
    adapter = open_adapter(record.adapter)
    assert len({layer.rank for layer in adapter.layers.values()}) > 1
    assert adapter.parameters <= 3 * sum(one.in_features + one.out_features for one in adapter.layers.values())


# --- continuing -------------------------------------------------------------------------------------------------


def start(settings: RunSettings, folder: Path) -> subprocess.Popen[bytes]:
    """The run in a process of its own."""
    config = folder.with_suffix(".toml")
    config.write_text(to_toml(document_of(settings)), encoding="utf-8")
    command = [sys.executable, "-m", "lora_squeeze", "train", str(config), "--out", str(folder)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("method", "source", "stages"),
    [("sft", "builtin:sums:40", {}), ("grpo", "builtin:arithmetic:40", {}), ("sft", "builtin:sums:40", IN_SQUEEZE)],
)
def test_a_run_that_is_killed_goes_on_to_the_same_weights(method, source, stages, quick, tmp_path):
    settings = quick(
        source,
        training={"method": method, "max_steps": 12, "save_every": 3, "lr_schedule": "linear", "warmup_steps": 2},
        lora={"dropout": 0.1},
        in_squeeze=stages,
        **({"reward": {"type": "regex", "pattern": "[A-Z]"}} if method == "grpo" else {}),
    )
    train(settings, tmp_path / "unbroken")
    process = start(settings, tmp_path / "killed")
    folder = RunFolder(tmp_path / "killed")
    deadline = time.monotonic() + 120
    while not list(folder.checkpoints.glob("checkpoint-*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert folder.finished() is None
    # What a kill leaves behind while a checkpoint is being written:
    (folder.checkpoints / "checkpoint-99").mkdir()
    record = train(settings, tmp_path / "killed")
    assert record.steps == 12
    unbroken, killed = weights(tmp_path / "unbroken" / "final"), weights(tmp_path / "killed" / "final")
    assert all(torch.equal(unbroken[key], killed[key]) for key in unbroken)
    steps = [entry["step"] for entry in folder.read_metrics() if "loss" in entry]
    assert steps == list(range(1, 13))
    assert not (folder.checkpoints / "checkpoint-99").exists()


@pytest.mark.parametrize("sections", [{}, {"in_squeeze": {"schedule": "4@0, 2@50%"}}, {"training": {"epochs": 1.3}}])
def test_a_run_that_ended_after_its_last_step_trains_no_further(sections, quick, tmp_path, monkeypatch):
    steps = {"max_steps": 4} if "training" not in sections else {"max_steps": None}
    base = quick("builtin:sums:15", data={"eval_fraction": 0.2}, in_squeeze=sections.get("in_squeeze", {}))
    settings = replace(base, training=replace(base.training, **steps, **sections.get("training", {})))
    unbroken = train(settings, tmp_path / "unbroken")
    with monkeypatch.context() as interrupted:
        interrupted.setattr(running, "_save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "broken")
    record = train(settings, tmp_path / "broken")
    assert (record.steps, record.rank, record.seconds) == (4, unbroken.rank, 0.0)
    measured = {key for key in unbroken.metrics if "loss" in key or "accuracy" in key}
    assert {"loss", "train_loss", "eval_loss"} <= measured
    assert {key: record.metrics[key] for key in measured} == {key: unbroken.metrics[key] for key in measured}
    one, other = weights(tmp_path / "unbroken" / "final"), weights(tmp_path / "broken" / "final")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_finished_run_is_not_repeated(quick, tmp_path):
    record = train(quick(), tmp_path)
    written = (tmp_path / "final" / WEIGHTS).stat().st_mtime_ns
    assert train(quick(logging={"log_every": 3}), tmp_path) == record
    assert (tmp_path / "final" / WEIGHTS).stat().st_mtime_ns == written
    assert train(quick(), tmp_path, overwrite=True).started >= record.finished
    assert (tmp_path / "final" / WEIGHTS).stat().st_mtime_ns > written


def test_other_settings_do_not_continue_a_run(quick, tmp_path):
    train(quick(), tmp_path)
    with pytest.raises(TrainingError, match=r"begun with \[training\] lr = 0\.005, and now it is 0\.001"):
        train(quick(training={"lr": 1e-3}), tmp_path)
    with pytest.raises(TrainingError, match=r"\[data\] eval_fraction = the default, and now it is 0\.5"):
        train(quick(data={"eval_fraction": 0.5}), tmp_path)


def test_a_run_that_failed_before_anything_was_made_may_begin_with_other_settings(quick, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        train(quick("nowhere.jsonl"), tmp_path)
    assert train(quick(training={"max_steps": 1}), tmp_path).steps == 1


def test_a_folder_of_something_else_is_left_alone(quick, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not the folder of a run"):
            train(quick(), tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_run_may_go_on_from_another_s_checkpoint(quick, tmp_path):
    train(quick(training={"max_steps": 4}), tmp_path / "four")
    six = train(quick(training={"max_steps": 6}, resume={"from": str(tmp_path / "four")}), tmp_path / "six")
    train(quick(training={"max_steps": 6}), tmp_path / "direct")
    assert six.steps == 6
    resumed, direct = weights(tmp_path / "six" / "final"), weights(tmp_path / "direct" / "final")
    assert all(torch.equal(resumed[key], direct[key]) for key in direct)
    with pytest.raises(TrainingError, match=r"checkpoint-4: 4 steps were trained already, and these settings say 3"):
        train(quick(training={"max_steps": 3}, resume={"from": str(tmp_path / "four")}), tmp_path / "three")
    with pytest.raises(TrainingError, match=r"four/.*/checkpoint-4: .* its adapter has rank 4, and these settings 2;"):
        train(quick(model={"lora_rank": 2}, resume={"from": str(tmp_path / "four")}), tmp_path / "two")
    with pytest.raises(TrainingError, match="has no checkpoint"):
        train(quick(resume={"from": str(tmp_path / "nowhere")}), tmp_path / "none")


def test_cont_squeeze_goes_on_at_the_lower_rank(quick, tmp_path):
    first = train(quick(), tmp_path / "first")
    settings = replace(quick(), model=replace(quick().model, lora_rank=0, adapter=first.adapter, squeeze_to=2))
    record = train(settings, tmp_path / "second")
    assert (record.source_rank, record.rank) == (2, 2)
    squeezed, final = weights(tmp_path / "second" / "squeezed"), weights(tmp_path / "second" / "final")
    assert any(not torch.equal(squeezed[key], final[key]) for key in final)
    assert open_adapter(record.adapter).rank == 2


# --- what does not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "source", "said"),
    [
        ("sft", "builtin:sentiment", "kind 'classes', and method sft needs .*method = \"classify\""),
        ("dpo", "builtin:texts", "kind 'texts', and method dpo needs preferences.*method = \"sft\""),
        ("classify", "builtin:choices", "needs classes"),
        ("grpo", "builtin:chat", "needs answers or completions"),
    ],
)
def test_data_that_do_not_fit_the_method_say_which_does(method, source, said, quick, tmp_path):
    with pytest.raises(DataError, match=said):
        train(quick(source, training={"method": method}), tmp_path)


def test_one_class_is_nothing_to_learn(quick, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n')
    with pytest.raises(DataError, match="all examples have the label 'x'"):
        train(quick(str(tmp_path / "d.jsonl"), "bert", training={"method": "classify"}), tmp_path / "run")


def test_examples_that_are_too_long_are_noted(quick, tmp_path):
    rows = [{"prompt": "1" * length, "completion": "2"} for length in (3, 4, 50)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = train(quick(str(tmp_path / "d.jsonl"), training={"max_length": 10}), tmp_path / "run")
    assert record.notes == ["1 examples were left out: max_length cuts them off before anything to learn"]
    with pytest.raises(DataError, match="every example is longer than"):
        train(quick(str(tmp_path / "d.jsonl"), training={"max_length": 2}), tmp_path / "short")
