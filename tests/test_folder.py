"""An output appears whole or not at all, and the source is never touched."""

import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from adapters import CONFIG, PREFIX, WEIGHTS, edit_tensors, make_adapter, pair, snapshot, write_raw
from images import kohya_pair
from safetensors.torch import save_file

from lora_squeeze import compress, compress_adapter, fixed, open_adapter, save_adapter, squeeze
from lora_squeeze.errors import AdapterError, OutputError
from lora_squeeze.formats.folder import check_output, new_folder


@pytest.fixture
def source(tmp_path):
    return write_raw(tmp_path / "adapter", {**pair("first", 6, 4, 5), **pair("last", 7, 4, 5)})


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("spelling", ["adapter", "./adapter/", "other/../adapter", "link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_itself_is_refused(tmp_path, monkeypatch, source, spelling, overwrite):
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    before = snapshot(source)
    with pytest.raises(OutputError, match="same folder"):
        compress_adapter("adapter", spelling, 2, overwrite=overwrite)
    assert snapshot(source) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_inside_the_source_is_refused(source, overwrite):
    before = snapshot(source)
    with pytest.raises(OutputError, match="inside"):
        compress_adapter(source, source / "squeezed" / "8", 2, overwrite=overwrite)
    assert snapshot(source) == before


def test_an_output_around_the_source_is_refused(tmp_path, source):
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="around"):
        compress_adapter(source, tmp_path, 2, overwrite=True)
    assert snapshot(tmp_path) == before


def test_an_existing_output_is_refused(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        compress_adapter(source, tmp_path / "out", 2)
    assert snapshot(tmp_path / "out") == {"mine.txt": b"mine"}


def test_overwrite_replaces_everything_that_was_there(tmp_path, source):
    compress_adapter(source, tmp_path / "out", 3)
    (tmp_path / "out" / "stale.txt").write_text("stale")
    compress_adapter(source, tmp_path / "out", 2, overwrite=True)
    assert set(snapshot(tmp_path / "out")) == {CONFIG, WEIGHTS}
    assert open_adapter(tmp_path / "out").rank == 2
    assert listing(tmp_path) == {"adapter", "out"}


@pytest.mark.parametrize(
    ("names", "named"),
    [(["novel.txt"], "no adapter's folder.*'novel.txt'"), ([CONFIG, "optimizer.pt"], "'optimizer.pt' of a training")],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_replaced(tmp_path, source, names, named, overwrite):
    (tmp_path / "mine").mkdir()
    for name in names:
        (tmp_path / "mine" / name).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=named):
        compress_adapter(source, tmp_path / "mine", 2, overwrite=overwrite)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", ["a model", "nothing that can be read"])
def test_a_file_of_something_else_is_never_replaced(tmp_path, content):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(kohya_pair(name, 8, 4, 6, alpha=2.0), source)
    if content == "a model":
        save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}, output)
    else:
        output.write_bytes(b"no header")
    before = output.read_bytes()
    with pytest.raises(OutputError, match="but no adapter"):
        compress_adapter(source, output, 2, overwrite=True)
    assert output.read_bytes() == before
    save_file(kohya_pair(name, 8, 3, 6, alpha=2.0), output)
    compress_adapter(source, output, 2, overwrite=True)
    assert open_adapter(output).rank == 2


@pytest.mark.parametrize("spelling", [".", "..", "../../around"])
def test_the_folder_one_is_in_is_not_replaced(tmp_path, monkeypatch, source, spelling):
    (tmp_path / "around" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "around" / "here")
    with pytest.raises(OutputError, match="the folder you are in"):
        compress_adapter(source, spelling, 2)


@pytest.mark.skipif(not Path("/dev/shm").is_mount(), reason="needs a disk that is mounted somewhere")
def test_a_mounted_disk_is_not_replaced(source):
    with pytest.raises(OutputError, match="a disk is mounted there"):
        compress_adapter(source, "/dev/shm", 2)


@pytest.mark.parametrize("there", ["an empty folder", "an old output", "nothing"])
def test_an_output_that_is_a_link_stays_one(tmp_path, source, there):
    if there == "an old output":
        compress_adapter(source, tmp_path / "elsewhere" / "real", 3)
    elif there == "an empty folder":
        (tmp_path / "elsewhere" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "real")
    compress_adapter(source, tmp_path / "out", 2, overwrite=there == "an old output")
    assert (tmp_path / "out").is_symlink()
    assert open_adapter(tmp_path / "elsewhere" / "real").rank == 2


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a\0b", "x" * 300])
def test_impossible_paths_are_errors(source, name):
    with pytest.raises(AdapterError, match=r"cannot be read|no such file"):
        open_adapter(name)
    with pytest.raises(OutputError, match="cannot be"):
        compress_adapter(source, name, 2)


def test_an_empty_output_folder_is_filled(tmp_path, source):
    (tmp_path / "out").mkdir()
    compress_adapter(source, tmp_path / "out", 2)
    assert open_adapter(tmp_path / "out").rank == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_place_of_the_output_is_refused(tmp_path, source, overwrite):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="not a folder"):
        compress_adapter(source, tmp_path / "out", 2, overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine"


def test_missing_parents_are_made(tmp_path, source):
    compress_adapter(source, tmp_path / "new" / "deep" / "out", 2)
    assert open_adapter(tmp_path / "new" / "deep" / "out").rank == 2


def test_a_relative_output_lands_in_the_working_folder(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    compress_adapter("adapter", "out", 2)
    assert open_adapter("out").rank == 2


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, source):
    monkeypatch.setenv("HOME", str(tmp_path))
    compress_adapter("~/adapter", "~/out", 2)
    assert open_adapter(tmp_path / "out").rank == 2


def test_the_folder_has_ordinary_permissions(tmp_path, source):
    mask = os.umask(0o027)
    try:
        compress_adapter(source, tmp_path / "out", 2)
    finally:
        os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("old", [False, True], ids=["nothing there", "an old output"])
def test_a_failure_in_the_middle_leaves_everything_as_it_was(tmp_path, source, old):
    if old:
        compress_adapter(source, tmp_path / "out", 3)
    before = snapshot(tmp_path / "out") if old else None
    edit_tensors(source, lambda tensors: tensors[f"{PREFIX}last.lora_B.weight"].fill_(math.nan))
    listed = listing(tmp_path)

    with pytest.raises(AdapterError, match="'last'"):
        compress_adapter(source, tmp_path / "out", 2, overwrite=True)

    assert listing(tmp_path) == listed
    assert not before or snapshot(tmp_path / "out") == before


def test_a_failed_squeeze_does_not_leave_new_parents_full_of_rubbish(tmp_path, source):
    edit_tensors(source, lambda tensors: tensors[f"{PREFIX}last.lora_B.weight"].fill_(math.nan))
    with pytest.raises(AdapterError):
        compress_adapter(source, tmp_path / "new" / "out", 2)
    assert snapshot(tmp_path / "new") == {}
    assert not (tmp_path / "new" / "out").exists()


def test_a_source_that_is_replaced_meanwhile_is_an_error_and_leaves_nothing(tmp_path):
    source = write_raw(tmp_path / "adapter", {k: t for n in range(40) for k, t in pair(f"layer{n}", 6, 4, 5).items()})
    other = write_raw(tmp_path / "other", {k: t for n in range(40) for k, t in pair(f"layer{n}", 6, 4, 5).items()})
    adapter = open_adapter(source)

    def replace_the_source(_layer: str) -> None:
        if (other / WEIGHTS).exists():
            (other / WEIGHTS).replace(source / WEIGHTS)

    with pytest.raises(AdapterError, match="changed while it was being read"):
        squeeze(adapter, fixed(adapter.layers.values(), 2), tmp_path / "out", on_layer=replace_the_source)

    assert listing(tmp_path) == {"adapter", "other"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written_is_an_output_error(tmp_path, source):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        compress_adapter(source, tmp_path / "locked" / "out", 2)


def test_a_parent_that_is_a_file_is_an_output_error(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        compress_adapter(source, tmp_path / "file" / "out", 2)


def test_a_name_that_is_too_long_is_an_output_error(tmp_path, source):
    with pytest.raises(OutputError):
        compress_adapter(source, tmp_path / ("x" * 400), 2)


def test_other_files_that_vanish_are_an_error_and_leave_nothing(tmp_path, source):
    (source / "tokenizer.json").write_text("{}")
    adapter = open_adapter(source)
    (source / "tokenizer.json").unlink()
    squeezed = compress(adapter, fixed(adapter.layers.values(), 2))
    with pytest.raises((AdapterError, OutputError), match=r"tokenizer\.json"):
        save_adapter(squeezed, tmp_path / "out")
    assert listing(tmp_path) == {"adapter"}


def test_an_adapter_can_be_saved_as_it_is(tmp_path):
    source = make_adapter(tmp_path / "adapter", alpha_pattern={"v_proj": 3}, dtype=torch.bfloat16)
    written = save_adapter(open_adapter(source), tmp_path / "out")
    assert written.weights == tmp_path / "out" / WEIGHTS
    assert written.nbytes == written.weights.stat().st_size
    before, after = (open_adapter(folder) for folder in (source, tmp_path / "out"))
    assert before.layers == after.layers
    for name in before.layers:
        assert torch.equal(before.load(name).up, after.load(name).up)
        assert torch.equal(before.load(name).down, after.load(name).down)


def test_check_output_writes_nothing(tmp_path):
    check_output(tmp_path / "new" / "out", source=None, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_new_folder_does_not_swallow_errors(tmp_path):
    def fail() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


KILLED = """
    import os, sys, time
    from lora_squeeze import fixed, open_adapter, squeeze

    def stop(layer):
        os.write(1, b"squeezing\\n")
        time.sleep(60)

    adapter = open_adapter(sys.argv[1])
    squeeze(adapter, fixed(adapter.layers.values(), 2), sys.argv[2], overwrite=True, on_layer=stop)
"""


@pytest.mark.parametrize("old", [False, True], ids=["nothing there", "an old output"])
def test_a_killed_squeeze_leaves_nothing_under_the_final_name(tmp_path, source, old):
    if old:
        compress_adapter(source, tmp_path / "out", 3)
    before = snapshot(tmp_path / "out") if old else None
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        reached = process.stdout.readline()
        process.kill()
    assert reached == "squeezing\n"
    assert process.returncode == -signal.SIGKILL

    assert (snapshot(tmp_path / "out") if before else (tmp_path / "out").exists()) == (before or False)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    compress_adapter(source, tmp_path / "out", 2)  # what was left behind is not in the way
    assert open_adapter(tmp_path / "out").rank == 2
