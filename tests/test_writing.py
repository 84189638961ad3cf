"""Streaming safetensors out: safetensors reads what was written, in little memory, and a disk that fails is noticed."""

import errno
import os
import shutil
import struct
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_tensors import FLOATS, blocks, spec
from safetensors import safe_open
from safetensors.torch import load_file

from lora_squeeze.errors import AdapterError, OutputError
from lora_squeeze.formats import writing
from lora_squeeze.formats.tensors import (
    TensorSpec,
    read_safetensors,
)
from lora_squeeze.formats.writing import Block, safetensors_size, write_safetensors


def test_safetensors_reads_what_was_written(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "transposed": torch.randn(4, 3).T,
        "strided": torch.arange(20.0)[::3],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "half": torch.randn(3, 3).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "odd": torch.arange(3, dtype=torch.uint8),
        "ünï": torch.randn(2),
    }
    write_safetensors(tmp_path / "file", blocks(tensors), {"format": "pt", "näme": 'a "quoted" \\ text'})

    read = load_file(tmp_path / "file")
    assert set(read) == set(tensors)
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor)
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "näme": 'a "quoted" \\ text'}


def test_a_block_may_hold_several_tensors_and_pieces(tmp_path):
    pair = [torch.randn(4, 3), torch.randn(5, 4).to(torch.bfloat16)]

    def pieces() -> Iterator[bytes]:
        yield b"\1\2"
        yield b"\3"

    block = Block((spec("A", pair[0]), spec("B", pair[1])), lambda: pair)
    loose = Block((TensorSpec("loose", "U8", (3,), 3),), lambda: [pieces()])
    write_safetensors(tmp_path / "file", [loose, block], {})
    read = load_file(tmp_path / "file")
    assert torch.equal(read["A"], pair[0])
    assert torch.equal(read["B"], pair[1])
    assert read["loose"].tolist() == [1, 2, 3]


def test_a_file_without_tensors(tmp_path):
    write_safetensors(tmp_path / "file", [], {"format": "pt"})
    assert load_file(tmp_path / "file") == {}
    assert read_safetensors(tmp_path / "file").metadata == {"format": "pt"}


def test_every_tensor_is_aligned_to_its_own_items(tmp_path):
    sizes = [torch.uint8, torch.float64, torch.bfloat16, torch.float32, torch.uint8, torch.float64, torch.float16]
    tensors = {str(place): torch.ones(3).to(dtype) for place, dtype in enumerate(sizes)}
    write_safetensors(tmp_path / "file", blocks(tensors), {"x": "odd"})
    file = read_safetensors(tmp_path / "file")
    (length,) = struct.unpack("<Q", (tmp_path / "file").read_bytes()[:8])
    assert length % 8 == 0
    assert all(file.offsets[key] % tensor.element_size() == 0 for key, tensor in tensors.items())
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in load_file(tmp_path / "file").items())


def test_the_size_is_known_before(tmp_path):
    # The header spells the offsets out, so its length depends on the order in which the tensors lie.
    dtypes = [torch.uint8, torch.bfloat16, torch.float32, torch.float64]
    tensors = {f"ü{place}": torch.ones(9 + 3 * place).to(dtypes[place % 4]) for place in range(40)}
    write_safetensors(tmp_path / "file", blocks(tensors), {"format": "pt"})
    assert (tmp_path / "file").stat().st_size == safetensors_size(blocks(tensors), {"format": "pt"})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda key: key != "__metadata__"),
        st.tuples(st.sampled_from(list(FLOATS.values())), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    ),
    st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")), max_size=3),
)
def test_any_keys_shapes_and_metadata_make_the_round_trip(tmp_path, shapes, metadata):
    tensors = {key: torch.randn(shape).to(dtype) for key, (dtype, shape) in shapes.items()}
    (tmp_path / "file").unlink(missing_ok=True)

    write_safetensors(tmp_path / "file", blocks(tensors), metadata)

    by_safetensors, own = load_file(tmp_path / "file"), read_safetensors(tmp_path / "file")
    assert set(by_safetensors) == set(own.tensors) == set(tensors)
    assert own.metadata == metadata
    for key, tensor in tensors.items():
        assert torch.equal(by_safetensors[key], tensor)
        assert torch.equal(own.read(key), tensor)


def test_late_metadata_is_asked_after_the_last_tensor(tmp_path):
    made: list[str] = []

    def make() -> list[torch.Tensor]:
        made.append("tensor")
        return [torch.ones(3)]

    block = Block((spec("key", torch.ones(3)),), make)
    late = lambda _fingerprint: {"count": f"{len(made):04}"}  # noqa: E731

    write_safetensors(tmp_path / "file", [block], {"format": "pt", "count": "0000"}, late_metadata=late)

    file = read_safetensors(tmp_path / "file")
    assert file.metadata == {"format": "pt", "count": "0001"}
    assert torch.equal(file.read("key"), torch.ones(3))


def test_an_existing_file_is_not_written_over(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="file"):
        write_safetensors(tmp_path / "file", [], {})
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_does_not_exist_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="nowhere"):
        write_safetensors(tmp_path / "nowhere" / "file", [], {})


def test_a_full_disk_is_an_output_error(tmp_path):
    script = """
        import resource, signal, sys
        from pathlib import Path
        import torch
        from lora_squeeze.errors import OutputError
        from lora_squeeze.formats.tensors import TensorSpec
        from lora_squeeze.formats.writing import Block, write_safetensors
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # writing further fails, as on a full disk
        block = Block((TensorSpec("key", "F32", (5000,), 20000),), lambda: [torch.ones(5000)])
        try:
            write_safetensors(Path(sys.argv[1]), [block], {})
        except OutputError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path / "file"], capture_output=True, text=True, check=True
    )
    assert f"{tmp_path / 'file'}: cannot be written" in done.stdout


def test_an_error_while_making_a_tensor_comes_through(tmp_path):
    def fail() -> list[torch.Tensor]:
        raise AdapterError("layer 7 is damaged")

    good = Block((spec("good", torch.ones(3)),), lambda: [torch.ones(3)])
    bad = Block((spec("bad", torch.ones(3)),), fail)
    with pytest.raises(AdapterError, match="layer 7"):
        write_safetensors(tmp_path / "file", [good, bad, good], {})


@pytest.mark.parametrize("workers", [1, 4])
def test_only_a_few_blocks_are_alive_while_writing(tmp_path, workers):
    alive: set[int] = set()
    most = 0

    def make(place: int) -> list[torch.Tensor]:
        nonlocal most
        tensor = torch.full((50,), float(place))
        alive.add(place)
        weakref.finalize(tensor, alive.discard, place)
        most = max(most, len(alive))
        return [tensor]

    one = torch.zeros(50)
    many = [Block((spec(str(place), one),), lambda place=place: make(place)) for place in range(100)]
    torch.set_num_threads(workers)
    try:
        write_safetensors(tmp_path / "file", many, {})
    finally:
        torch.set_num_threads(1)

    assert all(tensor.eq(float(key)).all() for key, tensor in load_file(tmp_path / "file").items())
    assert 1 <= most <= 3 * workers
    assert not alive


def test_memory_does_not_grow_with_the_adapter(tmp_path):
    """40 layers of 4 MB are decomposed, squeezed and written; the process grows by a few layers."""
    script = """
        import resource, sys
        from pathlib import Path
        import torch
        from lora_squeeze import decompose, fixed, open_adapter, squeeze
        from lora_squeeze.formats.tensors import TensorSpec
        from lora_squeeze.formats.writing import Block, write_safetensors

        def write(folder, layers):
            folder.mkdir()
            shapes = {"A": (8, 65536), "B": (65536, 8)}
            blocks = []
            for layer in range(layers):
                keys = (f"layer{layer}.lora_{factor}.weight" for factor in shapes)
                specs = tuple(TensorSpec(key, "F32", shapes[key[-8]], 4 * 8 * 65536) for key in keys)
                blocks.append(Block(specs, lambda: [torch.randn(shape) for shape in shapes.values()]))
            write_safetensors(folder / "adapter_model.safetensors", blocks, {"format": "pt"})
            (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 8}')

        def run(folder):
            decomposition = decompose(open_adapter(folder))
            squeeze(decomposition, fixed(decomposition.spectra, 4), folder / ".." / f"{folder.name}-out")
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        torch.set_num_threads(2)
        small, large = Path(sys.argv[1], "small"), Path(sys.argv[1], "large")
        write(small, 8)
        write(large, 40)
        print(run(small), run(large), (large / "adapter_model.safetensors").stat().st_size // 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path], capture_output=True, text=True, check=True
    )
    shutil.rmtree(tmp_path)  # pytest would keep it
    small, large, size = map(int, done.stdout.split())  # KiB
    assert size > 150_000
    assert large - small < 24_000


# --- to the disk while more is computed -------------------------------------------------------------------------

COUNT = 24


def small_blocks() -> list[Block]:
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
    write_safetensors(tmp_path / "file", small_blocks(), {})
    assert 2 <= len(calls) <= 1 + COUNT * 4096 // 8192
    assert all(tensor.eq(float(key)).all() for key, tensor in load_file(tmp_path / "file").items())


def test_a_small_file_is_flushed_once(tmp_path, flushes):
    calls, _ = flushes
    write_safetensors(tmp_path / "file", small_blocks()[:1], {})
    assert len(calls) == 1


@pytest.mark.parametrize("which", [1, 2])
def test_a_failure_beside_the_work_is_not_lost(tmp_path, flushes, which):
    _, failing = flushes
    failing.append(which)
    with pytest.raises(OutputError, match="cannot be written: the disk has failed"):
        write_safetensors(tmp_path / "file", small_blocks(), {})
