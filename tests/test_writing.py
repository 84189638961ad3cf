"""What has been written goes to the disk while more is computed; a disk that fails then is noticed."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file

from lora_squeeze.errors import OutputError
from lora_squeeze.formats import writing
from lora_squeeze.formats.tensors import TensorSpec
from lora_squeeze.formats.writing import Block, write_safetensors

COUNT = 24


def blocks() -> list[Block]:
    """Four KiB each."""
    return [
        Block(
            (TensorSpec(f"{place:02}", "F32", (1024,), 4096),), lambda place=place: [torch.full((1024,), float(place))]
        )
        for place in range(COUNT)
    ]


@pytest.fixture
def flushes(monkeypatch):
    """What os.fsync does at each of its calls, and how often it was called; files are flushed after 8 KiB."""
    monkeypatch.setattr(writing, "_FLUSHED_AT", 8192)
    calls: list[int] = []
    failing: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) in failing:
            raise OSError(errno.EIO, "the disk has failed")

    monkeypatch.setattr(os, "fsync", fsync)
    return calls, failing


def test_a_file_is_flushed_while_it_is_written(tmp_path, flushes):
    calls, _ = flushes
    write_safetensors(tmp_path / "file", blocks(), {})
    assert 2 <= len(calls) <= 1 + COUNT * 4096 // 8192
    assert all(tensor.eq(float(key)).all() for key, tensor in load_file(tmp_path / "file").items())


def test_a_small_file_is_flushed_once(tmp_path, flushes):
    calls, _ = flushes
    write_safetensors(tmp_path / "file", blocks()[:1], {})
    assert len(calls) == 1


@pytest.mark.parametrize("which", [1, 2])
def test_a_failure_beside_the_work_is_not_lost(tmp_path, flushes, which):
    _, failing = flushes
    failing.append(which)
    with pytest.raises(OutputError, match="cannot be written: the disk has failed"):
        write_safetensors(tmp_path / "file", blocks(), {})
