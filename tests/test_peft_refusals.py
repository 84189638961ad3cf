"""PEFT adapters that are refused: other methods, damaged files, contradictions; each error names file and key."""

import json
import math
from pathlib import Path

import pytest
import torch
from adapters import (
    BERT,
    CONFIG,
    PREFIX,
    WEIGHTS,
    edit_config,
    make_adapter,
    pair,
    write_raw,
)
from peft import LoraConfig, PeftModel, get_peft_model

from lora_squeeze import compress_adapter, open_adapter
from lora_squeeze.errors import AdapterError, UnsupportedAdapter


def refusal(folder: Path, kind: type[AdapterError] = AdapterError) -> str:
    with pytest.raises(kind) as caught:
        open_adapter(folder)
    return str(caught.value)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA", "OLoRA"])
def test_initialisations_that_changed_the_base_are_refused(tmp_path, init):
    folder = write_raw(tmp_path / "a", pair("layer", 6, 4, 5), init_lora_weights=init)
    message = refusal(folder, UnsupportedAdapter)
    assert str(folder / CONFIG) in message
    assert "init_lora_weights" in message
    assert init in message
    assert "path_initial_model_for_weight_conversion" in message


@pytest.mark.parametrize("peft_type", ["LOHA", "LOKR", "IA3", "VERA", "PROMPT_TUNING", None, 7])
def test_other_peft_types_are_refused(tmp_path, peft_type):
    folder = write_raw(tmp_path / "a", pair("layer", 6, 4, 5), peft_type=peft_type)
    message = refusal(folder, UnsupportedAdapter)
    assert str(folder / CONFIG) in message
    assert "peft_type" in message
    assert str(peft_type) in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("kasa_config", {"beta": 1}), ("use_bdlora", {"nblocks": 2}), ("use_qalora", True)],
)
def test_factors_that_are_not_a_plain_product_are_refused(tmp_path, field, value):
    folder = write_raw(tmp_path / "a", pair("layer", 6, 4, 5), **{field: value})
    message = refusal(folder, UnsupportedAdapter)
    assert str(folder / CONFIG) in message
    assert field in message


def test_a_path_that_does_not_exist(tmp_path):
    assert f"{tmp_path / 'nowhere'}: no such file or folder" in refusal(tmp_path / "nowhere")


def test_a_folder_without_an_adapter(tmp_path):
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert CONFIG in message


def test_a_file_of_an_adapter_points_to_its_folder(tmp_path):
    folder = write_raw(tmp_path / "a", pair("layer", 6, 4, 5))
    assert f"give its folder: {folder}" in refusal(folder / WEIGHTS)


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(tmp_path, missing):
    folder = write_raw(tmp_path / "a", pair("layer", 6, 4, 5))
    (folder / missing).unlink()
    assert f"{folder / missing}: no such file" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", '"LORA"', "null"])
def test_a_damaged_config_is_named(tmp_path, text):
    folder = write_raw(tmp_path / "a", pair("layer", 6, 4, 5))
    (folder / CONFIG).write_text(text)
    assert str(folder / CONFIG) in refusal(folder)


def test_a_config_that_is_not_text_is_named(tmp_path):
    folder = write_raw(tmp_path / "a", pair("layer", 6, 4, 5))
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00{")
    assert str(folder / CONFIG) in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", ...),
        ("r", None),
        ("r", "4"),
        ("r", 0),
        ("r", -4),
        ("r", 4.5),
        ("r", True),
        ("lora_alpha", ...),
        ("lora_alpha", "8"),
        ("lora_alpha", math.nan),
        ("lora_alpha", math.inf),
        ("rank_pattern", [4]),
        ("alpha_pattern", "q_proj"),
    ],
    ids=str,
)
def test_a_field_without_a_usable_number_is_named(tmp_path, field, value):
    folder = write_raw(tmp_path / "a", pair("layer", 6, 4, 5))
    edit_config(folder, **{field: value})
    message = refusal(folder)
    assert str(folder / CONFIG) in message
    assert f"'{field}'" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank_pattern", {"layer": 0}), ("alpha_pattern", {"layer": "8"}), ("rank_pattern", {"layer": None})],
    ids=str,
)
def test_a_pattern_without_a_usable_number_names_its_key(tmp_path, field, value):
    folder = write_raw(tmp_path / "a", pair("layer", 6, 4, 5), **{field: value})
    message = refusal(folder)
    assert str(folder / CONFIG) in message
    assert "'layer'" in message


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_regular_expression_is_named(tmp_path, field):
    folder = write_raw(tmp_path / "a", pair("layer", 6, 4, 5), **{field: {"layer[": 4}})
    message = refusal(folder)
    assert str(folder / CONFIG) in message
    assert field in message
    assert "'layer['" in message


@pytest.mark.parametrize(("absent", "present"), [("A", "B"), ("B", "A")])
def test_a_missing_partner_names_the_tensor_that_is_there(tmp_path, absent, present):
    tensors = {**pair("other", 6, 4, 5), **pair("layer", 6, 4, 5)}
    del tensors[f"layer.lora_{absent}.weight"]
    folder = write_raw(tmp_path / "a", tensors)
    message = refusal(folder)
    assert str(folder / WEIGHTS) in message
    assert f"{PREFIX}layer.lora_{present}.weight" in message
    assert f"no lora_{absent}" in message


def test_a_file_without_any_pair_is_an_error(tmp_path):
    folder = write_raw(tmp_path / "a", {"classifier.weight": torch.zeros(2, 2)})
    assert str(folder / WEIGHTS) in refusal(folder)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((4, 5), (6, 3)),
        ((4, 5), (4, 6)),
        ((4, 5), (6, 4, 1, 1)),
        ((4, 5, 3, 3), (6, 4, 3, 3)),
        ((4,), (6, 4)),
        ((4, 5), (6,)),
        ((4, 5), ()),
        ((0, 5), (6, 0)),
        ((4, 0), (6, 4)),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_together_name_file_and_layer(tmp_path, down, up):
    tensors = {"layer.lora_A.weight": torch.zeros(down), "layer.lora_B.weight": torch.zeros(up)}
    folder = write_raw(tmp_path / "a", tensors)
    message = refusal(folder)
    assert str(folder / WEIGHTS) in message
    assert "layer" in message


@pytest.mark.parametrize("declared", [{"r": 8}, {"r": 2}, {"rank_pattern": {"layer": 3}}], ids=str)
def test_a_declared_rank_that_the_tensors_contradict_is_an_error(tmp_path, declared):
    folder = write_raw(tmp_path / "a", pair("layer", 6, 4, 5), **declared)
    message = refusal(folder)
    assert str(folder / CONFIG) in message
    assert "'layer'" in message
    assert "4 rows" in message


@pytest.mark.parametrize("size", [0, 4, 30, -1])
def test_a_truncated_weight_file_is_named(tmp_path, size):
    folder = write_raw(tmp_path / "a", pair("layer", 6, 4, 5))
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:size])
    assert str(folder / WEIGHTS) in refusal(folder)


def test_a_weight_file_of_something_else_is_named(tmp_path):
    folder = write_raw(tmp_path / "a", pair("layer", 6, 4, 5))
    (folder / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert str(folder / WEIGHTS) in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64], ids=str)
def test_factors_of_other_dtypes_are_refused_by_key(tmp_path, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in pair("layer", 6, 4, 5).items()}
    folder = write_raw(tmp_path / "a", tensors)
    message = refusal(folder)
    assert str(folder / WEIGHTS) in message
    assert f"{PREFIX}layer.lora_A.weight" in message


def test_peft_loads_what_was_written_without_missing_or_unexpected_keys(tmp_path):
    source = make_adapter(tmp_path / "adapter", BERT, modules_to_save=["classifier"])
    compress_adapter(source, tmp_path / "out", 3)
    model = get_peft_model(BERT.build(), LoraConfig.from_pretrained(str(tmp_path / "out")))
    result = model.load_adapter(str(tmp_path / "out"), "again")
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora_" in key or "classifier" in key] == []
    assert isinstance(model, PeftModel)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["r"] == 3
