"""Runs that report to W&B: one W&B run each, with the last evaluation, however often they were interrupted."""

from pathlib import Path

import pytest
import wandb
from quick_runs import models, quick  # noqa: F401
from test_campaign_wandb import records
from test_hub import server  # noqa: F401

from lora_squeeze.errors import TrainingError
from lora_squeeze.training import run as running
from lora_squeeze.training.folder import RunFolder
from lora_squeeze.training.run import train


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # it keeps the folder and the environment that it first saw
    yield
    wandb.teardown()


def reported(folder: Path) -> list[tuple[str, tuple[str, ...], set[str]]]:
    """Id, tags and logged keys of every W&B run below a folder."""
    runs = []
    for file in sorted(folder.rglob("*.wandb")):
        found = list(records(file))
        (run,) = {one.run.run_id: one.run for one in found if one.WhichOneof("record_type") == "run"}.values()
        keys = {item.key or "/".join(item.nested_key) for one in found for item in one.history.item}
        runs.append((run.run_id, tuple(run.tags), keys))
    return runs


def test_the_last_evaluation_is_reported_and_tags_keep_their_commas(quick, tmp_path):
    logging = {"wandb_project": "p", "wandb_tags": ["sft~lora_rank=4,lr=0.01", "b"]}
    record = train(quick(data={"eval_fraction": 0.2}, logging=logging), tmp_path / "run")
    assert "eval_loss" in record.metrics
    ((name, tags, keys),) = reported(tmp_path)
    assert set(tags) == {"sft~lora_rank=4,lr=0.01", "b"}
    assert {"train/loss", "eval/loss"} <= keys
    assert name == RunFolder(tmp_path / "run").wandb.read_text().strip()


def test_a_run_that_goes_on_is_the_same_run_to_wandb_and_one_begun_anew_is_not(quick, tmp_path, monkeypatch):
    settings = quick(logging={"wandb_project": "p"})
    with monkeypatch.context() as interrupted:
        interrupted.setattr(running, "_save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "run")
    train(settings, tmp_path / "run")
    assert len({name for name, *_ in reported(tmp_path)}) == 1
    train(settings, tmp_path / "run", overwrite=True)
    assert len({name for name, *_ in reported(tmp_path)}) == 2


def test_what_wandb_refuses_is_said_with_what_to_do(quick, tmp_path):
    with pytest.raises(TrainingError, match=r"wandb_project = 'a/b': W&B cannot .* WANDB_MODE=offline") as caught:
        train(quick(logging={"wandb_project": "a/b"}), tmp_path / "run")
    assert "\n" not in str(caught.value)
