"""The TOML of a run: every key known, sensible, and documented."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from lora_squeeze.errors import SettingsError
from lora_squeeze.sections import build, document_of, keys_of, read_toml, to_toml
from lora_squeeze.training.settings import RunSettings, check, read_run_settings

BARE = {"model": {"model": "base"}, "data": {"source": "rows.jsonl"}}


def settings(**sections):
    document = {name: {**BARE.get(name, {}), **sections.get(name, {})} for name in {**BARE, **sections}}
    built = build(RunSettings, document, "run.toml")
    check(built, "run.toml")
    return built


def refusal(**sections) -> str:
    with pytest.raises(SettingsError, match=r"^run\.toml") as caught:
        settings(**sections)
    return str(caught.value)


def test_a_model_and_data_are_enough():
    found = settings()
    assert (found.method, found.rank, found.data.source, found.schedule(500, 64)) == ("sft", 64, ["rows.jsonl"], None)


@pytest.mark.parametrize(
    ("sections", "method"),
    [
        ({"algorithm": {"advantage_mode": "maxrl"}}, "grpo"),
        ({"algorithm": {"transform_mode": "none"}}, "grpo"),
        ({"reward": {"type": "numeric"}}, "grpo"),
        ({"training": {"method": "dpo"}}, "dpo"),
    ],
)
def test_what_a_file_speaks_of_says_the_method(sections, method):
    assert settings(**sections).method == method


@pytest.mark.parametrize(
    ("squeeze", "message"),
    [
        ({"policy": "fixed=4", "compress_to": 4}, "policy and compress_to contradict each other"),
        ({"max_lora_rank": 16}, "max_lora_rank is what a server allows"),
    ],
)
def test_a_squeeze_after_training_may_not_contradict_itself_either(squeeze, message):
    assert f"[squeeze] {message}" in refusal(squeeze=squeeze)


def test_epochs_need_no_other_key():
    assert (settings().steps, settings(training={"max_steps": 7}).steps) == (500, 7)
    assert settings(training={"epochs": 2}).steps == settings(training={"max_steps": 0, "epochs": 2}).steps == 0


def test_every_section_has_a_default_for_every_key():
    assert RunSettings() == build(RunSettings, {}, "run.toml")
    for section in fields(RunSettings):
        value = getattr(RunSettings(), section.name)
        assert value is None or is_dataclass(value)


def test_what_is_written_as_toml_is_read_back(tmp_path):
    before = settings(
        model={"model": 'a "quoted" \\ path\nof two lines\x7f', "lora_rank": 8},
        data={"source": ["a.jsonl", "ä.jsonl"], "columns": {"text": "sentence", "odd key": "x"}},
        training={"lr": 1e-5, "epochs": 2, "completion_only": False},
        resume={"from": "logs/other"},
    )
    (tmp_path / "run.toml").write_text(to_toml(document_of(before)), encoding="utf-8")
    assert read_run_settings(tmp_path / "run.toml") == before
    assert document_of(before)["resume"] == {"from": "logs/other"}
    assert document_of(RunSettings()) == {}
    assert read_toml(tmp_path / "run.toml")["training"] == {"lr": 1e-5, "epochs": 2.0, "completion_only": False}


REFUSED = {
    "a key of another section": ({"model": {"lr": 1e-4}}, "[model] unknown key 'lr'; it belongs to [training]"),
    "a key that is misspelt": ({"training": {"max_step": 5}}, "did you mean 'max_steps'"),
    "a section that is misspelt": ({"traning": {}}, "did you mean 'training'"),
    "no model": ({"model": {"model": ""}}, "[model] model is missing"),
    "no data": ({"data": {"source": []}}, "[data] source is missing"),
    "no steps": ({"training": {"max_steps": 0}}, "for how long"),
    "steps and epochs": ({"training": {"max_steps": 9, "epochs": 2}}, "max_steps = 9 and epochs = 2 are both given"),
    "the default number of steps and epochs": ({"training": {"max_steps": 500, "epochs": 2}}, "are both given"),
    "negative steps": ({"training": {"max_steps": -1}}, "max_steps must be at least 0"),
    "an unknown method": ({"training": {"method": "ppo"}}, "'sft', 'classify', 'dpo', 'grpo'"),
    "no batch": ({"training": {"batch_size": 0}}, "batch_size must be at least 1"),
    "an uneven batch": ({"training": {"batch_size": 6, "gradient_accumulation": 4}}, "gradient_accumulation"),
    "all held out": ({"data": {"eval_fraction": 1.0}}, "eval_fraction"),
    "no learning": ({"training": {"lr": 0.0}}, "lr must be more than 0"),
    "a group of one": ({"training": {"method": "grpo", "group_size": 1}}, "group_size must be at least 2"),
    "a mode without grpo": (
        {"training": {"method": "sft"}, "algorithm": {"advantage_mode": "grpo"}},
        "advantage_mode belongs to method grpo, not to sft",
    ),
    "a reward without grpo": ({"training": {"method": "dpo"}, "reward": {"type": "exact"}}, "[reward] type belongs"),
    "regex without a pattern": ({"reward": {"type": "regex"}}, "[reward] pattern is missing"),
    "a pattern without regex": ({"reward": {"type": "exact", "pattern": "x"}}, "needs type"),
    "a squeeze of nothing": ({"model": {"squeeze_to": 4}}, "squeeze_to needs an adapter"),
    "two ranks": ({"model": {"adapter": "a", "lora_rank": 4}}, "lora_rank is that of a fresh LoRA"),
    "an unknown schedule": ({"in_squeeze": {"schedule": "stadnard", "target_rank": 8}}, "unknown schedule 'stadnard'"),
    "a schedule that rises": ({"in_squeeze": {"schedule": "standard", "target_rank": 128}}, "] ranks from 64"),
    "a schedule without ranks": ({"in_squeeze": {"schedule": "standard"}}, "[in_squeeze] a schedule needs its ranks"),
    "a rank without a schedule": ({"in_squeeze": {"target_rank": 8}}, "target_rank needs a schedule"),
    "rates by rank without a schedule": ({"in_squeeze": {"lr_by_rank": {"8": 1e-3}}}, "lr_by_rank needs a schedule"),
    "a policy without a schedule": ({"in_squeeze": {"rank_policy": "params"}}, "rank_policy needs a schedule"),
    "alpha of an adapter": (
        {"model": {"adapter": "a"}, "lora": {"alpha": 8}},
        "[lora] alpha is that of a fresh LoRA, and [model] adapter brings its own: leave it out",
    ),
    "dropout of an adapter": ({"model": {"adapter": "a"}, "lora": {"dropout": 0.1}}, "[lora] dropout is that of a"),
    "modules of an adapter": (
        {"model": {"adapter": "a"}, "lora": {"target_modules": ["q_proj"]}},
        "[lora] target_modules is that of a",
    ),
    "held out twice": (
        {"data": {"eval_source": "a.jsonl", "eval_fraction": 0.1}},
        "[data] eval_source and eval_fraction both say what is held out",
    ),
    "groups without grpo": ({"training": {"group_size": 4}}, "group_size belongs to method grpo, not to sft"),
    "sampling without grpo": (
        {"training": {"method": "dpo", "temperature": 0.7}},
        "[training] temperature belongs to method grpo, not to dpo: leave it out",
    ),
    "beta in sft": ({"training": {"beta": 0.1}}, "[training] beta belongs to method dpo or grpo, not to sft"),
    "prompts in dpo": (
        {"training": {"method": "dpo", "completion_only": False}},
        "[training] completion_only belongs to method sft, not to dpo",
    ),
    "a rate for no rank": (
        {"in_squeeze": {"schedule": "equal", "target_rank": 8, "lr_by_rank": {"low": 1e-3}}},
        "'low' is not a rank",
    ),
    "a schedule above the rank": ({"in_squeeze": {"schedule": "128@0, 8@50"}}, "but training starts at rank 64"),
    "ranks and a target": (
        {"in_squeeze": {"schedule": "equal", "ranks": [64, 8], "target_rank": 4}},
        "ranks [64, 8] and the target 4",
    ),
    "a rate of zero": (
        {"in_squeeze": {"schedule": "equal", "target_rank": 8, "lr_by_rank": {"8": 0.0}}},
        "0.0 for rank 8 is not above 0",
    ),
    "a rate for a rank that never is": (
        {"in_squeeze": {"schedule": "equal", "target_rank": 8, "lr_by_rank": {"7": 1e-3}}},
        "rank 7 is not among those of the schedule, 64, 32, 16, 8",
    ),
    "warming up without a switch's leave": (
        {"in_squeeze": {"schedule": "equal", "target_rank": 8, "rewarm_steps": 5}},
        'needs lr_after_switch = "rewarm"',
    ),
    "no policy": (
        {"in_squeeze": {"schedule": "equal", "target_rank": 8, "rank_policy": "best"}},
        "rank_policy: unknown policy 'best'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_name(name):
    sections, said = REFUSED[name]
    assert said in refusal(**sections)


def test_a_schedule_is_that_of_the_rank_and_steps():
    found = settings(
        model={"lora_rank": 16}, training={"max_steps": 70}, in_squeeze={"schedule": "equal", "target_rank": 4}
    )
    schedule = found.schedule(70, 16)
    assert schedule is not None
    assert (schedule.ranks, schedule.steps) == ((16, 8, 4), 70)


def test_every_key_is_documented():
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    sections = [one.name for one in fields(RunSettings) if one.name != "squeeze"]
    keys = [key for name in sections for key in keys_of(type(getattr(RunSettings(), name)))]
    assert [key for key in keys if f"`{key}`" not in page] == []
    assert [name for name in sections if f"[{name}]" not in page] == []
