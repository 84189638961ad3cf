"""A model with adapters on it: which fit, whose copy is loaded, and which order a classifier's classes have."""

import shutil
from pathlib import Path

import pytest
import torch
from evaluated import save_world
from safetensors.torch import load_file, save_file
from test_hub import server  # noqa: F401

from lora_squeeze import decompose
from lora_squeeze.attaching import attach_adapter, use_adapter, write_labels
from lora_squeeze.data import Labelled, read_examples
from lora_squeeze.errors import AdapterError, DataError
from lora_squeeze.evaluation.measure import run, squeezed, trial_of
from lora_squeeze.evaluation.subject import loaded, open_subject
from lora_squeeze.models import load_model
from lora_squeeze.records import Ranks


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("world"))


def classifier_subject(world, examples, *names):
    paths = [str(world / name) for name in names or ("c",)]
    return open_subject(paths, base=str(world / "bert"), examples=examples, dtype="f32")


def turned_over(adapter, folder, labels):
    """The same classifier with its classes in the opposite order, and what they are called beside both."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    heads = [key for key in tensors if "classifier" in key]
    assert len(heads) == 2
    save_file(tensors | {key: tensors[key].flip(0).contiguous() for key in heads}, file, metadata={"format": "pt"})
    write_labels(folder, labels[::-1])
    return folder


@pytest.mark.parametrize("given", [(), ("negative", "positive"), ("positive", "negative")], ids=str)
@pytest.mark.parametrize("turn", [1, -1])
def test_each_classifier_has_the_order_of_its_own_head(world, tmp_path, given, turn):
    labels = ("negative", "positive")
    plain = Path(shutil.copytree(world / "c", tmp_path / "plain"))
    write_labels(plain, labels)
    paths = [str(plain), str(turned_over(plain, tmp_path / "over", labels))][::turn]
    examples = read_examples("builtin:sentiment:30")
    subject = open_subject(paths, base=str(world / "bert"), examples=examples, labels=given, dtype="f32")
    squeezed_too = squeezed(subject, decompose(subject.adapters["adapter1"]), [Ranks("all", dict.fromkeys(
        subject.adapters["adapter1"].layers, 4))], adapter="adapter1")  # fmt: skip
    contestants = [loaded(subject), loaded(subject, "adapter1"), *squeezed_too]
    first, *others = run(subject, contestants, trial_of(subject, examples))
    alone = open_subject(paths[:1], base=str(world / "bert"), examples=examples, labels=given, dtype="f32")
    (expected,) = run(alone, [loaded(alone)], trial_of(alone, examples))
    assert torch.equal(first["loss"][0], expected["loss"][0])
    for other in others:
        assert torch.allclose(other["loss"][0], first["loss"][0], rtol=1e-5)
        assert torch.equal(other["accuracy"][0], first["accuracy"][0])
        assert float(other["agreement"][0].mean()) == 1


def test_classifiers_of_other_classes_are_not_compared(world, tmp_path):
    paths = [Path(shutil.copytree(world / "c", tmp_path / name)) for name in ("one", "other")]
    write_labels(paths[0], ("negative", "positive"))
    write_labels(paths[1], ("bad", "good"))
    options = {"base": str(world / "bert"), "examples": read_examples("builtin:sentiment:4"), "dtype": "f32"}
    with pytest.raises(DataError, match=r"other: its classes are bad, good, and those of .*one neg.*--labels"):
        open_subject([str(path) for path in paths], **options)
    subject = open_subject([str(path) for path in paths], labels=("negative", "positive"), **options)
    assert subject.orders == {}


def test_a_classifier_without_labels_beside_it_has_the_order_of_the_first(world, tmp_path):
    named = Path(shutil.copytree(world / "c", tmp_path / "named"))
    write_labels(named, ("positive", "negative"))
    examples = read_examples("builtin:sentiment:12")
    subject = classifier_subject(world, examples, named, "c")
    assert subject.labels == ("positive", "negative")
    first, other = run(subject, [loaded(subject), loaded(subject, "adapter1")], trial_of(subject, examples))
    assert torch.allclose(first["loss"][0], other["loss"][0])


def test_classes_that_nobody_named_are_asked_for(world):
    examples = tuple(Labelled("x", str(number)) for number in range(3))
    with pytest.raises(DataError, match=r"head has 2 classes, and the data have 3.*--labels"):
        classifier_subject(world, examples)


def test_an_adapter_from_the_hub_is_loaded_from_its_copy(world, server):  # noqa: F811
    server.add("user/repo", {file.name: file.read_bytes() for file in (world / "a").iterdir()})
    subject = open_subject(["user/repo"], base=str(world / "llama"), dtype="f32")
    assert subject.adapters["default"].origin.startswith("hf://user/repo@")


def test_an_adapter_for_another_model_is_named(world):
    with pytest.raises(AdapterError, match=r"c: cannot be loaded onto LlamaForCausalLM"):
        open_subject([str(world / "a"), str(world / "c")], base=str(world / "llama"))


def renamed(adapter, folder):
    """The same factors under names that the model does not have, as of another class of it."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    named = {key.replace("model.layers", "model.transformer.layers"): one for key, one in load_file(file).items()}
    assert not named.keys() & load_file(file).keys()
    save_file(named, file, metadata={"format": "pt"})
    return str(folder)


def test_a_later_adapter_that_does_not_fit_is_refused_as_the_first_is(world, tmp_path):
    stranger = renamed(world / "b", tmp_path / "stranger")
    for paths in ([stranger], [str(world / "a"), stranger], [str(world / "a"), str(world / "b"), stranger]):
        with pytest.raises(AdapterError, match=r"stranger: does not fit LlamaForCausalLM.*first: base_model"):
            open_subject(paths, base=str(world / "llama"))


def test_one_that_is_to_compute_is_refused_if_it_does_not_fit(world, tmp_path):
    model = attach_adapter(load_model(str(world / "llama"), dtype="f32"), str(world / "a"))
    with pytest.raises(AdapterError, match=r"stranger: does not fit LlamaForCausalLM"):
        use_adapter(model, renamed(world / "b", tmp_path / "stranger"), name="evaluated")
    use_adapter(model, str(world / "b"), name="again")
    assert model.active_adapter == "again"
