"""A PEFT model in memory is the same adapter as its file, and takes new factors of any rank."""

import math

import pytest
import torch
from adapters import BASES, BERT, LLAMA, Base, load, lora_modules, make_adapter, output, relative
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from test_peft_experts import MIXTRAL
from test_peft_kinds import ATTENTION, GROUPED, VOLUMES

from lora_squeeze import compress, decompose, fixed, open_adapter, save_adapter
from lora_squeeze.annealing.live import live_adapter, put_factors
from lora_squeeze.errors import AdapterError, RankError, UnsupportedAdapter
from lora_squeeze.records import Ranks

KINDS = {**BASES, "attention": ATTENTION, "volumes": VOLUMES, "grouped": GROUPED, "experts": MIXTRAL}


def opened(tmp_path, base: Base, **lora):
    """A model in memory, and the folder it was loaded from."""
    folder = make_adapter(tmp_path / "source", base, **lora)
    return PeftModel.from_pretrained(base.build(), str(folder), is_trainable=True), folder


def squeeze_in_place(model, ranks: Ranks, **options):
    """Every layer truncated in float32, through compress and put_factors."""
    small = compress(decompose(live_adapter(model)), ranks)
    loaded = {name: small.load(name) for name in small.layers}
    factors = {name: (layer.down, layer.up) for name, layer in loaded.items()}
    put_factors(model, factors, scale={name: layer.scale for name, layer in loaded.items()}, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_layers_as_the_file(tmp_path, kind):
    model, folder = opened(tmp_path, KINDS[kind])
    live, file = live_adapter(model), open_adapter(folder)
    assert dict(live.layers) == dict(file.layers)
    for name in file.layers:
        assert torch.equal(live.load(name).down, file.load(name).down)
        assert torch.equal(live.load(name).up, file.load(name).up)
    assert {one.key: (one.dtype, one.shape) for one in live.pass_through} == {
        one.key: (one.dtype, one.shape)
        for one in file.pass_through
        if not one.key.endswith(".base_layer.weight")  # PEFT adds the base embedding to the file
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_new_factors_act_are_saved_and_load_at_their_ranks(tmp_path, kind, rslora):
    base = KINDS[kind]
    model, folder = opened(tmp_path, base, use_rslora=rslora)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    squeeze_in_place(model, fixed(live_adapter(model).layers.values(), 2))
    assert all(
        one is two for one, two in zip(parameters, (p for p in model.parameters() if p.requires_grad), strict=True)
    )
    model.save_pretrained(str(tmp_path / "small"))
    from_file = load(base, tmp_path / "small")
    assert {layer.rank for layer in open_adapter(tmp_path / "small").layers.values()} == {2}
    assert relative(output(from_file, base), output(model.double().eval(), base)) < 1e-6
    save_adapter(compress(open_adapter(folder), fixed(open_adapter(folder).layers.values(), 2)), tmp_path / "f")
    assert relative(output(from_file, base), output(load(base, tmp_path / "f"), base)) < 1e-6


def test_a_live_adapter_can_be_saved_as_it_is(tmp_path):
    model, folder = opened(tmp_path, BERT, modules_to_save=["classifier"], use_dora=True, bias="lora_only")
    save_adapter(live_adapter(model), tmp_path / "saved")
    assert torch.equal(output(load(BERT, tmp_path / "saved"), BERT), output(load(BERT, folder), BERT))


def test_differing_ranks_and_scales_are_written_into_the_configuration(tmp_path):
    model, _ = opened(tmp_path, LLAMA)
    names = list(live_adapter(model).layers)
    ranks = {name: 1 + number % 4 for number, name in enumerate(names)}
    squeeze_in_place(model, Ranks("by hand", ranks))
    layer = live_adapter(model).load(names[0])
    put_factors(model, {names[0]: (layer.down * 2, layer.up)}, scale=layer.scale / 2)
    for name, module in lora_modules(model):
        assert module.r["default"] == ranks[name]
        assert module.lora_A["default"].out_features == module.lora_B["default"].in_features == ranks[name]
        assert math.isclose(module.scaling["default"], module.lora_alpha["default"] / ranks[name])
    model.save_pretrained(str(tmp_path / "small"))
    again = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path / "small")).eval()
    assert torch.allclose(output(again, LLAMA), output(model.eval(), LLAMA), atol=1e-6)
    assert {name: module.r["default"] for name, module in lora_modules(again)} == ranks


def test_only_the_named_adapter_changes(tmp_path):
    model, _ = opened(tmp_path, LLAMA)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items() if ".other." in name}
    config = model.peft_config["other"].to_dict()
    squeeze_in_place(model, fixed(live_adapter(model).layers.values(), 3))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model.peft_config["other"].to_dict() == config
    assert set(live_adapter(model, "other").layers) == {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}
    squeeze_in_place(model, fixed(live_adapter(model).layers.values(), 2))
    assert live_adapter(model).rank == 2


def test_the_configuration_that_the_model_was_made_with_stays_as_it_is():
    config = LoraConfig(r=8, target_modules=["q_proj"])
    model = get_peft_model(LLAMA.build(), config)
    squeeze_in_place(model, fixed(live_adapter(model).layers.values(), 2))
    assert (config.r, model.peft_config["default"].r) == (8, 2)
    assert model.active_peft_config.r == 2


def test_wrapped_models_are_the_model_inside(tmp_path):
    model, _ = opened(tmp_path, LLAMA)
    assert dict(live_adapter(torch.compile(model)).layers) == dict(live_adapter(model).layers)
    assert dict(live_adapter(torch.nn.DataParallel(model)).layers) == dict(live_adapter(model).layers)


def test_training_goes_on_with_new_factors(tmp_path):
    model, _ = opened(tmp_path, LLAMA)
    tokens = LLAMA.inputs[0]
    model(tokens, labels=tokens).loss.backward()
    squeeze_in_place(model, fixed(live_adapter(model).layers.values(), 3))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is None for parameter in trained)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in trained)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, model.peft_config["default"].to_dict()


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (lambda layer: {"nobody": (layer.down, layer.up)}, "'nobody' is not in the adapter"),
        (lambda layer: {layer.name: (layer.down, layer.up[:, :3])}, r"A \[8, 32\] and B \[32, 3\] do not fit"),
        (lambda layer: {layer.name: (layer.down[:0], layer.up[:, :0])}, "do not fit"),
    ],
)
def test_what_does_not_fit_changes_nothing(tmp_path, factors, message):
    model, _ = opened(tmp_path, LLAMA)
    layer = live_adapter(model).load("model.layers.0.self_attn.q_proj")
    good = live_adapter(model).load("model.layers.1.self_attn.q_proj")
    state, config = state_of(model)
    with pytest.raises(RankError, match=message):
        put_factors(model, {good.name: (good.down[:1], good.up[:, :1]), **factors(layer)})
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert model.peft_config["default"].to_dict() == config


def test_the_parts_of_a_module_come_together(tmp_path):
    model, _ = opened(tmp_path, MIXTRAL)
    name = next(name for name in live_adapter(model).layers if name.endswith("#1"))
    layer = live_adapter(model).load(name)
    with pytest.raises(RankError, match="give all of them"):
        put_factors(model, {name: (layer.down, layer.up)})
    factors = {part: (layer.down, layer.up) for part in live_adapter(model).layers if part[:-1] == name[:-1]}
    with pytest.raises(RankError, match="share one scale"):
        put_factors(model, factors, scale={name: 3.0})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "changed the base weights"),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="mica"), "module 'model.layers.0.*MiCA"),
        (AdaLoraConfig(target_modules=["q_proj"], total_step=9), "ADALORA chooses its ranks itself"),
    ],
)
def test_what_is_no_plain_update_is_refused_by_name(config, message):
    model = get_peft_model(LLAMA.build(), config)
    with pytest.raises(UnsupportedAdapter, match=message):
        live_adapter(model)


def test_merged_and_tied_adapters_are_refused(tmp_path):
    model, _ = opened(tmp_path, LLAMA)
    model.merge_adapter()
    with pytest.raises(UnsupportedAdapter, match="is merged; call unmerge_adapter"):
        live_adapter(model)
    model.unmerge_adapter()
    modules = dict(lora_modules(model))
    first, second = (modules[f"model.layers.{layer}.self_attn.q_proj"] for layer in (0, 1))
    second.lora_A["default"].weight = first.lora_A["default"].weight
    with pytest.raises(UnsupportedAdapter, match="share factors"):
        live_adapter(model)


def test_models_without_this_adapter(tmp_path):
    with pytest.raises(AdapterError, match="has no PEFT adapter"):
        live_adapter(LLAMA.build())
    model, _ = opened(tmp_path, LLAMA)
    with pytest.raises(AdapterError, match="no adapter 'other'; it has default"):
        live_adapter(model, "other")
