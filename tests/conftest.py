import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: nothing may be fetched

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture
def four_workers():
    """Let lora-squeeze work on four layers at once."""
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)
