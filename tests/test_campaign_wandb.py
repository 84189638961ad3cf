"""The squeeze of a campaign as a run of its own in W&B, read back from what the real library has written."""

import json
import struct
from pathlib import Path

import pytest
from quick_campaigns import model, started, statuses, text  # noqa: F401
from wandb.proto import wandb_internal_pb2

from lora_squeeze.campaign.launch import run_campaign


def records(file: Path):
    """What the real library has written offline: a LevelDB log (blocks of 32 KiB, records in one piece or several)."""
    content, place, pieces = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            yield record
            pieces = b""


def test_the_squeeze_becomes_a_run_of_its_own_in_wandb(text, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    more = (
        '[squeeze]\ntarget_ranks = [1, 2, 4]\n[logging]\nwandb_project = "mine"\nwandb_entity = "us"\nlog_every = 1\n'
    )
    monkeypatch.chdir(tmp_path)
    folder = started(text("", more=more).replace("seeds = [1, 2]", "seeds = [1]"), tmp_path / "c")
    manifest = run_campaign(folder)
    assert str(folder) in manifest.squeeze.wandb
    runs = {}
    for file in [*folder.rglob("*.wandb"), *(tmp_path / "wandb").rglob("*.wandb")]:
        found = list(records(file))
        (run,) = {one.run.run_id: one.run for one in found if one.WhichOneof("record_type") == "run"}.values()
        runs[run.display_name] = (run, found)
    run, found = runs["squeeze-analysis"]
    assert (run.project, run.entity, run.job_type, run.run_group) == ("mine", "us", "squeeze", "c")
    rank = manifest.squeeze.recommended_rank
    assert set(run.tags) == {"squeeze", f"rank-{rank}"}
    config = {one.key: json.loads(one.value_json) for one in run.config.update}
    assert (config["source_rank"], config["recommended_rank"], config["num_layers"]) == (4, rank, 14)
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in one.history.item}
        for one in found
        if one.WhichOneof("record_type") == "history"
    ]
    curves = [row for row in history if "squeeze/rank" in row]
    assert [row["squeeze/rank"] for row in curves] == [1, 2, 4]
    for row, expected in zip(curves, manifest.squeeze.table, strict=True):
        for key in ("mean_variance", "min_variance", "max_variance"):
            assert row[f"squeeze/{key}"] == pytest.approx(expected[key])
    (table,) = [row["squeeze/variance_table/path"] for row in history if "squeeze/variance_table/path" in row]
    content = json.loads(next(folder.rglob(table)).read_text())
    assert content["columns"] == ["rank", "mean_variance", "min_variance", "max_variance", "recommended"]
    assert [row[0] for row in content["data"] if row[4]] == [rank]
    summary = {}
    for one in found:
        if one.WhichOneof("record_type") == "summary":
            summary |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in one.summary.update
            }
    assert {key: summary[f"squeeze/{key}"] for key in ("recommended_rank", "source_rank", "num_layers")} == {
        "recommended_rank": rank,
        "source_rank": 4,
        "num_layers": 14,
    }
    assert summary["squeeze/min_variance_retention"] == 0.95
    trained, logged = runs[manifest.runs[0].name]
    assert (trained.project, trained.run_group) == ("mine", "c")
    keys = {item.key or "/".join(item.nested_key) for one in logged for item in one.history.item}
    assert "train/loss" in keys


def test_when_wandb_fails_the_recommendation_stays(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = started(text("", more="[squeeze]\n"), tmp_path / "c")
    manifest = run_campaign(folder)
    fields = json.loads((folder / "manifest.json").read_text())
    fields["config"]["logging"] = {"wandb_project": "a/project/of/no/such/name"}
    fields["squeeze"] = {"status": "pending"}
    (folder / "manifest.json").write_text(json.dumps(fields))
    again = run_campaign(folder)
    assert again.squeeze.recommended_rank == manifest.squeeze.recommended_rank > 0
    assert again.squeeze.wandb.startswith("failed: ")
