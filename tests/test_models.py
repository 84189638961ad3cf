"""Base models and adapters: loaded, attached, and named when something is missing."""

import json
import shutil

import pytest
import torch
from tiny import save_tiny_bert, save_tiny_gemma, save_tiny_llama

from lora_squeeze.attaching import attach_adapter, attach_lora, base_of, labels_of_adapter, write_labels
from lora_squeeze.errors import AdapterError, ModelError
from lora_squeeze.models import PLAIN_TEMPLATE, device_of, load_model, load_tokenizer, task_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "bert")


def test_a_causal_model_is_loaded_for_inference_in_float32(llama):
    model = load_model(str(llama), device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert task_of(model) == "causal-lm"
    assert {one.dtype for one in load_model(str(llama), device="cpu", dtype="bf16").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_any_model_classifies(name, request):
    model = load_model(
        str(request.getfixturevalue(name)), task="sequence-classification", labels=("a", "b", "c"), device="cpu"
    )
    assert task_of(model) == "sequence-classification"
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert task_of(attach_lora(model, rank=2)) == "sequence-classification"


def test_a_fresh_lora_changes_nothing_and_is_all_that_is_trained(llama):
    model = load_model(str(llama), device="cpu")
    inputs = torch.arange(10)[None]
    before = model(input_ids=inputs).logits
    adapted = attach_lora(model, rank=4, dropout=0.1).eval()
    assert torch.equal(adapted(input_ids=inputs).logits, before)
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    trained = [name for name, one in adapted.named_parameters() if one.requires_grad]
    assert len(trained) == 2 * 7 * 2  # factors, linear layers, blocks
    assert all("lora_" in name for name in trained)


def test_only_the_named_modules_get_a_lora(llama):
    model = attach_lora(load_model(str(llama), device="cpu"), rank=4, alpha=3, target_modules=["q_proj"], rslora=True)
    config = model.peft_config["default"]
    assert (config.lora_alpha, config.use_rslora, config.target_modules) == (3, True, {"q_proj"})
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        attach_lora(load_model(str(llama), device="cpu"), rank=4, target_modules=["query"])


def test_modules_can_be_named_by_regular_expressions(tmp_path):
    folder = str(save_tiny_gemma(tmp_path / "gemma", sees=True))

    def adapted(*names: str) -> set[str]:
        model = attach_lora(load_model(folder, device="cpu"), rank=2, target_modules=names)
        return {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}

    queries = adapted("q_proj")
    assert len(queries) == 2
    assert all(".language_model.layers." in name for name in queries)
    text = adapted(r"language_model\.layers\..*_proj")
    assert len(text) == 2 * 7
    assert adapted() == text
    towers = {name for name in adapted(r".*q_proj") if "vision_tower" in name}
    assert len(towers) == 1
    mixed = adapted(r"language_model\.layers\.1\..*q_proj", "o_proj", "fc1")
    assert {name.rpartition(".")[2] for name in mixed} == {"q_proj", "o_proj", "fc1"}
    assert sum("q_proj" in name for name in mixed) == 1
    with pytest.raises(ModelError, match=r"'\(q_proj' is neither a name nor a regular expression"):
        adapted("(q_proj")


def test_a_saved_adapter_comes_back_and_knows_its_base(llama, tmp_path):
    adapted = attach_lora(load_model(str(llama), device="cpu"), rank=4)
    for name, one in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one.data)
    adapted.save_pretrained(str(tmp_path))
    inputs = torch.arange(10)[None]
    base, task = base_of(str(tmp_path))
    assert (base, task) == (str(llama), "causal-lm")
    again = attach_adapter(load_model(base, task=task, device="cpu"), str(tmp_path))
    assert torch.equal(again(input_ids=inputs).logits, adapted.eval()(input_ids=inputs).logits)
    assert not any(one.requires_grad for one in again.parameters())
    trainable = attach_adapter(load_model(base, device="cpu"), str(tmp_path), trainable=True)
    assert any(one.requires_grad for one in trainable.parameters())


def test_a_tokenizer_gets_what_it_lacks(llama, tmp_path):
    tokenizer = load_tokenizer(str(llama))
    assert (tokenizer.pad_token, tokenizer.chat_template) == ("<pad>", PLAIN_TEMPLATE)
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(folder)).pad_token == "<eos>"
    config.pop("eos_token")
    config.pop("unk_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="padding"):
        load_tokenizer(str(folder))


def test_labels_lie_beside_the_adapter(tmp_path):
    assert labels_of_adapter(str(tmp_path)) == ()
    write_labels(tmp_path, ["böse", "gut"])
    assert labels_of_adapter(str(tmp_path)) == ("böse", "gut")
    (tmp_path / "labels.json").write_text("[")
    with pytest.raises(AdapterError, match=r"labels\.json"):
        labels_of_adapter(str(tmp_path))


def test_what_is_missing_is_named(tmp_path, llama):
    with pytest.raises(ModelError, match="no such folder"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="no such file"):
        load_model(str(tmp_path / "nothing.gguf"))
    with pytest.raises(ModelError, match=r"nobody/nothing: cannot be loaded as causal-lm"):
        load_model("nobody/nothing")
    with pytest.raises(ModelError, match=r"nobody/nothing: its tokenizer"):
        load_tokenizer("nobody/nothing")
    with pytest.raises(ModelError, match="needs its labels"):
        load_model(str(llama), task="sequence-classification")
    with pytest.raises(ModelError, match="'int3' is unknown; known are auto, f32"):
        load_model(str(llama), dtype="int3")
    with pytest.raises(ModelError, match="device 'abacus'"):
        device_of("abacus")
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
        attach_adapter(load_model(str(llama), device="cpu"), str(tmp_path))
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
        base_of(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config\.json: cannot be read"):
        base_of(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="names no base model"):
        base_of(str(tmp_path))


def test_an_adapter_of_another_model_is_refused_by_name(llama, bert, tmp_path):
    attach_lora(load_model(str(llama), device="cpu"), rank=4).save_pretrained(str(tmp_path))
    other = load_model(str(bert), task="sequence-classification", labels=("a", "b"), device="cpu")
    with pytest.raises(AdapterError, match="cannot be loaded onto BertForSequenceClassification"):
        attach_adapter(other, str(tmp_path))


def test_shapes_that_differ_are_said(bert, tmp_path):
    two, one = (
        load_model(str(bert), task="sequence-classification", labels=labels, device="cpu")
        for labels in (("a", "b"), ("a",))
    )
    attach_lora(two, rank=2).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=r"Error\(s\) in loading state_dict for \w+: size mismatch for .*\[2, "):
        attach_adapter(one, str(tmp_path))
