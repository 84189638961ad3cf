"""Moments gathered from real models: what the hooks see is what passes through, padding left out."""

from dataclasses import replace

import pytest
import torch
from adapters import CONVOLUTIONS, WEIGHTS
from evaluated import save_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import save_tiny_bert, save_tiny_llama
from torch.nn import functional

from lora_squeeze import decompose, fixed, open_adapter, squeeze
from lora_squeeze.annealing.live import sites
from lora_squeeze.calibration import calibrate
from lora_squeeze.data import read_examples
from lora_squeeze.errors import AdapterError, DataError, ModelError, UnsupportedAdapter
from lora_squeeze.evaluation.rows import Batch, batches_of, digest_of, learnt_rows
from lora_squeeze.evaluation.subject import open_subject
from lora_squeeze.models import load_model
from lora_squeeze.moments import Seen, merge_moments, read_moments, save_moments

SEEN = Seen("made up", "0" * 64, 1)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    base = save_tiny_llama(folder / "base")
    adapters = {
        "plain": save_adapter(base, folder / "plain"),
        "embedding": save_adapter(base, folder / "embedding", target_modules=["embed_tokens", "q_proj"]),
        "dora": save_adapter(base, folder / "dora", use_dora=True),
    }
    return str(base), {name: str(path) for name, path in adapters.items()}


def subject_of(language_model, name="plain"):
    base, adapters = language_model
    return open_subject([adapters[name]], base=base, dtype="f32")


def examples_of(source="builtin:sums:7"):
    return read_examples(source)


def batches(subject, examples, *, batch_size=1):
    rows = learnt_rows(examples, subject.tokenizer, task=subject.task, labels=subject.labels)
    return batches_of(rows, subject.tokenizer, batch_size=batch_size)


def watched(subject, examples):
    """Inputs of every LoRA module and gradients at its output, of examples run one by one."""
    inputs, gradients = {}, {}
    handles = []
    for name, site in sites(subject.model).items():
        inputs[name], gradients[name] = [], []
        site.down.requires_grad_(True)

        def watch(_module, args, output, name=name):
            inputs[name].append(args[0].detach().flatten(0, 1))
            output.register_hook(lambda grad: gradients[name].insert(0, grad.detach().flatten(0, 1)))

        handles.append(site.module.register_forward_hook(watch))
    for batch in batches(subject, examples):
        logits = subject.model(**batch.inputs).logits
        if batch.labels.ndim > 1:
            logits, labels = logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
        else:
            labels = batch.labels
        functional.cross_entropy(logits, labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for site in sites(subject.model).values():
        site.down.requires_grad_(False)
    return inputs, gradients


def second_moment(rows):
    return rows.double().T @ rows.double()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("source", ["builtin:sums:7", "builtin:texts:5", "builtin:choices:4"])
def test_the_moments_are_those_of_what_passes_through(language_model, source, batch_size):
    subject, examples = subject_of(language_model), examples_of(source)
    inputs, gradients = watched(subject, examples)
    moments = calibrate(subject.model, batches(subject, examples, batch_size=batch_size), seen=SEEN, gradients=True)
    assert moments.tokens == sum(map(len, inputs["model.layers.0.self_attn.q_proj"]))
    for name, site in sites(subject.model).items():
        found = moments.layers[name]
        down = second_moment(torch.cat(inputs[name]) @ site.down.T)
        up = second_moment(torch.cat(gradients[name]) @ site.up)
        assert found.rows == moments.tokens
        assert torch.allclose(found.down, down, rtol=1e-4, atol=1e-5 * float(down.trace()))
        assert torch.allclose(found.up, up, rtol=1e-3, atol=1e-4 * float(up.trace()))


def test_batches_and_their_order_do_not_matter(language_model):
    subject, examples = subject_of(language_model), examples_of("builtin:texts:9")
    one = calibrate(subject.model, batches(subject, examples), seen=SEEN, gradients=True)
    other = calibrate(subject.model, batches(subject, examples[::-1], batch_size=4), seen=SEEN, gradients=True)
    for name, layer in one.layers.items():
        assert torch.allclose(layer.down, other.layers[name].down, rtol=1e-4, atol=1e-6 * float(layer.down.trace()))
        assert torch.allclose(layer.up, other.layers[name].up, rtol=1e-3, atol=1e-4 * float(layer.up.trace()))


@pytest.mark.parametrize("gradients", [False, True])
def test_shards_add_up_to_the_whole(language_model, gradients):
    subject, examples = subject_of(language_model), examples_of("builtin:texts:9")

    def take(part, number):
        seen = Seen(f"part {number}", digest_of(part), len(part))
        return calibrate(subject.model, batches(subject, part), seen=seen, gradients=gradients)

    whole = take(examples, 0)
    merged = merge_moments([take(examples[start::3], start + 1) for start in range(3)])
    assert (merged.tokens, merged.examples, merged.gradients) == (whole.tokens, 9, gradients)
    for name, layer in whole.layers.items():
        assert merged.layers[name].rows == layer.rows
        assert torch.allclose(merged.layers[name].down, layer.down, rtol=1e-12, atol=1e-12)
        if gradients:
            assert torch.allclose(merged.layers[name].up, layer.up, rtol=1e-12, atol=1e-16)


def test_the_model_is_left_as_it_was(language_model):
    subject = subject_of(language_model)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in subject.model.named_parameters()}
    calibrate(subject.model, batches(subject, examples_of()), seen=SEEN, gradients=True)
    for name, parameter in subject.model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None
    assert not any(module._forward_hooks for module in subject.model.modules())


def test_embeddings_are_looked_up(language_model):
    subject, examples = subject_of(language_model, "embedding"), examples_of()
    rows = learnt_rows(examples, subject.tokenizer, task=subject.task)
    ids = torch.tensor([token for row in rows for token in row.encoded.input_ids])
    moments = calibrate(subject.model, batches(subject, examples, batch_size=3), seen=SEEN, gradients=True)
    site = sites(subject.model)["model.embed_tokens"]
    assert torch.allclose(moments.layers["model.embed_tokens"].down, second_moment(site.down.detach().T[ids]))
    gradients = watched_outputs(subject, examples, "model.embed_tokens")
    up = second_moment(torch.cat(gradients) @ site.up.detach())
    assert torch.allclose(moments.layers["model.embed_tokens"].up, up, rtol=1e-3, atol=1e-4 * float(up.trace()))


def watched_outputs(subject, examples, name):
    site, gradients = sites(subject.model)[name], []
    site.down.requires_grad_(True)
    handle = site.module.register_forward_hook(_keep_gradient(gradients))
    for batch in batches(subject, examples):
        logits = subject.model(**batch.inputs).logits
        labels = batch.labels[:, 1:].flatten()
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum").backward()
    handle.remove()
    return gradients


def _keep_gradient(gradients):
    def watch(_module, _args, output):
        output.register_hook(lambda grad: gradients.append(grad.detach().flatten(0, 1)))

    return watch


def test_dora_counts_inputs_and_not_its_own_products(language_model):
    plain, dora = subject_of(language_model), subject_of(language_model, "dora")
    first = "model.layers.0.self_attn.q_proj"  # before any difference between the two
    one, other = (calibrate(one.model, batches(one, examples_of()), seen=SEEN) for one in (plain, dora))
    assert other.layers[first].rows == one.layers[first].rows
    assert torch.allclose(one.layers[first].down, other.layers[first].down)


def test_a_classifier_and_its_pooled_inputs(tmp_path):
    base = save_tiny_bert(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", task="SEQ_CLS", target_modules=["query", "dense"])
    examples = read_examples("builtin:sentiment:9")
    subject = open_subject([str(adapter)], base=str(base), examples=examples)
    assert subject.labels == ("negative", "positive")
    one = calibrate(subject.model, batches(subject, examples), seen=SEEN, gradients=True)
    other = calibrate(subject.model, batches(subject, examples, batch_size=4), seen=SEEN, gradients=True)
    assert one.layers["bert.pooler.dense"].rows == 9
    assert one.layers["bert.encoder.layer.0.attention.self.query"].rows == one.tokens > 9
    for name, layer in one.layers.items():
        assert torch.allclose(layer.down, other.layers[name].down, rtol=1e-4, atol=1e-6 * float(layer.down.trace()))
        assert float(layer.up.trace()) > 0


def test_convolutions_count_every_place_of_the_kernel():
    torch.manual_seed(0)
    model = get_peft_model(CONVOLUTIONS.build(), LoraConfig(r=3, target_modules=["first", "sequence"])).eval()
    seen = {}
    for name in ("first", "sequence"):
        module = model.base_model.model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args: seen.__setitem__(module, args[0].detach()))
    batch = Batch((), {"tokens": CONVOLUTIONS.inputs[0]}, torch.zeros(0))
    moments = calibrate(model, [batch], seen=SEEN)
    module = model.base_model.model.first
    patches = functional.unfold(functional.pad(seen[module], (0, 0, 1, 1)), (3, 1)).transpose(1, 2).flatten(0, 1)
    down = module.lora_A["default"].weight.detach().flatten(1)
    assert moments.layers["first"].rows == len(patches)
    assert torch.allclose(moments.layers["first"].down, second_moment(patches @ down.T), rtol=1e-5, atol=1e-5)
    assert moments.tokens == 2  # examples, as these are no tokens


def test_grouped_convolutions_have_moments_for_each_group():
    model = torch.nn.Sequential(torch.nn.Conv1d(6, 4, 3, groups=2))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0"])).eval()
    moments = calibrate(model, [Batch((), {"input": torch.randn(2, 6, 9)}, torch.zeros(0))], seen=SEEN)
    assert {name: tuple(layer.down.shape) for name, layer in moments.layers.items()} == {"0#0": (2, 2), "0#1": (2, 2)}


class _Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, values):
        return self.attention(values, values, values)[0]


def test_what_shows_no_activation_is_refused_by_name():
    model = get_peft_model(_Attention(), LoraConfig(r=2, target_modules=["attention"])).eval()
    with pytest.raises(UnsupportedAdapter, match=r"'attention#?.*MultiheadAttention.*without --calibration"):
        calibrate(model, [], seen=SEEN)


class _Routed(torch.nn.Module):
    """Sends some of its rows through a layer, in an order of its own."""

    def __init__(self):
        super().__init__()
        self.embedding, self.expert = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask):
        return self.expert(self.embedding(input_ids).flatten(0, 1)[::2])


def test_padding_that_cannot_be_told_apart_is_an_error_and_without_padding_it_works():
    model = get_peft_model(_Routed(), LoraConfig(r=2, target_modules=["expert"])).eval()
    ids, mask = torch.arange(12).reshape(2, 6), torch.ones(2, 6, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert calibrate(model, [Batch((), inputs, mask)], seen=SEEN).layers["expert"].rows == 6
    mask[1, 4:] = 0
    with pytest.raises(ModelError, match=r"layer 'expert'.*--batch-size 1"):
        calibrate(model, [Batch((), inputs, mask)], seen=SEEN)


def test_a_layer_that_is_never_reached_counts_as_zero(language_model, tmp_path):
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)

        def forward(self, values):
            return self.used(values)

    model = get_peft_model(Half(), LoraConfig(r=3, target_modules=["used", "unused"], init_lora_weights=False)).eval()
    model.save_pretrained(str(tmp_path / "adapter"))
    moments = calibrate(model, [Batch((), {"values": torch.randn(7, 6)}, torch.zeros(0))], seen=SEEN)
    decomposition = decompose(open_adapter(tmp_path / "adapter"), moments=moments)
    energies = {spectrum.name: spectrum.energy for spectrum in decomposition.spectra}
    assert energies["unused"] == 0 < energies["used"]
    assert any("1 layers were never reached" in note for note in decomposition.adapter.notes)


# --- files ------------------------------------------------------------------------------------------------------


def taken(language_model, *, gradients=False, source="builtin:sums:7"):
    subject, examples = subject_of(language_model), examples_of(source)
    return calibrate(
        subject.model,
        batches(subject, examples),
        seen=Seen(source, digest_of(examples), len(examples)),
        gradients=gradients,
        adapter_sha256=subject.adapters["default"].sha256(),
        base_model=subject.base,
    )


@pytest.mark.parametrize("gradients", [False, True])
def test_a_file_holds_what_was_saved(language_model, tmp_path, gradients):
    moments = taken(language_model, gradients=gradients)
    save_moments(moments, tmp_path / "moments.safetensors")
    found = read_moments(tmp_path / "moments.safetensors")
    assert (found.tokens, found.adapter_sha256, found.base_model, found.seen) == (
        moments.tokens,
        moments.adapter_sha256,
        moments.base_model,
        moments.seen,
    )
    assert len(found.identity) == 64
    for name, layer in moments.layers.items():
        assert torch.equal(found.layers[name].down, layer.down)
        assert (found.layers[name].up is None) == (not gradients)
        assert found.layers[name].rows == layer.rows


def test_what_does_not_belong_together_is_not_merged(language_model):
    moments = taken(language_model)
    with pytest.raises(DataError, match="the same 7 examples would count twice"):
        merge_moments([moments, moments])
    other = taken(language_model, source="builtin:sums:5")
    assert merge_moments([moments, other]).examples == 12
    with pytest.raises(DataError, match="with gradients and some without"):
        merge_moments([moments, taken(language_model, gradients=True, source="builtin:sums:5")])
    with pytest.raises(DataError, match="different adapters"):
        merge_moments([moments, replace(other, adapter_sha256="1" * 64)])
    with pytest.raises(DataError, match=r"different base models.*'another'"):
        merge_moments([moments, replace(other, base_model="another")])


def test_files_that_hold_no_moments_are_named(language_model, tmp_path):
    _, adapters = language_model
    with pytest.raises(AdapterError, match="holds no moments"):
        read_moments(tmp_path / adapters["plain"] / WEIGHTS)
    with pytest.raises(AdapterError, match="no such file"):
        read_moments(tmp_path / "nothing.safetensors")


def test_a_file_with_nan_is_refused(language_model, tmp_path):
    moments = taken(language_model)
    next(iter(moments.layers.values())).down[0, 0] = float("nan")
    save_moments(moments, tmp_path / "moments.safetensors")
    with pytest.raises(AdapterError, match=r"layer 'model\.layers\.0.*finite"):
        read_moments(tmp_path / "moments.safetensors")


# --- what it is good for ----------------------------------------------------------------------------------------


def test_the_outputs_of_layers_change_less_than_without_data(language_model, tmp_path):
    base, adapters = language_model
    subject, examples = subject_of(language_model), examples_of("builtin:texts:9")
    inputs, _ = watched(subject, examples)
    moments = taken(language_model, source="builtin:texts:9")
    adapter = open_adapter(adapters["plain"])
    plain, on_data = decompose(adapter), decompose(adapter, moments=moments)
    reports = {
        name: squeeze(found, fixed(found.spectra, 2), tmp_path / name)
        for name, found in (("plain", plain), ("calibrated", on_data))
    }

    def errors(folder):
        written = open_adapter(tmp_path / folder)
        found = {}
        for name, layer in ((name, adapter.load(name)) for name in adapter.layers):
            rows, after = torch.cat(inputs[name]).double(), written.load(name)
            before = layer.scale * rows @ layer.down.double().T @ layer.up.double().T
            change = before - after.scale * rows @ after.down.double().T @ after.up.double().T
            found[name] = float(change.norm() / before.norm())
        return found

    ours, theirs = errors("calibrated"), errors("plain")
    assert all(ours[name] <= theirs[name] * (1 + 1e-5) for name in ours)
    assert sum(ours.values()) < 0.97 * sum(theirs.values())
    for layer in reports["calibrated"].layers:  # what is reported is what happens
        assert layer.relative_error == pytest.approx(ours[layer.spectrum.name], rel=1e-3)
    model = PeftModel.from_pretrained(load_model(base), str(tmp_path / "calibrated"))
    assert model.peft_config["default"].r == 2
