import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: nothing may be fetched

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


# What PEFT and transformers say about adapters that are odd on purpose.
EXPECTED_WARNINGS = [
    "ignore:.*keys did not match any targeted module",
    "ignore:.*LoRA tensor.s. have invalid shape",
    "ignore:.*is_gradient_checkpointing",
    "ignore:Setting .save_embedding_layers. to .True.",
    "ignore:LoRA adapter added to ConvNd layer with groups",
]


def pytest_configure(config):
    for line in EXPECTED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture
def four_workers():
    """Let lora-squeeze work on four layers at once."""
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)
