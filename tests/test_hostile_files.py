"""No file crashes a command, makes it write elsewhere, run code or take memory that the file does not hold."""

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from adapters import snapshot
from hostile import MEMORY, attempt, corpus
from hostile_files import CONFIG, TARGETS, peft, sound
from hypothesis import HealthCheck, Phase, given, settings

from lora_squeeze import compress_adapter, open_adapter
from lora_squeeze.documents import parse_json, parse_toml, read_text

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")

EXAMPLES = 15  # for each kind of file; `make fuzz` tries as many as one likes


@pytest.mark.parametrize("case", corpus().values(), ids=corpus())
def test_the_corpus(case):
    attempt(case)


@pytest.mark.parametrize("target", TARGETS)
def test_what_hypothesis_makes_up(target):
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(TARGETS[target])
    def run(case):
        attempt(case)

    run()


def test_the_limit_on_memory_is_one():
    """What the others rely on: with `attempt`'s limit, a large allocation fails."""
    from hostile import _little_memory

    with _little_memory(), pytest.raises(RuntimeError, match="allocate"):
        torch.empty(2 * MEMORY, dtype=torch.uint8)


# --- links --------------------------------------------------------------------------------------------------------


def write(folder: Path, case=None) -> Path:
    for name, content in (case or peft()).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder / "adapter"


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path):
    source = write(tmp_path)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    (source / "README.md").symlink_to(tmp_path / "secret" / "key")
    (source / "more").symlink_to(tmp_path / "secret")
    (source / "sub").mkdir()
    (source / "sub" / "deep").symlink_to(tmp_path / "secret" / "key")
    (source / "self").symlink_to(source)
    (source / "circle").symlink_to(source / "circle")
    (source / "own").symlink_to(source / "adapter_config.json")
    result = compress_adapter(source, tmp_path / "out", 1)
    assert set(snapshot(tmp_path / "out")) == {"adapter_config.json", "adapter_model.safetensors", "own"}
    (note,) = [note for note in result.notes if "links" in note]
    assert all(name in note for name in ("README.md", "more", "sub/deep", "self", "circle"))


def test_links_of_the_hub_s_cache_are_followed(tmp_path):
    repository = tmp_path / "models--me--lora"
    snapshot_folder = repository / "snapshots" / "0123abc"
    blobs = repository / "blobs"
    blobs.mkdir(parents=True)
    snapshot_folder.mkdir(parents=True)
    files = {**{name.partition("/")[2]: content for name, content in peft().items()}, "tokenizer.json": b"{}"}
    for number, (name, content) in enumerate(files.items()):
        (blobs / str(number)).write_bytes(content)
        (snapshot_folder / name).symlink_to(Path("../../blobs") / str(number))
    result = compress_adapter(snapshot_folder, tmp_path / "out", 1)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert not result.notes


# --- code ---------------------------------------------------------------------------------------------------------


def test_a_pickle_does_not_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "ran").exists()  # it would
    (tmp_path / "ran").rmdir()
    source = write(tmp_path, {"adapter/adapter_config.json": json.dumps(CONFIG).encode()})
    torch.save({"a.lora_A.weight": Evil()}, source / "adapter_model.bin")
    with pytest.raises(Exception, match=r"adapter_model\.bin"):
        open_adapter(source)
    assert not (tmp_path / "ran").exists()


# --- texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "[" * 100_000, "9" * 19, "9" * 5000, '"\\ud800"', '{"a": "\\udfff"}', "{}{}"])
def test_a_text_that_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)


@pytest.mark.parametrize("text", ['"\\ud83d\\ude00"', "999999999999999999", "-1e-400", '["\\u00e9"]'])
def test_a_text_that_is_json_is_its_value(text):
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize("text", ["x", "x = " + "[" * 3000, "x = " + "9" * 5000, "x = [{y = " + "9" * 19 + "}]"])
def test_a_text_that_is_no_toml_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"\w"):
        parse_toml(text)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs an endless file")
def test_an_endless_file_is_a_value_error():
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        read_text(Path("/dev/zero"))


def test_a_sound_file_is_sound(tmp_path):
    source = write(tmp_path, peft(weights=sound("peft")))
    assert open_adapter(source).rank == 2
