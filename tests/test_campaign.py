"""Campaigns of tiny real runs: one after the other, in processes, on Ray; failing, killed, resumed, squeezed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from adapters import make_adapter
from click.testing import CliRunner
from quick_campaigns import model, started, statuses, text  # noqa: F401

from lora_squeeze import open_adapter
from lora_squeeze.campaign.launch import run_campaign
from lora_squeeze.campaign.manifest import read_manifest
from lora_squeeze.cli import main
from lora_squeeze.errors import OutputError, TrainingError
from lora_squeeze.training.folder import RunFolder, only_one
from lora_squeeze.training.settings import read_run_settings


def test_every_run_has_its_own_folder_and_the_manifest_follows(text, tmp_path):
    folder = started(text("", "lr = 1e-3", 'data.source = "builtin:sums:21"'), tmp_path / "c")
    seen: list[list[str]] = []
    manifest = run_campaign(folder, on_change=lambda one: seen.append(statuses(one)))
    assert statuses(manifest) == ["finished"] * 4
    assert manifest == read_manifest(folder)
    # The end of each run is written before the next one begins.
    assert [row for row, before in zip(seen[1:], seen, strict=False) if row != before] == [
        [*["finished"] * done, *state, *["pending"] * (3 - done)]
        for done in range(4)
        for state in (["running"], ["finished"])
    ]
    adapters = [(folder / entry.adapter / "adapter_model.safetensors").read_bytes() for entry in manifest.runs]
    assert len(set(adapters)) == 4
    for entry in manifest.runs:
        assert (entry.attempts, entry.exit_code, entry.steps, entry.rank, entry.error) == (1, 0, 3, 4, "")
        assert entry.metrics["train_loss"] > 0
        assert read_run_settings(folder / entry.config).training.seed == entry.seed
        assert "step 1/3" in (folder / entry.log).read_text()
    assert manifest.squeeze.status == "none"


def test_all_keys_of_squeeze_hold_in_a_campaign(text, tmp_path):
    small = tmp_path / "small"
    squeeze = f'[squeeze]\ntarget_ranks = [1, 3, 4]\noutput_path = "{small}"\ncompress_to = 3\ndevice = "cpu"\n'
    folder = started(text('executor = "inline"', more=squeeze), tmp_path / "c")
    manifest = run_campaign(folder)
    found = manifest.squeeze
    assert (found.status, found.run, found.source_rank, found.error) == ("finished", manifest.runs[0].name, 4, "")
    assert [row["rank"] for row in found.table] == [1, 3, 4]
    assert [row["rank"] for row in found.table if row["recommended"]] == [found.recommended_rank]
    assert found.outputs == {manifest.runs[0].name: str(small)}
    assert open_adapter(small).rank == 3
    with pytest.raises(OutputError, match="already exists"):
        started(text('executor = "inline"', more=squeeze), tmp_path / "another")


def test_every_run_is_squeezed_if_wanted_and_what_is_missing_is_made_up_for(text, tmp_path):
    squeeze = f'[squeeze]\noutput_path = "{tmp_path / "small"}"\ncompress_to = 2\n'
    folder = started(text("squeeze_every_run = true", more=squeeze), tmp_path / "c")
    manifest = run_campaign(folder)
    assert set(manifest.squeeze.outputs) == {entry.name for entry in manifest.runs}
    for entry in manifest.runs:
        assert open_adapter(tmp_path / "small" / Path(entry.folder).name).rank == 2
    # Killed between the second run and its squeeze:
    fields = json.loads((folder / "manifest.json").read_text())
    fields["squeeze"]["outputs"].pop(manifest.runs[1].name)
    (folder / "manifest.json").write_text(json.dumps(fields))
    assert run_campaign(folder).squeeze.outputs == manifest.squeeze.outputs


def test_the_recommended_rank_is_used_by_the_others_unless_they_name_one(text, tmp_path):
    keys = 'use_recommended_rank = true\nexecutor = "inline"'
    squeeze = "[squeeze]\nmin_variance_retention = 0.3\n"
    folder = started(text(keys, "lr = 1e-2", "lora_rank = 3", more=squeeze), tmp_path / "c")
    manifest = run_campaign(folder)
    assert manifest.squeeze.recommended_rank == 1
    assert [entry.rank for entry in manifest.runs] == [4, 1, 3, 3]


def test_a_run_that_fails_stops_no_other_and_can_be_retried(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memory.py").write_text("def full(completion, example): raise MemoryError('no more')")
    folder = started(
        text("retries = 1", 'data.source = "late.jsonl"', 'type = "memory.full"', "lr = 1e-3", more="[squeeze]\n"),
        tmp_path / "c",
    )
    manifest = run_campaign(folder)
    assert statuses(manifest) == ["failed"] * 4 + ["finished"] * 2
    missing, memory = manifest.runs[0], manifest.runs[2]
    assert (missing.attempts, missing.exit_code) == (2, 1)
    assert missing.error == "late.jsonl: no such file"
    assert "late.jsonl: no such file" in (folder / missing.log).read_text()
    assert "MemoryError" in memory.error or "classes" in memory.error or "completions" in memory.error
    # The squeeze took the first run that did finish.
    assert (manifest.squeeze.status, manifest.squeeze.run) == ("finished", manifest.runs[4].name)
    (tmp_path / "late.jsonl").write_text('{"text": "abc"}\n' * 8)
    again = run_campaign(folder, retry=[missing.name])
    assert statuses(again) == ["finished", *["failed"] * 3, "finished", "finished"]
    assert statuses(run_campaign(folder)) == statuses(again)


def test_a_squeeze_that_fails_stops_nothing(text, tmp_path):
    manifest = run_campaign(started(text(more="[squeeze]\nsource_rank = 9\n"), tmp_path / "c"))
    assert statuses(manifest) == ["finished"] * 2
    assert manifest.squeeze.status == "failed"
    assert "source rank 9 was declared" in manifest.squeeze.error


def test_a_summary_script_is_run_at_the_end(text, tmp_path):
    script = tmp_path / "summary.py"
    script.write_text("import sys, pathlib; pathlib.Path(sys.argv[1], sys.argv[2]).write_text('done')")
    keys = f'seeds = [1]\nsummary_script = "{script}"\nsummary_args = ["said.txt"]'
    manifest = run_campaign(started(text(keys).replace("seeds = [1, 2]\n", ""), tmp_path / "c"))
    assert manifest.summary == "finished"
    assert (tmp_path / "c" / "said.txt").read_text() == "done"
    script.write_text("raise SystemExit(3)")
    assert "exit code 3" in run_campaign(tmp_path / "c").summary


# --- processes, kills, Ray --------------------------------------------------------------------------------------


def wait_for(condition, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def worker_of(entry) -> int | None:
    """The process that trains a run."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"lora_squeeze.worker" in command and any(entry.folder.encode() in one for one in command):
            return int(path.parent.name)
    return None


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_killed_workers_and_killed_campaigns_lose_nothing(text, tmp_path):
    config = tmp_path / "campaign.toml"
    keys = "parallel = true\nretries = 1"
    both = text(keys, "max_steps = 2", "max_steps = 100000", more="[squeeze]\n").replace("[1, 2]", "[1]")
    config.write_text(both)
    folder = tmp_path / "c"
    command = [sys.executable, "-m", "lora_squeeze", "campaign", "run", str(config), "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (folder / "manifest.json").exists())
    short, long = read_manifest(folder).runs
    # A worker dies: its run is started again, and goes on from its checkpoint.
    wait_for(lambda: RunFolder(folder / long.folder).last_checkpoint() is not None)
    worker = worker_of(long)
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: read_manifest(folder).run(long.name).attempts == 2)
    reached = int(checkpoint(folder, long).rpartition("-")[2])
    wait_for(lambda: int(checkpoint(folder, long).rpartition("-")[2]) > reached)
    with pytest.raises(TrainingError, match="another process is at work"), only_one(folder):
        pass
    wait_for(lambda: read_manifest(folder).squeeze.recommended_rank > 0)
    # The campaign dies: its workers end with it.
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: worker_of(long) is None)
    killed = read_manifest(folder)
    assert (killed.run(short.name).status, killed.run(long.name).status) == ("finished", "running")
    assert "ended by SIGKILL" not in killed.run(long.name).error
    assert CliRunner().invoke(main, ["campaign", "status", str(folder)]).output.count("pending") == 1
    # Only what has not finished is started again.
    again = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: read_manifest(folder).run(long.name).attempts == 3)
    assert read_manifest(folder).run(short.name) == killed.run(short.name)
    again.send_signal(signal.SIGKILL)
    again.wait()


def checkpoint(folder: Path, entry) -> str:
    found = RunFolder(folder / entry.folder).last_checkpoint()
    assert found is not None
    return found.name


def test_ray_runs_a_campaign(text, tmp_path):
    pytest.importorskip("ray")
    keys = 'executor = "ray"\ncpus_per_run = 1\nstagger_seconds = 0.1'
    manifest = run_campaign(started(text(keys, more="[squeeze]\n"), tmp_path / "c"))
    assert statuses(manifest) == ["finished"] * 2
    assert manifest.squeeze.status == "finished"
    assert "step 1/3" in (tmp_path / "c" / manifest.runs[0].log).read_text()


# --- commands ---------------------------------------------------------------------------------------------------


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_commands_of_a_campaign(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "c.toml"
    data = "eval_fraction = 0.2\nmax_eval_examples = 4\n[squeeze]\n"
    config.write_text(text("", "lora_rank = 4", "lora_rank = 2", more=data))
    explained = invoke("run", config, "--explain")
    assert explained.exit_code == 0
    assert "mode                    campaign" in explained.output
    assert explained.output.count("lora_rank=") == 4
    assert not (tmp_path / "logs").exists()
    result = invoke("campaign", "run", config, "--out", "c")
    assert result.exit_code == 0
    assert result.stderr.count("  finished") == 4
    assert "Recommended rank:" in result.stdout
    again = invoke("campaign", "run", config, "--out", "c")
    assert "running" not in again.stderr
    status = invoke("campaign", "status", "c")
    assert status.output.count("finished") == 4
    assert json.loads(invoke("campaign", "status", "c", "--json").output)["num_runs"] == 4
    assert invoke("campaign", "resume", "c").exit_code == 0
    refused = invoke("campaign", "retry", "c", "sft~lora_rank=4_s1")
    assert (refused.exit_code, "has not failed" in refused.output) == (2, True)
    report = invoke("campaign", "report", "c", "--squeezed", "--metric", "eval_loss", "--plots", "plots")
    assert report.exit_code == 0
    assert "±" in report.output
    assert "loss while training" in report.output
    assert "Gain of squeezing over training at that rank directly, eval_loss" in report.output
    measured = json.loads((tmp_path / "c" / "squeezed.json").read_text())
    assert {name: list(ranks) for name, ranks in measured.items()} == {
        "sft~lora_rank=4_s1": ["2"],
        "sft~lora_rank=4_s2": ["2"],
    }
    drawn = {f"{name}.{form}" for name in ("curves", "gains") for form in ("png", "svg")}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == drawn
    refused = invoke("campaign", "report", "c", "--plots", "plots")
    assert (refused.exit_code, "already exists" in refused.output) == (1, True)
    assert invoke("campaign", "report", "c", "--overwrite").exit_code == 2
    assert invoke("campaign", "report", "c", "--metric", "loss").exit_code == 2


def test_a_campaign_with_failures_says_so_and_how_to_go_on(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(text("", source="nowhere.jsonl"))
    result = invoke("run", "c.toml")
    assert result.exit_code == 1
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("campaign_")
    assert f"2 of 2 runs failed: lora-squeeze campaign retry logs/{folder.name}" in result.stderr
    assert "nowhere.jsonl: no such file" in result.stdout


def test_folders_of_something_else_and_of_other_campaigns_are_left_alone(text, tmp_path):
    started(text(), tmp_path / "c")
    assert started(text(), tmp_path / "c") == tmp_path / "c"
    with pytest.raises(TrainingError, match="another configuration"):
        started(text("stagger_seconds = 1"), tmp_path / "c")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="not the folder of a campaign"):
        started(text(), tmp_path / "other")
    for command in ("status", "resume", "retry", "report"):
        result = invoke("campaign", command, tmp_path / "other")
        assert (result.exit_code, "not the folder of a campaign" in result.output) == (1, True)
    (tmp_path / "c" / "manifest.json").write_text('{"record": "Campaign", "schema": 99}')
    assert "its schema is 99" in invoke("campaign", "status", tmp_path / "c").output


@pytest.mark.parametrize("options", [[], ["--explain"]], ids=str)
@pytest.mark.parametrize(
    ("squeeze", "said"),
    [
        ('policy = "paramz=0.3"', "[squeeze] unknown policy 'paramz'"),
        ("min_variance_retention = 95", "[squeeze] min_variance_retention = 95 is not possible"),
        ('runtime = "llamacpp"\nmax_lora_rank = 4\nmultiple_of = 8', "multiple_of 8 is above max_rank 4"),
        ('output_path = "full"', "full: already exists; set overwrite = true in [squeeze] to replace it"),
        ('output_path = "mine"', "mine: is no adapter's folder"),
    ],
)
def test_what_a_squeeze_cannot_be_told_is_said_before_anything_is_trained(
    text, tmp_path, monkeypatch, squeeze, said, options
):
    monkeypatch.chdir(tmp_path)
    make_adapter(tmp_path / "full")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "c.toml").write_text(text('executor = "inline"', more=f"[squeeze]\n{squeeze}\n"))
    refused = invoke("campaign", "run", "c.toml", "--out", "c", *options)
    assert (refused.exit_code, said in " ".join(refused.output.split())) == (1, True), refused.output
    assert not (tmp_path / "c").exists()
