"""SHA-256 of files: in one go, and along the way, of what is read of them anyway."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lora_squeeze.errors import AdapterError
from lora_squeeze.formats.hashing import RunningHash, identity_of, sha256_of_file
from lora_squeeze.formats.tensors import read_safetensors

CONTENT = bytes(range(256)) * 10_000


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def running(path: Path, content: bytes) -> RunningHash:
    path.write_bytes(content)
    with path.open("rb") as file:
        return RunningHash(path, identity_of(file.fileno()))


def test_it_is_that_of_sha256sum(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    assert sha256_of_file(tmp_path / "file") == digest(CONTENT)
    with pytest.raises(AdapterError, match="nowhere"):
        sha256_of_file(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=str(tmp_path)):
        sha256_of_file(tmp_path)


@pytest.mark.parametrize("content", [b"", b"a", CONTENT], ids=["empty", "one byte", "long"])
def test_nobody_has_to_read(tmp_path, content):
    hashed = running(tmp_path / "file", content)
    hashed.follow()
    assert hashed.result() == hashed.result() == digest(content)


@given(st.binary(max_size=300), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300))))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_may_come_in_any_order_overlap_and_leave_gaps(tmp_path, content, pieces):
    hashed = running(tmp_path / "file", content)
    hashed.follow()
    for start, end in pieces:
        hashed.hand_in(min(start, len(content)), memoryview(content)[start:end])
    assert hashed.result() == digest(content)


def test_what_is_handed_in_is_hashed_and_not_read_again(tmp_path):
    hashed = running(tmp_path / "file", CONTENT)
    hashed.follow()
    other = bytes(1000)
    hashed.hand_in(0, memoryview(other))
    hashed.hand_in(1000, memoryview(other))
    assert hashed.result() == digest(other + other + CONTENT[2000:])


def test_before_it_follows_nothing_is_hashed(tmp_path):
    hashed = running(tmp_path / "file", CONTENT)
    hashed.hand_in(0, memoryview(bytes(1000)))
    assert hashed.result() == digest(CONTENT)


def test_many_threads_hand_in_at_once(tmp_path):
    hashed = running(tmp_path / "file", CONTENT)
    hashed.follow()
    pieces = [(start, memoryview(CONTENT)[start : start + 5000]) for start in range(0, len(CONTENT), 5000)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda piece: hashed.hand_in(*piece), pieces))
    assert hashed.result() == digest(CONTENT)


@pytest.mark.parametrize("change", ["written to", "cut", "gone"])
def test_a_file_that_changes_is_an_error(tmp_path, change):
    path = tmp_path / "file"
    hashed = running(path, CONTENT)
    hashed.follow()
    hashed.hand_in(0, memoryview(CONTENT))
    if change == "written to":
        os.utime(path, ns=(1, 1))
    elif change == "cut":
        os.truncate(path, 1000)
    else:
        path.unlink()
    with pytest.raises(AdapterError, match=str(path)):
        hashed.result()


@pytest.mark.parametrize("order", [list("abc"), list("cab"), ["b"], []], ids=str)
def test_tensors_that_are_read_are_hashed_along(tmp_path, order):
    path = tmp_path / "file.safetensors"
    save_file({key: torch.randn(50, 7) for key in "abc"}, path)
    file = read_safetensors(path)
    file.hash_along()
    for key in order:
        file.read(key)
    assert file.sha256() == digest(path.read_bytes())
