"""What tests of campaigns share: a tiny model, a campaign's TOML, and how to begin one."""

from pathlib import Path

import pytest
from tiny import save_tiny_llama

from lora_squeeze.campaign.launch import begin
from lora_squeeze.campaign.manifest import Manifest
from lora_squeeze.campaign.spec import campaign_of
from lora_squeeze.documents import parse_toml

__all__ = ["model", "started", "statuses", "text"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def text(model):
    """A campaign's TOML: what stands in [campaign], its conditions, and further sections."""

    def written(keys: str = "", *conditions: str, more: str = "", training: str = "", source: str = "builtin:sums:20"):
        tables = "".join(f"[[campaign.conditions]]\n{one}\n" for one in conditions)
        return f"""
[campaign]
seeds = [1, 2]
max_steps = 3
{keys}
{tables}
[model]
model = "{model}"
lora_rank = 4
device = "cpu"
[training]
batch_size = 4
lr = 5e-3
save_every = 1
{training}
[data]
source = "{source}"
{more}
"""

    return written


def started(text: str, folder: Path) -> Path:
    return begin(campaign_of(parse_toml(text), "campaign.toml"), folder)


def statuses(manifest: Manifest) -> list[str]:
    return [entry.status for entry in manifest.runs]
