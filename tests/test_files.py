"""Files that commands write beside what they print: refused before any work, never instead of what was found."""

import json
import sys
from pathlib import Path

import pytest
from adapters import make_adapter
from click.testing import CliRunner

from lora_squeeze.cli import files, main
from lora_squeeze.errors import OutputError

COMMANDS = {
    "curve": (["curve", "ADAPTER", "--data", "nothing.jsonl"], "curve.json"),
    "plan": (["plan", "ADAPTER", "--calibration", "nothing.safetensors"], "ranks.json"),
    "report": (["report", "ADAPTER", "--calibration", "nothing.safetensors"], "report.html"),
    "calibrate": (["calibrate", "ADAPTER", "--data", "nothing.jsonl"], "moments.safetensors"),
}


@pytest.fixture
def adapter(tmp_path) -> Path:
    return make_adapter(tmp_path / "adapter")


def run(*arguments):
    return CliRunner().invoke(main, [str(one) for one in arguments])


def refused(command, adapter, output, *options):
    """What a command that would fail later says first."""
    arguments, _ = COMMANDS[command]
    done = run(*(adapter if one == "ADAPTER" else one for one in arguments), "-o", output, *options)
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output
    return done.output


@pytest.mark.parametrize("command", COMMANDS)
def test_all_is_seen_to_before_any_work(command, adapter, tmp_path, monkeypatch):
    name = COMMANDS[command][1]
    there = tmp_path / name
    there.write_text("mine")
    assert "already exists; use --overwrite" in refused(command, adapter, there)
    assert "nothing." in refused(command, adapter, there, "--overwrite")
    assert "nothing." in refused(command, adapter, tmp_path / "new" / name)
    assert "is a folder" in refused(command, adapter, tmp_path)
    assert f"{there} is no folder" in refused(command, adapter, there / name)
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    assert f"nothing may be made in {tmp_path}" in refused(command, adapter, tmp_path / "new" / name)
    assert there.read_text() == "mine"
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(["adapter", name])


@pytest.mark.parametrize("command", ["curve", "report", "calibrate"])
def test_a_name_that_says_something_else_is_refused(command, adapter, tmp_path):
    assert "its name must end in" in refused(command, adapter, tmp_path / "output.docx")


def test_a_figure_without_matplotlib_is_refused(adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'lora-squeeze[plots]'" in refused("curve", adapter, tmp_path / "curve.png")


@pytest.mark.parametrize(
    ("command", "file"),
    [("plan", "adapter_config.json"), ("curve", "adapter_config.json"), ("calibrate", "adapter_model.safetensors")],
)
def test_a_file_of_the_adapter_is_not_replaced(command, file, tmp_path, adapter):
    (adapter / "curve.json").write_text("{}")
    file = "curve.json" if command == "curve" else file
    before = (adapter / file).read_bytes()
    assert "is a file of the adapter itself" in refused(command, adapter, adapter / file, "--overwrite")
    assert (adapter / file).read_bytes() == before


@pytest.mark.parametrize("command", ["curve", "plan", "report"])
def test_overwriting_nothing_is_refused(command, adapter):
    arguments, _ = COMMANDS[command]
    done = run(*(adapter if one == "ADAPTER" else one for one in arguments), "--overwrite")
    assert (done.exit_code, "--overwrite is about what --output" in done.output) == (2, True), done.output


def test_a_plan_is_replaced_only_if_told(adapter, tmp_path):
    file = tmp_path / "ranks.json"
    assert run("plan", adapter, "--policy", "fixed=2", "-o", file).exit_code == 0
    first = file.read_text()
    assert run("plan", adapter, "--policy", "fixed=1", "-o", file).exit_code == 1
    assert file.read_text() == first
    assert run("plan", adapter, "--policy", "fixed=1", "-o", file, "--overwrite").exit_code == 0
    assert json.loads(file.read_text())["policy"] == "fixed=1"


def test_what_was_found_is_printed_though_it_cannot_be_written(adapter, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OutputError("no space left on device")

    monkeypatch.setattr("lora_squeeze.formats.folder.new_file", full)
    done = run("plan", adapter, "--policy", "fixed=2", "-o", tmp_path / "ranks.json", "--json")
    assert (done.exit_code, json.loads(done.stdout)["policy"]) == (1, "fixed=2")


def test_what_was_found_is_written_though_nobody_reads_it(tmp_path):
    def closed():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        files.print_and_write(closed, tmp_path / "file", lambda file: file.write_text("found"), overwrite=False)
    assert (tmp_path / "file").read_text() == "found"
