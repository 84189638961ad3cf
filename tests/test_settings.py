"""TOML files: every key known and of the right type, or an error that says which and what was meant."""

from dataclasses import fields

import pytest

from lora_squeeze.errors import SettingsError
from lora_squeeze.settings import CHOICES, Settings, SqueezeSettings, read_settings

EVERYTHING = {  # key → TOML, value
    "adapter_path": ('"an/adapter"', "an/adapter"),
    "min_variance_retention": ("0.9", 0.9),
    "source_rank": ("64", 64),
    "target_ranks": ("[4, 8]", [4, 8]),
    "output_path": ('"out"', "out"),
    "compress_to": ("16", 16),
    "device": ('"cuda:1"', "cuda:1"),
    "by": ('"worst"', "worst"),
    "method": ('"qr"', "qr"),
    "dtype": ('"bf16"', "bf16"),
    "policy": ('"energy=0.9"', "energy=0.9"),
    "min_rank": ("2", 2),
    "max_rank": ("32", 32),
    "multiple_of": ("4", 4),
    "steps": ("[8, 16]", [8, 16]),
    "rank_for": ("{ q_proj = 8 }", {"q_proj": 8}),
    "equal": ('["qkv"]', ["qkv"]),
    "runtime": ('"vllm"', "vllm"),
    "max_lora_rank": ("16", 16),
    "base_path": ('"base"', "base"),
    "calibration": ('"moments"', "moments"),
    "overwrite": ("true", True),
}


def read(tmp_path, text: str) -> Settings:
    (tmp_path / "squeeze.toml").write_text(text, encoding="utf-8")
    return read_settings(tmp_path / "squeeze.toml")


def refusal(tmp_path, text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "squeeze.toml") in str(caught.value)
    return str(caught.value)


def squeeze_section(**values: str) -> str:
    return "[squeeze]\n" + "".join(f"{key} = {value}\n" for key, value in {"adapter_path": '"a"', **values}.items())


def test_every_key_is_tested_with_a_value_of_its_own():
    assert set(EVERYTHING) == {one.name for one in fields(SqueezeSettings)}
    defaults = SqueezeSettings()
    assert all(getattr(defaults, key) != value for key, (_, value) in EVERYTHING.items())


@pytest.mark.parametrize("key", EVERYTHING)
def test_each_key_is_read_and_changes_nothing_else(tmp_path, key):
    text, value = EVERYTHING[key]
    server = {"runtime": "vllm"} if key == "max_lora_rank" else {}  # whose rank it is
    found = read(tmp_path, squeeze_section(**{key: text}, **{one: f'"{name}"' for one, name in server.items()})).squeeze
    assert found == SqueezeSettings(**{"adapter_path": "a", key: value, **server})


def test_defaults_are_those_of_the_document(tmp_path):
    found = read(tmp_path, squeeze_section()).squeeze
    assert (found.source_rank, found.target_ranks, found.min_variance_retention) == (0, [], 0.95)
    assert (found.output_path, found.compress_to, found.device) == ("", 0, "cpu")
    assert (found.by, found.method, found.dtype, found.overwrite) == ("mean", "gram", "", False)


def test_a_whole_number_will_do_for_a_fraction(tmp_path):
    assert read(tmp_path, squeeze_section(min_variance_retention="1")).squeeze.min_variance_retention == 1.0


@pytest.mark.parametrize(
    ("source_rank", "lora_rank", "expected"),
    [(None, None, 0), (None, 64, 64), (0, 64, 64), (32, 64, 32), (32, None, 32)],
)
def test_the_model_s_rank_stands_in_for_the_source_rank(tmp_path, source_rank, lora_rank, expected):
    text = squeeze_section(**({} if source_rank is None else {"source_rank": str(source_rank)}))
    text += "" if lora_rank is None else f"[model]\nlora_rank = {lora_rank}\n"
    assert read(tmp_path, text).source_rank == expected


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("adapter_pth", "adapter_path"),
        ("target_rank", "target_ranks"),
        ("min_variance", "min_variance_retention"),
        ("compressto", "compress_to"),
        ("Device", "device"),
        ("over_write", "overwrite"),
    ],
)
def test_an_unknown_key_suggests_the_right_one(tmp_path, typed, meant):
    message = refusal(tmp_path, squeeze_section(**{typed: "1"}))
    assert f"'{typed}'" in message
    assert f"did you mean '{meant}'" in message


def test_a_key_like_no_other_lists_what_is_known(tmp_path):
    message = refusal(tmp_path, squeeze_section(zzz="1"))
    assert "'zzz'" in message
    assert "adapter_path" in message


@pytest.mark.parametrize(("typed", "meant"), [("squeez", "squeeze"), ("Model", "model")])
def test_an_unknown_section_suggests_the_right_one(tmp_path, typed, meant):
    message = refusal(tmp_path, squeeze_section() + f"[{typed}]\nx = 1\n")
    assert f"'{typed}'" in message
    assert f"did you mean '{meant}'" in message


def test_an_unknown_key_of_the_model_suggests_the_right_one(tmp_path):
    message = refusal(tmp_path, squeeze_section() + "[model]\nlora_rnak = 8\n")
    assert "'lora_rnak'" in message
    assert "did you mean 'lora_rank'" in message


WRONG = {
    "adapter_path": ["3", "[]", "true"],
    "min_variance_retention": ['"0.9"', "true", "[0.9]"],
    "source_rank": ["8.0", '"8"', "true"],
    "target_ranks": ["8", '"8"', '["8"]', "[8.0]", "[true]"],
    "compress_to": ["8.5", '"8"', "false"],
    "device": ["0"],
    "by": ['"median"', "1"],
    "method": ['"svd"', "1"],
    "dtype": ['"int8"', "16", '"BF16 "'],
    "overwrite": ["1", '"yes"'],
    "steps": ["8", '["8"]'],
    "rank_for": ["8", '{ q_proj = "8" }', '["q_proj=8"]'],
    "equal": ['"qkv"', "[1]"],
    "runtime": ['"tgi"'],
    "policy": ["0.9"],
}


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, texts in WRONG.items() for text in texts])
def test_a_value_of_the_wrong_kind_names_its_key(tmp_path, key, text):
    assert key in refusal(tmp_path, squeeze_section(**{key: text}))


@pytest.mark.parametrize("key", CHOICES)
def test_a_value_that_is_no_choice_lists_the_choices(tmp_path, key):
    message = refusal(tmp_path, squeeze_section(**{key: '"nonsense"'}))
    assert "'nonsense'" in message
    assert all(repr(choice) in message for choice in CHOICES[key])


def test_a_missing_adapter_path_is_named(tmp_path):
    assert "adapter_path" in refusal(tmp_path, '[squeeze]\noutput_path = "out"\n')
    assert "adapter_path" in refusal(tmp_path, '[squeeze]\nadapter_path = ""\n')


def test_a_missing_section_is_named(tmp_path):
    assert "squeeze" in refusal(tmp_path, "[model]\nlora_rank = 8\n")
    assert "squeeze" in refusal(tmp_path, "")


@pytest.mark.parametrize("text", ["squeeze = 3", "squeeze = []", "[[squeeze]]\nadapter_path = 'a'\n"])
def test_a_section_that_is_none_is_named(tmp_path, text):
    assert "squeeze" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "text", ["[squeeze", "[squeeze]\nadapter_path = a\n", "[squeeze]\nby = 'mean'\nby = 'worst'\n"]
)
def test_invalid_toml_is_named(tmp_path, text):
    assert "not valid TOML" in refusal(tmp_path, text)


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "squeeze.toml").write_bytes(b"\xff\xfe[squeeze]")
    with pytest.raises(SettingsError, match="not valid TOML"):
        read_settings(tmp_path / "squeeze.toml")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingsError, match="nowhere"):
        read_settings(tmp_path / "nowhere.toml")
    with pytest.raises(SettingsError, match=str(tmp_path)):
        read_settings(tmp_path)
