"""The campaigns in examples/ run as they are written, at fewer steps."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_squeeze.campaign.launch import begin, run_campaign
from lora_squeeze.campaign.spec import campaign_of
from lora_squeeze.sections import read_toml
from lora_squeeze.training.folder import RunFolder

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder in which the examples' model lies where they look for it."""
    folder = tmp_path_factory.mktemp("examples")
    command = [sys.executable, str(EXAMPLES / "tiny_arithmetic.py"), "build/tiny-arithmetic", "--steps", "300"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=environment).stdout
    assert "84,032 parameters" in said
    return folder


def shortened(name: str, *, steps: int, seeds: list[int], **changes: dict[str, Any]) -> Any:
    document = read_toml(EXAMPLES / name)
    assert len(document["campaign"]["seeds"]) == 2
    assert len(document["campaign"]["conditions"]) >= 2
    document["campaign"] |= {"max_steps": steps, "seeds": seeds, "parallel": False}
    for section, keys in changes.items():
        document[section] |= keys
    return campaign_of(document, name)


def test_grpo_earns_more_than_before(here, monkeypatch):
    monkeypatch.chdir(here)
    campaign = shortened("grpo.toml", steps=25, seeds=[42], logging={"log_every": 1})
    manifest = run_campaign(begin(campaign, here / "grpo"))
    assert [entry.status for entry in manifest.runs] == ["finished"] * 2
    assert manifest.squeeze.recommended_rank > 0
    for entry in manifest.runs:
        rewards = [one["reward"] for one in RunFolder(here / "grpo" / entry.folder).read_metrics() if "reward" in one]
        assert sum(rewards[-8:]) / 8 > sum(rewards[:8]) / 8
        assert "eval_reward" in entry.metrics


def test_sft_ends_at_the_ranks_that_it_asks_for(here, monkeypatch):
    monkeypatch.chdir(here)
    campaign = shortened("sft.toml", steps=60, seeds=[42])
    manifest = run_campaign(begin(campaign, here / "sft"))
    assert [(entry.status, entry.rank) for entry in manifest.runs] == [
        ("finished", 32),
        ("finished", 4),
        ("finished", 4),
    ]
    assert manifest.squeeze.run == manifest.runs[0].name
    assert all("eval_mean_token_accuracy" in entry.metrics for entry in manifest.runs)
