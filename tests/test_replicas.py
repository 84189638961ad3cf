"""Two processes under accelerate launch: one decision, identical factors, gradients that are really synchronised."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_squeeze import open_adapter

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes saw."""
    folder = tmp_path_factory.mktemp("processes")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(TESTS / "processes_script.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_the_trainer_synchronises_gradients_in_every_stage(found):
    folder, processes = found
    for one in processes:
        assert one["trainer"]["wrapped"] == "DistributedDataParallel"
        assert one["trainer"]["ranks"] == [8, 8, 8, 4, 4, 4, 2, 2]
        assert one["trainer"]["gradients apart"] == 0.0
        assert one["trainer"]["weights apart"] == 0.0
    assert open_adapter(folder / "trainer" / "checkpoint-8").rank == 2
    assert open_adapter(folder / "trainer" / "checkpoint-4").rank == 4


@pytest.mark.parametrize("kind", ["plain", "static", "unused", "hook"])
def test_a_loop_of_ones_own_is_the_training_of_one_process(found, kind):
    for one in found[1]:
        assert one[kind]["data apart"] > 0
        assert one[kind]["gradients apart"] == 0.0
        assert one[kind]["weights apart"] == 0.0
        assert one[kind]["from one process"] < 1e-4
        assert one[kind]["rank"] == 2
        assert (one[kind]["hook calls"] >= 6) == (kind == "hook")


def test_what_process_0_finds_wrong_every_process_says(found):
    assert [one["disagreement"] for one in found[1]] == ["no rank will do"] * 2


def test_ddps_own_mixed_precision_is_refused(found):
    assert all("use torch.autocast instead" in one["mixed"] for one in found[1])


def test_factors_that_fsdp_2_has_divided(found):
    for one in (process["sharded"] for process in found[1]):
        assert one["from one process"] < 1e-4
        assert one["weights apart"] == 0.0
        assert one["rank"] == 2
        assert one["same parameters"]
        assert one["sharded"]
        assert one["local rows"] == [1, 16]  # of A (2, 32) and B (32, 2), half of the rows each
