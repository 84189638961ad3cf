"""The folder of a run: `--overwrite` removes what a run wrote, and never what it reads or another process is at."""

import pytest
from click.testing import CliRunner
from quick_runs import models, quick  # noqa: F401
from test_hub import server  # noqa: F401

from lora_squeeze.cli import main
from lora_squeeze.errors import OutputError, TrainingError
from lora_squeeze.training import run as running
from lora_squeeze.training.folder import only_one
from lora_squeeze.training.run import train


@pytest.fixture
def finished(quick, tmp_path):
    """A run in a folder."""
    train(quick(training={"max_steps": 2}), tmp_path / "ra")
    return tmp_path / "ra"


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_continue_does_not_overwrite_the_run_that_it_continues(finished):
    before = names(finished)
    command = ["continue", str(finished / "final"), "--data", "builtin:sums:20", "--rank", "2", "--out", str(finished)]
    result = CliRunner().invoke(main, [*command, "--overwrite", "--device", "cpu"])
    assert result.exit_code == 1
    said = f"--overwrite would remove {finished / 'final'}, which [model] adapter names; choose another folder"
    assert said in result.output
    assert names(finished) == before


@pytest.mark.parametrize("key", ["adapter", "from", "source", "eval_source", "pattern"])
def test_what_is_read_is_not_overwritten(key, finished, quick, tmp_path):
    rows = finished / "final" / "rows.jsonl"
    rows.write_text('{"prompt": "1", "completion": "2"}\n' * 8)
    sections = {
        "adapter": {"model": {"adapter": str(finished / "final"), "lora_rank": 0}},
        "from": {"resume": {"from": str(finished)}},
        "source": {"data": {"source": str(rows)}},
        "eval_source": {"data": {"eval_source": str(rows)}},
        "pattern": {"data": {"source": str(finished / "final" / "*.jsonl")}},
    }
    link = tmp_path / "link"
    link.symlink_to(finished)
    before = names(finished)
    with pytest.raises(OutputError, match="--overwrite would remove"):
        train(quick(**sections[key]), link, overwrite=True)
    assert names(finished) == before


def test_overwriting_leaves_what_is_not_a_run_s_own(finished, quick):
    (finished / "rows.jsonl").write_text('{"prompt": "1", "completion": "2"}\n' * 8)
    (finished / "notes").mkdir()
    (finished / "final" / "old").write_text("x")
    settings = quick(str(finished / "rows.jsonl"), training={"max_steps": 1, "save_every": 0})
    assert train(settings, finished, overwrite=True).steps == 1
    assert not (finished / "final" / "old").exists()
    assert not list(finished.glob("checkpoints/checkpoint-*"))
    assert (finished / "notes").is_dir()
    assert (finished / "rows.jsonl").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_program_s_settings_are_no_run(overwrite, quick, tmp_path):
    (tmp_path / "settings.toml").write_text("[default]\nport = 80\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine").write_text("x")
    with pytest.raises(OutputError, match="is not the folder of a run"):
        train(quick(), tmp_path, overwrite=overwrite)
    assert names(tmp_path) == ["checkpoints", "checkpoints/mine", "settings.toml"]
    assert "port" in (tmp_path / "settings.toml").read_text()


def test_a_run_with_damaged_settings_may_be_overwritten(finished, quick):
    (finished / "settings.toml").write_text("[")
    assert train(quick(training={"max_steps": 1}), finished, overwrite=True).steps == 1


def test_a_folder_that_another_process_works_on_is_not_overwritten(finished, quick, monkeypatch):
    monkeypatch.setattr(running, "_PATIENCE", 0.0)
    before = names(finished)
    written = (finished / "settings.toml").read_text()
    with only_one(finished), pytest.raises(TrainingError, match="another process is at work"):
        train(quick(training={"max_steps": 1}), finished, overwrite=True)
    assert names(finished) == before
    assert (finished / "settings.toml").read_text() == written


def test_a_folder_that_was_only_locked_is_empty(quick, tmp_path):
    (tmp_path / ".lock").touch()
    assert train(quick(training={"max_steps": 1}), tmp_path).steps == 1
