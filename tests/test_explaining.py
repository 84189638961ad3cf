"""`--explain` of run, train and campaign: every key that is set is said, none by a value it does not have."""

import re
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import get_type_hints

import pytest
from commands import prints

from lora_squeeze.campaign.spec import CampaignSettings
from lora_squeeze.cli.explaining import explain_run, explain_squeeze
from lora_squeeze.sections import document_of, keys_of, to_toml, toml_value
from lora_squeeze.settings import ModelSettings, Settings, SqueezeSettings
from lora_squeeze.training.settings import RunSettings


def odd_value(one, number):
    """A value of this field's type that no other key has, nor this one by default."""
    default = one.default_factory() if one.default_factory is not MISSING else one.default
    if choices := one.metadata.get("choices"):
        return next(choice for choice in reversed(choices) if choice != default)
    return {
        bool: not default,
        int: 7000 + number,
        float: 0.125 + number,
        str: f"odd-{one.name}",
        list: [f"odd-{one.name}"] if "str" in str(one.type) else [7000 + number],
        dict: {f"odd-{one.name}": 7000 + number},
    }[int if one.type == "int | None" else type(default)]


def everything(section):
    """A section with every key set."""
    return section(**{one.name: odd_value(one, number) for number, one in enumerate(fields(section))})


def spelled(value) -> str:
    return value if isinstance(value, str) else toml_value(value)


def rows(text: str) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines() if "  " in line)


@pytest.mark.parametrize("key", keys_of(SqueezeSettings))
def test_every_key_of_squeeze_is_said(tmp_path, capsys, key):
    explain_squeeze(tmp_path / "squeeze.toml", Settings(everything(SqueezeSettings)))
    value = getattr(everything(SqueezeSettings), key)
    assert rows(capsys.readouterr().out)[key].startswith(spelled(value))


@pytest.mark.parametrize("key", keys_of(SqueezeSettings))
def test_every_key_of_a_squeeze_after_training_is_said(tmp_path, capsys, key):
    settings = RunSettings(squeeze=everything(SqueezeSettings))
    explain_run(tmp_path / "run.toml", settings, tmp_path)
    _, _, said = capsys.readouterr().out.partition("[squeeze], after training:\n")
    assert spelled(getattr(settings.squeeze, key)) in rows(said)[key]


SECTIONS = {
    name: next(one for one in (hint, *getattr(hint, "__args__", ())) if is_dataclass(one))
    for name, hint in get_type_hints(RunSettings).items()
}
KEYS = [(section, key) for section, kind in SECTIONS.items() for key in keys_of(kind) if section != "squeeze"]


@pytest.mark.parametrize("method", ["sft", "grpo"])
@pytest.mark.parametrize(("section", "key"), KEYS, ids=".".join)
def test_every_key_of_a_run_is_said(tmp_path, capsys, section, key, method):
    settings = RunSettings()
    settings = replace(settings, training=replace(settings.training, method=method, epochs=0.0))
    name = keys_of(SECTIONS[section])[key]
    one = next(one for one in fields(SECTIONS[section]) if one.name == name)
    value = odd_value(one, 5)
    if (section, key) == ("in_squeeze", "schedule"):
        value = "equal"
    settings = replace(settings, **{section: replace(getattr(settings, section), **{name: value})})
    if key == "schedule":
        settings = replace(settings, in_squeeze=replace(settings.in_squeeze, target_rank=8))
    explain_run(tmp_path / "run.toml", settings, tmp_path)
    said = capsys.readouterr().out
    assert ", ".join(value) in said if isinstance(value, list) and section == "data" else spelled(value) in said


def test_a_policy_after_training_is_not_called_a_retained_variance(tmp_path, capsys):
    chosen = SqueezeSettings(policy="fixed=4", output_path="small")
    explain_run(tmp_path / "run.toml", RunSettings(squeeze=chosen), tmp_path)
    said = rows(capsys.readouterr().out)
    assert said["policy"] == "fixed=4"
    assert "compress_to" not in said


def test_without_an_output_what_is_about_it_says_so(tmp_path, capsys):
    explain_squeeze(tmp_path / "squeeze.toml", Settings(SqueezeSettings(adapter_path="a", policy="fixed=4")))
    assert rows(capsys.readouterr().out)["policy"] == "fixed=4 (nothing is written without output_path)"


def test_the_adapter_of_a_squeeze_after_training_is_the_one_trained(tmp_path, capsys):
    explain_run(tmp_path / "run.toml", RunSettings(squeeze=SqueezeSettings(adapter_path="mine")), tmp_path)
    assert rows(capsys.readouterr().out)["adapter_path"] == "mine (not heeded: the adapter that is trained)"


def test_the_rank_of_the_model_stands_in_for_that_of_the_source(tmp_path, capsys):
    both = Settings(SqueezeSettings(source_rank=4), ModelSettings(lora_rank=8))
    explain_squeeze(tmp_path / "squeeze.toml", replace(both, squeeze=SqueezeSettings()))
    assert rows(capsys.readouterr().out)["source_rank"] == "8"
    explain_squeeze(tmp_path / "squeeze.toml", both)
    said = rows(capsys.readouterr().out)
    assert (said["source_rank"], said["model.lora_rank"]) == ("4", "8")


CAMPAIGN_KEYS = [key for key in keys_of(CampaignSettings) if key not in ("conditions", "seeds", "executor")]


def possible_squeeze(tmp_path):
    """Every key of [squeeze] set, to what a campaign is not refused for."""
    return replace(
        everything(SqueezeSettings),
        min_variance_retention=0.75,
        compress_to=0,
        device="cpu:0",
        policy="energy=0.75",
        min_rank=7000,
        multiple_of=2,
        steps=[7000],
        max_rank=7002,
        max_lora_rank=7003,
        rank_for={"odd": 0},
        runtime="llamacpp",
        base_path=str(tmp_path),
        calibration=str(tmp_path),
    )


@pytest.fixture
def campaign(tmp_path):
    """What `campaign run --explain` prints of a campaign with every key set."""
    settings = replace(
        everything(CampaignSettings), conditions=[], seeds=[42], executor="ray", placement="DEFAULT", parallel=True
    )
    document = {
        "campaign": document_of(settings),
        "model": {"model": "base"},
        "data": {"source": ["rows.jsonl"]},
        "training": {"weight_decay": 0.375},
        "squeeze": document_of(possible_squeeze(tmp_path)),
    }
    (tmp_path / "campaign.toml").write_text(to_toml(document))
    return settings, rows(prints("campaign", "run", tmp_path / "campaign.toml", "--explain"))


def test_every_key_of_a_campaign_is_said(campaign, tmp_path):
    settings, said = campaign
    for key in CAMPAIGN_KEYS:
        assert said[f"campaign.{key}"] == spelled(getattr(settings, key))
    assert said["training.weight_decay"] == "0.375"
    for key, value in document_of(possible_squeeze(tmp_path)).items():
        assert spelled(value) in said[key]
