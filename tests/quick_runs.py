"""Settings of runs of a few steps on tiny models, and what they wrote."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_hub import server  # noqa: F401
from tiny import CHAT_TEMPLATE, save_tiny_bert, save_tiny_llama

from lora_squeeze.sections import build
from lora_squeeze.training.settings import RunSettings, check

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny_llama(folder / "llama", template=CHAT_TEMPLATE)
    save_tiny_bert(folder / "bert")
    return folder


@pytest.fixture
def quick(models):
    """Settings of a run of few steps, and what differs from them."""

    def settings(source: str = "builtin:sums:40", base: str = "llama", **sections) -> RunSettings:
        document = {
            "model": {"model": str(models / base), "lora_rank": 4, "device": "cpu"},
            "training": {
                "max_steps": 6,
                "batch_size": 4,
                "save_every": 2,
                "lr": 5e-3,
            },
            "data": {"source": source},
            "logging": {"log_every": 1},
        }
        for name, section in sections.items():
            document[name] = {**document.get(name, {}), **section}
        built = build(RunSettings, document, "test")
        if built.method == "grpo":
            document["training"] = {"group_size": 4, "max_tokens": 3, **document["training"]}
            built = build(RunSettings, document, "test")
        check(built, "test")
        return built

    return settings


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)
