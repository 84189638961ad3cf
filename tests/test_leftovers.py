"""What a killed process leaves is cleared away by the next; what a living one makes is respected."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from adapters import pair, snapshot, write_raw

from lora_squeeze import compress_adapter, open_adapter, verify
from lora_squeeze.errors import OutputError
from lora_squeeze.formats import folder as folder_module
from lora_squeeze.formats.folder import new_file, new_folder

WAITING = """
    import os, sys, time
    from lora_squeeze import fixed, open_adapter, squeeze

    def wait(layer):
        os.write(1, b"squeezing\\n")
        sys.stdin.readline()

    adapter = open_adapter(sys.argv[1])
    squeeze(adapter, fixed(adapter.layers.values(), 2), sys.argv[2], overwrite=True, on_layer=wait)
"""


@pytest.fixture
def source(tmp_path):
    return write_raw(tmp_path / "adapter", pair("layer", 6, 4, 5))


@pytest.fixture
def squeezing(tmp_path, source):
    """A process that has begun to write `out` and waits."""
    command = [sys.executable, "-c", textwrap.dedent(WAITING), str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "squeezing\n"
        yield process
        process.kill()


def names(folder):
    return {path.name for path in folder.iterdir()}


def partial_folders(folder):
    return [name for name in names(folder) if name.endswith(".partial")]


def test_the_leftovers_of_a_killed_process_are_cleared_away(tmp_path, source, squeezing):
    squeezing.kill()
    squeezing.wait()
    assert len(partial_folders(tmp_path)) == 1
    compress_adapter(source, tmp_path / "out", 2)
    assert names(tmp_path) == {"adapter", "out"}
    assert verify(tmp_path / "out", source).passed


def test_an_output_that_another_process_is_writing_is_refused(tmp_path, source, squeezing):
    with pytest.raises(OutputError, match=rf"process {squeezing.pid} is writing it"):
        compress_adapter(source, tmp_path / "out", 3)
    squeezing.communicate("\n")
    assert squeezing.returncode == 0
    assert names(tmp_path) == {"adapter", "out"}
    assert verify(tmp_path / "out", source).passed


def test_another_output_beside_is_no_matter(tmp_path, source, squeezing):
    before = partial_folders(tmp_path)
    compress_adapter(source, tmp_path / "ou", 2)
    compress_adapter(source, tmp_path / "out.1", 2)
    assert partial_folders(tmp_path) == before


def test_leftovers_of_outputs_with_longer_names_are_not_taken_for_ones_own(tmp_path, source):
    other = tmp_path / ".out.adam.abcd1234.partial"
    (other / "out.adam").mkdir(parents=True)
    os.utime(other, (0, 0))
    compress_adapter(source, tmp_path / "out", 2)
    assert other.exists()


@pytest.mark.parametrize("age", [0, 3600])
def test_a_folder_without_a_lock_is_left_alone_while_its_maker_may_live(tmp_path, source, age):
    other = tmp_path / ".out.abcd1234.partial"
    other.mkdir()
    os.utime(other, (time.time() - age,) * 2)
    compress_adapter(source, tmp_path / "out", 2)
    assert other.exists() == (age == 0)


def test_what_a_killed_process_had_moved_away_is_put_back(tmp_path, source):
    left = tmp_path / ".out.abcd1234.partial"
    (left / "replaced").mkdir(parents=True)
    (left / "replaced" / "mine.txt").write_text("mine")
    (left / "lock").write_text("1\n")
    with pytest.raises(OutputError, match="Directory not empty"):
        compress_adapter(source, tmp_path / "out", 2)
    assert snapshot(tmp_path / "out") == {"mine.txt": b"mine"}
    assert names(tmp_path) == {"adapter", "out"}


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two steps"])
def test_an_old_output_is_replaced(tmp_path, source, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(folder_module, "_exchange", lambda *_: False)
    compress_adapter(source, tmp_path / "out", 2)
    (tmp_path / "out" / "stale.txt").write_text("stale")
    compress_adapter(source, tmp_path / "out", 3, overwrite=True)
    assert open_adapter(tmp_path / "out").rank == 3
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert names(tmp_path) == {"adapter", "out"}


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    def meanwhile() -> None:
        with new_folder(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine.txt").write_text("mine")

    with pytest.raises(OutputError, match="not empty"):
        meanwhile()
    assert snapshot(tmp_path) == {"out/mine.txt": b"mine"}


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    def meanwhile() -> None:
        with new_file(tmp_path / "out") as file:
            file.write_text("new")
            (tmp_path / "out").write_text("mine")

    with pytest.raises(OutputError, match="appeared meanwhile"):
        meanwhile()
    assert snapshot(tmp_path) == {"out": b"mine"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_command_that_is_told_to_end_clears_up(tmp_path, number):
    layers = {key: tensor for n in range(32) for key, tensor in pair(f"layer{n}", 600, 300, 600).items()}
    source = write_raw(tmp_path / "adapter", layers, r=300, lora_alpha=300)
    before = snapshot(source)
    command = [sys.executable, "-c", "from lora_squeeze.cli import main; main()"]
    command += ["compress", str(source), str(tmp_path / "out"), "--rank", "100"]

    def heed() -> None:  # nohup, and a shell's background jobs, leave these ignored
        signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        while not partial_folders(tmp_path) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode in (1, 128 + number)
    assert "Traceback" not in said
    assert names(tmp_path) == {"adapter"}
    assert snapshot(source) == before


def test_a_plan_is_written_whole_and_never_over_the_adapter(tmp_path, source):
    from click.testing import CliRunner

    from lora_squeeze.cli import main

    def plan(output, *options):
        return CliRunner().invoke(main, ["plan", str(source), "--policy", "fixed=2", "-o", str(output), *options])

    before = snapshot(source)
    refused = plan(source / "adapter_config.json", "--overwrite")
    assert refused.exit_code == 1
    assert "file of the adapter itself" in refused.stderr
    assert snapshot(source) == before
    for options in ([], ["--overwrite"]):
        assert plan(tmp_path / "ranks.json", *options).exit_code == 0
    assert plan("/dev/null").exit_code == 0
    assert not Path("/dev/null").is_file()
    assert names(tmp_path) == {"adapter", "ranks.json"}
