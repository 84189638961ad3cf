"""What training loops have beside a model and an optimizer goes on when the rank changes."""

import pytest
import torch
import torch._dynamo.testing
from adapters import LLAMA, lora_modules, output, relative
from loops import SCHEDULE, adamw, loop
from peft import LoraConfig, get_peft_model
from test_switch import balanced_layer, build, loss_of, trained, uniform, updates

from lora_squeeze.annealing.live import live_adapter
from lora_squeeze.annealing.schedule import custom
from lora_squeeze.annealing.squeezer import Squeezer
from lora_squeeze.annealing.switch import switch
from lora_squeeze.records import Ranks


def test_gradients_that_are_being_accumulated_are_carried_along():
    """A full-rank switch between two halves of a batch changes nothing: the sum is the same."""
    ends = []
    for switched in (False, True):
        model = build(dtype=torch.float64)
        balanced_layer(model, 1)  # so that the switch is a rotation
        optimizer = torch.optim.SGD(trained(model), lr=0.1)
        loss_of(model, LLAMA).backward()
        if switched:
            switch(model, [optimizer], uniform(8), balance="balanced")
        loss_of(model, LLAMA).backward()
        optimizer.step()
        ends.append(updates(model))
    assert relative(*ends) < 1e-10


def test_scaler_and_clipping_go_on():
    model = build()
    optimizer = adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    squeezer = Squeezer(model, optimizer, SCHEDULE)
    for _ in range(7):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, LLAMA)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert torch.nn.utils.clip_grad_norm_(trained(model), 1.0) > 0
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        squeezer.step()
    assert live_adapter(model).rank == 2
    assert scaler.get_scale() == 2.0**10


def test_a_loss_that_is_kept_does_no_harm():
    """Its graph holds the node at which gradients of the old shape arrive."""
    model = build()
    optimizer = adamw(model)
    squeezer = Squeezer(model, optimizer, SCHEDULE)
    kept = []
    for _ in range(7):
        kept.append(loss_of(model, LLAMA))
        kept[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        squeezer.step()
    assert live_adapter(model).rank == 2


def test_a_compiled_model_is_compiled_again():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    model = get_peft_model(layers, LoraConfig(r=8, target_modules=["0", "2"]))
    optimizer = adamw(model)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    squeezer = Squeezer(compiled, optimizer, SCHEDULE)
    batch, frames = torch.randn(5, 12), []
    for _ in range(7):
        compiled(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        squeezer.step()
        frames.append(counter.frame_count)
    assert frames[0] == frames[2] < frames[3] == frames[4] < frames[5] == frames[6]
    assert torch.allclose(compiled(batch), model(batch), atol=1e-6)


def test_gradient_checkpointing():
    ends = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        optimizer = adamw(model)
        loop(model, optimizer, Squeezer(model, optimizer, SCHEDULE), 7)
        ends.append(updates(model))
    assert torch.allclose(*ends, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base(bits):
    bnb = pytest.importorskip("bitsandbytes")
    base = LLAMA.build()
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                if bits == 4:
                    new = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4")
                    new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                else:
                    new = bnb.nn.Linear8bitLt(child.in_features, child.out_features, bias=False, has_fp16_weights=False)
                    new.weight = bnb.nn.Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)
                setattr(module, name, new.to("cpu"))
    setattr(base, f"is_loaded_in_{bits}bit", True)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    optimizer = adamw(model, lr=1e-2)
    squeezer = Squeezer(model, optimizer, SCHEDULE)
    loop(model, optimizer, squeezer, 7)
    assert live_adapter(model).rank == 2
    assert "bnb" in type(next(lora_modules(model))[1]).__module__


def test_dora_keeps_its_magnitudes_and_a_full_switch_its_outputs():
    model = build(use_dora=True).eval()
    magnitudes = {name: one.clone() for name, one in model.named_parameters() if "magnitude" in name}
    optimizer = adamw(model)
    before = output(model, LLAMA)
    switch(
        model,
        [optimizer],
        lambda spectra: Ranks("all", dict.fromkeys((s.name for s in spectra), 8)),
        balance="balanced",
    )
    assert relative(output(model, LLAMA), before) < 1e-5
    squeezer = Squeezer(model, optimizer, custom([(0, 4)], 5))
    assert all(torch.equal(one, magnitudes[name]) for name, one in model.named_parameters() if name in magnitudes)
    loop(model, optimizer, squeezer, 3)


def test_only_the_named_adapter_is_squeezed():
    model = build()
    model.add_adapter("second", LoraConfig(r=6, target_modules=["q_proj"]))
    model.set_adapter("second")
    optimizer = adamw(model)
    Squeezer(model, optimizer, custom([(0, 2)], 5), adapter_name="second")
    assert (live_adapter(model, "second").rank, live_adapter(model).rank) == (2, 8)
