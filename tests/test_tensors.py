"""Streaming safetensors: what safetensors.torch writes is read, what is written safetensors.torch reads."""

import json
import os
import struct

import pytest
import torch
from raw_tensors import FLOATS, NAMES, OTHERS, raw, spec
from safetensors.torch import load_file, save_file

from lora_squeeze.errors import AdapterError
from lora_squeeze.formats.tensors import (
    DTYPES,
    dtype_name,
    read_safetensors,
)
from lora_squeeze.formats.writing import Block, write_safetensors


def test_the_dtypes_of_factors():
    assert DTYPES == FLOATS
    assert {dtype_name(dtype) for dtype in FLOATS.values()} == set(FLOATS)


def test_dtype_name_refuses_other_dtypes():
    with pytest.raises(KeyError):
        dtype_name(torch.int64)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (2, 3, 1, 2)], ids=str)
def test_what_safetensors_wrote_is_read(tmp_path, dtype, shape):
    tensors = {"first": torch.randn(shape).to(dtype), "sécond": torch.randn(7).to(dtype)}
    save_file(tensors, tmp_path / "file", metadata={"a": "b", "ü": "\n"})

    file = read_safetensors(tmp_path / "file")

    assert file.metadata == {"a": "b", "ü": "\n"}
    assert dict(file.tensors) == {key: spec(key, tensor) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        read = file.read(key)
        assert read.dtype == dtype
        assert torch.equal(read, tensor)


@pytest.mark.parametrize("dtype", {**FLOATS, **OTHERS}.values(), ids={**FLOATS, **OTHERS})
def test_bytes_of_every_dtype_are_read_and_written(tmp_path, dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    save_file({"key": tensor}, tmp_path / "first")
    source = read_safetensors(tmp_path / "first")
    assert b"".join(source.chunks("key")) == raw(tensor)

    write_safetensors(tmp_path / "second", [Block((source.tensors["key"],), lambda: [source.chunks("key")])], {})

    copy = load_file(tmp_path / "second")["key"]
    assert copy.dtype == dtype
    assert copy.shape == tensor.shape
    assert raw(copy) == raw(tensor)


def test_a_large_tensor_is_read_in_several_chunks(tmp_path):
    tensor = torch.arange(700_000, dtype=torch.float32)
    save_file({"key": tensor}, tmp_path / "file")
    chunks = list(read_safetensors(tmp_path / "file").chunks("key"))
    assert len(chunks) > 1
    assert b"".join(chunks) == raw(tensor)


@pytest.mark.parametrize("dtype", OTHERS.values(), ids=OTHERS)
def test_reading_a_factor_of_another_dtype_is_an_error(tmp_path, dtype):
    save_file({"key": torch.zeros(4).to(dtype)}, tmp_path / "file")
    with pytest.raises(AdapterError, match=rf"'key' has dtype {NAMES[dtype]}"):
        read_safetensors(tmp_path / "file").read("key")


# --- damaged and changing files ---------------------------------------------------------------------------------


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "file"
    save_file({"key": torch.zeros(4)}, path)
    file = read_safetensors(path)
    save_file({"key": torch.ones(4)}, tmp_path / "other")
    (tmp_path / "other").replace(path)
    with pytest.raises(AdapterError, match="changed while it was being read"):
        file.read("key")
    with pytest.raises(AdapterError, match="changed while it was being read"):
        list(file.chunks("key"))


def test_a_file_that_is_written_to_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "file"
    save_file({"key": torch.zeros(4)}, path)
    file = read_safetensors(path)
    assert torch.equal(file.read("key"), torch.zeros(4))
    with path.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\1\1\1\1")
    os.utime(path, ns=(1, 1))  # whatever the clock's resolution
    with pytest.raises(AdapterError, match="changed while it was being read"):
        file.read("key")


def test_a_file_that_shrinks_or_goes_is_an_error_and_no_crash(tmp_path):
    path = tmp_path / "file"
    save_file({"key": torch.zeros(4000)}, path)
    file = read_safetensors(path)
    os.truncate(path, 1000)
    with pytest.raises(AdapterError, match="file"):
        file.read("key")
    path.unlink()
    with pytest.raises(AdapterError, match="'key'"):
        file.read("key")


def header(content: dict, data: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


DAMAGED = {
    "empty": b"",
    "half a length": b"\1\2\3",
    "no header": struct.pack("<Q", 10),
    "a header longer than the file": struct.pack("<Q", 1 << 60) + b"{}",
    "not JSON": struct.pack("<Q", 2) + b"{]",
    "not text": struct.pack("<Q", 2) + b"\xff\xff",
    "a list": struct.pack("<Q", 2) + b"[]",
    "too short": header({"key": entry(shape=(2,), offsets=(0, 8))}, b"1234"),
    "too long": header({"key": entry()}, b"12345678"),
    "shape and size that differ": header({"key": entry(shape=(3,))}, b"1234"),
    "overlapping": header({"key": entry(), "other": entry()}, b"1234"),
    "a gap": header({"key": entry(), "other": entry(offsets=(8, 12))}, b"123412341234"),
    "negative offsets": header({"key": entry(offsets=(-4, 0))}, b"1234"),
    "a negative shape": header({"key": entry(shape=(-1,))}, b"1234"),
    "an unknown dtype": header({"key": entry(dtype="F33")}, b"1234"),
    "metadata of numbers": header({"__metadata__": {"a": 1}, "key": entry()}, b"1234"),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(AdapterError, match=str(tmp_path / "file")):
        read_safetensors(tmp_path / "file")


def test_a_missing_file_or_a_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(AdapterError, match=str(tmp_path / "nowhere")):
        read_safetensors(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=str(tmp_path)):
        read_safetensors(tmp_path)
