"""Runs at the rank that the first one's squeeze recommends: which of them, from the start, and again after a break."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from quick_campaigns import model, started, statuses, text  # noqa: F401
from test_campaign_results import entry, manifest

from lora_squeeze.campaign.launch import run_campaign
from lora_squeeze.campaign.manifest import read_manifest
from lora_squeeze.campaign.overview import overview
from lora_squeeze.campaign.results import groups_of, means_side_by_side
from lora_squeeze.cli import main
from lora_squeeze.report.measured import campaign_section
from lora_squeeze.training import run as training
from lora_squeeze.training.folder import RunFolder

KEYS = 'use_recommended_rank = true\nexecutor = "inline"'
SQUEEZE = "[squeeze]\nmin_variance_retention = 0.3\n"  # recommends rank 1


@pytest.fixture
def breaks_down(monkeypatch):
    """Lets the second run fail once, after the checkpoint of its second step; says at which ranks runs began."""
    trained, ranks = training._train, []

    def broken(trainer, settings, run, **options):
        ranks.append(settings.model.lora_rank)
        if len(ranks) == 2:
            trainer.args.max_steps = 2
            trained(trainer, settings, run, **options)
            raise RuntimeError("the power is gone")
        return trained(trainer, settings, run, **options)

    monkeypatch.setattr(training, "_train", broken)
    return ranks


@pytest.mark.parametrize("way", ["retried by itself", "retried", "resumed"])
def test_a_run_begun_at_the_recommended_rank_goes_on_at_it(way, text, breaks_down, tmp_path):
    keys = KEYS + ("\nretries = 1" if way == "retried by itself" else "")
    folder = started(text(keys, more=SQUEEZE), tmp_path / "c")
    found = run_campaign(folder)
    second = found.runs[1]
    if way != "retried by itself":
        assert statuses(found) == ["finished", "failed"]
        checkpoint = RunFolder(folder / second.folder).last_checkpoint()
        assert checkpoint is not None
        assert checkpoint.name == "checkpoint-2"
        if way == "resumed":  # a campaign that was killed leaves it like this
            fields = json.loads((folder / "manifest.json").read_text())
            fields["runs"][1]["status"] = "running"
            (folder / "manifest.json").write_text(json.dumps(fields))
        found = run_campaign(folder, retry=[second.name] if way == "retried" else ())
    assert statuses(found) == ["finished", "finished"], found.runs[1].error
    assert breaks_down == [4, 1, 1]
    assert [one.rank for one in found.runs] == [4, 1]
    assert found.runs[1].steps == 3


def test_a_run_that_made_nothing_begins_at_the_recommended_rank(text, tmp_path, monkeypatch):
    """Its data were missing when it was tried at the full rank, before anything was recommended."""
    monkeypatch.chdir(tmp_path)
    folder = started(text(KEYS, 'data.source = "late.jsonl"', "lr = 1e-3", more=SQUEEZE), tmp_path / "c")
    found = run_campaign(folder)
    assert statuses(found) == ["failed", "failed", "finished", "finished"]
    (tmp_path / "late.jsonl").write_text('{"text": "abc"}\n' * 8)
    found = run_campaign(folder, retry=[found.runs[0].name])
    assert [one.rank for one in found.runs] == [1, 0, 4, 1]


def test_a_condition_that_names_the_common_rank_keeps_it(text, tmp_path):
    conditions = ("lora_rank = 4\nlr = 1e-3", "lr = 1e-2", "model.lora_rank = 4")
    found = run_campaign(started(text(KEYS, *conditions, more=SQUEEZE), tmp_path / "c"))
    assert found.squeeze.recommended_rank == 1
    assert [one.rank for one in found.runs] == [4, 4, 1, 1, 4, 4]


def test_means_are_over_runs_of_one_rank(text, tmp_path):
    folder = started(text(KEYS, more=SQUEEZE), tmp_path / "c")
    run_campaign(folder)
    assert [one.source_rank for one in read_manifest(folder).runs] == [4, 1]
    report = CliRunner().invoke(main, ["campaign", "report", str(folder)], catch_exceptions=False)
    assert report.exit_code == 0
    results, curves = report.output.split("while training")
    for table in (results, curves):
        assert "sft (rank 4)" in table
        assert "sft (rank 1)" in table
    assert "±" not in results.split("Auto-squeeze")[0]
    page = campaign_section(overview(folder))
    assert [one["name"] for one in page["conditions"]] == ["sft (rank 4)", "sft (rank 1)"]
    assert [one["name"] for one in page["curves"]] == ["sft (rank 4)", "sft (rank 1)"]
    assert {mean["count"] for one in page["conditions"] for mean in one["means"].values()} == {1}
    assert [one["source_rank"] for one in page["runs"]] == [4, 1]


def test_only_conditions_of_several_ranks_are_taken_apart():
    def run(condition: str, seed: int, rank: int, **metrics: float):
        return replace(entry(condition, seed, 1, **metrics), source_rank=rank)

    mixed = replace(
        manifest(run("a", 1, 8, eval_loss=1.0), run("a", 2, 2, eval_loss=3.0), run("b", 1, 2, eval_loss=5.0)),
        conditions=["a", "b", "c"],
    )
    assert {name: len(runs) for name, runs in groups_of(mixed).items()} == {
        "a (rank 8)": 1,
        "a (rank 2)": 1,
        "b": 1,
        "c": 0,
    }
    plain = replace(manifest(run("a", 1, 8, eval_loss=2.0), run("b", 1, 4, eval_loss=6.0)), conditions=["a", "b"])
    # Where either has several ranks, both are taken apart; ranks that only differ between the two are compared.
    found = {
        name: tuple(one and one.mean for one in means) for name, *means in means_side_by_side(mixed, plain, "eval_loss")
    }
    assert found == {"a (rank 8)": (1, 2), "a (rank 2)": (3, None), "b": (5, 6), "c": (None, None)}


def test_a_damaged_settings_file_is_named(text, breaks_down, tmp_path):
    folder = started(text(KEYS, more=SQUEEZE), tmp_path / "c")
    second = run_campaign(folder).runs[1]
    settings: Path = RunFolder(folder / second.folder).settings
    settings.write_text("[model")
    found = run_campaign(folder, retry=[second.name])
    assert found.runs[1].status == "failed"
    assert str(settings) in found.runs[1].error
    assert "not valid TOML" in found.runs[1].error
