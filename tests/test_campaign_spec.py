"""TOML → runs: the document's campaign as it is written, names that file systems like, and what is refused."""

from dataclasses import fields
from pathlib import Path

import pytest

from lora_squeeze.campaign.spec import SEEDS, Campaign, CampaignSettings, campaign_of
from lora_squeeze.documents import parse_toml
from lora_squeeze.errors import SettingsError
from lora_squeeze.sections import keys_of

# As it stands in the `squeeze` document, and then the model and the data, which it leaves out.
DOCUMENT = """
[campaign]
seeds = [42, 101, 202, 303]
max_steps = 50

[[campaign.conditions]]
advantage_mode = "grpo"
transform_mode = "none"

[model]
lora_rank = 128  # train at high rank

[squeeze]
min_variance_retention = 0.95

[logging]
wandb_project = "my-project"
"""
NAMED = DOCUMENT.replace("[model]\n", '[model]\nmodel = "base"\n') + '\n[data]\nsource = "builtin:arithmetic"\n'
BARE = '[model]\nmodel = "base"\n[data]\nsource = "rows.jsonl"\n'


def campaign(text: str) -> Campaign:
    return campaign_of(parse_toml(text), "campaign.toml")


def with_conditions(*conditions: str, campaign_keys: str = "seeds = [1, 2]") -> Campaign:
    tables = "".join(f"[[campaign.conditions]]\n{one}\n" for one in conditions)
    return campaign(f"[campaign]\n{campaign_keys}\n{tables}{BARE}")


def test_the_document_s_campaign_runs_as_it_is_written():
    found = campaign(NAMED)
    assert [run.name for run in found.runs] == [f"grpo+none_s{seed}" for seed in (42, 101, 202, 303)]
    assert [run.folder for run in found.runs] == [run.name for run in found.runs]
    for run in found.runs:
        assert (run.settings.method, run.settings.rank) == ("grpo", 128)
        assert (run.settings.training.max_steps, run.settings.training.seed) == (50, run.seed)
        assert run.settings.squeeze is None  # is the campaign's business
        assert run.settings.logging.wandb_project == "my-project"
    assert found.common.squeeze is not None
    assert (found.executor, found.workers) == ("inline", 1)


def test_the_squeeze_of_a_campaign_may_not_contradict_itself():
    with pytest.raises(SettingsError, match=r"^campaign\.toml: \[squeeze\] max_lora_rank is what a server allows"):
        campaign(NAMED.replace("[squeeze]\n", "[squeeze]\nmax_lora_rank = 16\n"))


def test_without_a_model_the_document_s_campaign_says_what_is_missing():
    with pytest.raises(SettingsError, match=r"campaign\.toml: .*\[model\] model is missing"):
        campaign(DOCUMENT)


def test_seeds_and_conditions_have_the_defaults_of_the_document_s_implementation():
    found = campaign("[campaign]\n" + BARE)
    assert tuple(run.seed for run in found.runs) == SEEDS == (42, 101, 202, 303, 404, 505, 606, 707)
    assert found.runs[0].name == "sft_s42"
    assert found.runs[0].settings.steps == 500


def test_any_key_of_a_run_may_differ_between_conditions():
    found = with_conditions(
        'method = "grpo"\nadvantage_mode = "maxrl"\nlr = 1e-3\nlora_rank = 8',
        'data.source = ["a.jsonl", "b.jsonl"]\nschedule = "equal"\ntarget_rank = 2',
        'model.model = "other"\n[campaign.conditions.data.columns]\ntext = "sentence"',
    )
    first, second, third = (run.settings for run in found.runs[::2])
    assert (first.method, first.training.lr, first.rank) == ("grpo", 1e-3, 8)
    assert (second.data.source, second.in_squeeze.target_rank) == (["a.jsonl", "b.jsonl"], 2)
    assert (third.model.model, third.data.columns) == ("other", {"text": "sentence"})
    assert [run.condition for run in found.runs[::2]] == [
        "maxrl+none~lr=0.001,lora_rank=8",
        'sft~data={source=["a.jsonl", "b.jsonl"]},schedule=equal,target_rank=2',
        "sft~model={model=other},data={columns={text=sentence}}",
    ]


def test_conditions_come_before_seeds_so_that_the_first_run_is_that_of_the_first_condition():
    found = with_conditions("lr = 1e-3", "lr = 1e-4")
    assert [(run.condition, run.seed) for run in found.runs] == [
        ("sft~lr=0.001", 1), ("sft~lr=0.001", 2), ("sft~lr=0.0001", 1), ("sft~lr=0.0001", 2)
    ]  # fmt: skip


def test_folders_have_no_separators_and_stay_apart():
    found = with_conditions(
        'source = "a/b.jsonl"', 'source = "a-b.jsonl"', 'source = "..\\\\b"', f'source = "{"x" * 300}"'
    )
    folders = [run.folder for run in found.runs]
    assert len(set(folders)) == len(folders) == 8
    for folder in folders:
        assert Path(folder).name == folder
        assert len(folder.encode()) <= 100
        assert not folder.startswith(".")
    assert found.runs[0].name == "sft~source=a/b.jsonl_s1"  # the name itself stays as it was given


@pytest.mark.parametrize(
    ("keys", "executor", "workers"),
    [
        ("", "inline", 1),
        ("parallel = true", "processes", 4),
        ("parallel = true\nmax_workers = 3", "processes", 3),
        ("parallel = true\nmax_workers = 9", "processes", 4),
        ('executor = "processes"', "processes", 1),
        ('executor = "ray"', "ray", 4),
    ],
)
def test_where_runs_are_executed(keys, executor, workers):
    found = with_conditions("lr = 1e-3", "lr = 1e-4", campaign_keys=f"seeds = [1, 2]\n{keys}")
    assert (found.executor, found.workers) == (executor, workers)


REFUSED = {
    "a misspelt key": ("seed = [1]", "", "did you mean 'seeds'"),
    "no seed": ("seeds = []", "", "seeds is empty"),
    "a seed twice": ("seeds = [1, 1]", "", "names a seed twice"),
    "a seed that is none": ('seeds = ["1"]', "", "must be a whole number"),
    "too few workers": ("max_workers = -1", "", "max_workers must be at least 0"),
    "a contradiction": ('parallel = true\nexecutor = "inline"', "", "leave out parallel"),
    "an unknown executor": ('executor = "slurm"', "", "'inline', 'processes', 'ray'"),
    "no squeeze": ("use_recommended_rank = true", "", "needs a section [squeeze]"),
    "nowhere to squeeze to": ("squeeze_every_run = true", "[squeeze]\n", "needs [squeeze] output_path"),
    "arguments of nothing": ('summary_args = ["x"]', "", "needs a summary_script"),
    "an unknown key of a condition": (
        "[[campaign.conditions]]\nlora_rnk = 8",
        "",
        "number 1: unknown key 'lora_rnk'; did you mean 'lora_rank'",
    ),
    "a wrong value of a condition": (
        '[[campaign.conditions]]\nlr = "x"',
        "",
        "[[campaign.conditions]] number 1: training.lr must be a number",
    ),
    "a condition that cannot work": ("[[campaign.conditions]]\nlr = -1.0", "", "number 1: [training] lr must be more"),
    "a seed in a condition": ("[[campaign.conditions]]\nseed = 1", "", "seeds are those of [campaign]"),
    "the same twice": (
        "[[campaign.conditions]]\nlr = 1e-3\n[[campaign.conditions]]\nlr = 0.001",
        "",
        "are the same: sft~lr=0.001",
    ),
    "what is common": (
        '[[campaign.conditions]]\nsqueeze.by = "worst"',
        "[squeeze]\n",
        "[squeeze] is the same for all runs",
    ),
    "a misspelt section": ("", "[modle]\n", "did you mean 'model'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_name(name):
    keys, sections, said = REFUSED[name]
    with pytest.raises(SettingsError, match=r"^campaign\.toml: ") as caught:
        campaign(f"[campaign]\n{keys}\n{BARE}{sections}")
    assert said in str(caught.value)


def test_every_key_is_documented():
    page = (Path(__file__).parent.parent / "docs" / "campaigns.md").read_text(encoding="utf-8")
    assert [key for key in keys_of(CampaignSettings) if f"`{key}`" not in page] == []
    assert len(fields(CampaignSettings)) > 10
