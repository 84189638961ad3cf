"""A switch of ranks inside a training: what it keeps exactly, what it drops, and that it is all or nothing."""

import copy
import gc
import weakref

import pytest
import torch
from adapters import BASES, BERT, LLAMA, Base, factors, lora_modules, relative, truncation, update
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_peft_experts import MIXTRAL
from test_peft_kinds import GROUPED, VOLUMES

from lora_squeeze import fixed
from lora_squeeze.adapter import LoraLayer
from lora_squeeze.annealing import switch as switch_module
from lora_squeeze.annealing.change import BALANCES, changes_to
from lora_squeeze.annealing.live import live_adapter
from lora_squeeze.annealing.switch import switch
from lora_squeeze.errors import AdapterError, RankError, SettingsError
from lora_squeeze.records import Ranks
from lora_squeeze.spectrum import basis

KINDS = {**BASES, "volumes": VOLUMES, "grouped": GROUPED, "experts": MIXTRAL}


def build(base: Base = LLAMA, *, dtype=torch.float32, seed=0, **lora):
    """A model with a random adapter, as in the middle of a training."""
    model = get_peft_model(base.build(), LoraConfig(**{"r": 8, "lora_alpha": 16, **base.lora, **lora}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in lora_modules(model):
            down, up = factors(module)
            down.copy_(torch.randn(down.shape, generator=generator) * 0.3)
            up.copy_(torch.randn(up.shape, generator=generator) * 0.1)
    return model.to(dtype)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def forward(model, base: Base):
    """Logits, with inputs in the model's own precision."""
    dtype = next(model.parameters()).dtype
    result = model(*(one.to(dtype) if one.is_floating_point() else one for one in base.inputs))
    return getattr(result, "logits", result)


def loss_of(model, base: Base):
    return (forward(model, base) - 1).square().mean()


def train(model, optimizer, base: Base, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, base).backward()
        optimizer.step()


def updates(model):
    return torch.cat([update(module).flatten() for _, module in lora_modules(model)])


def uniform(rank):
    return lambda spectra: fixed(spectra, rank)


def product(layer):
    """scale · B · A in float64; of what a live layer holds now."""
    return layer.scale * layer.up.double() @ layer.down.double()


# --- what a switch leaves alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("balance", BALANCES)
def test_a_switch_that_drops_nothing_changes_no_logits(kind, balance):
    base = KINDS[kind]
    model = build(base).eval()
    before = forward(model, base).detach()
    done = switch(model, [], uniform(8), balance=balance)
    assert relative(forward(model, base).detach(), before) < 1e-5
    assert done.retained_variance == 1.0
    assert done.parameters_before == done.parameters_after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("balance", BALANCES)
def test_a_switch_is_the_truncation_of_every_update(kind, balance):
    base = KINDS[kind]
    model = build(base).eval()
    live = live_adapter(model)
    parts = {name: live.load(name) for name in live.layers}
    expected = {name: truncation(product(layer), 2) for name, layer in parts.items()}
    before = {name: product(layer) for name, layer in parts.items()}
    done = switch(model, [], uniform(2), balance=balance)
    live = live_adapter(model)
    for name, matrix in expected.items():
        layer = live.load(name)
        assert relative(product(layer), matrix) < 1e-5
    lost = sum(float((before[name] - expected[name]).square().sum()) for name in before)
    energy = sum(float(one.square().sum()) for one in before.values())
    assert done.relative_change == pytest.approx((lost / energy) ** 0.5, rel=1e-6)
    assert done.retained_variance == pytest.approx(1 - lost / energy, rel=1e-6)
    assert (done.rank_before, done.rank) == (8, 2)
    assert "rank 8 → 2" in done.line()
    assert done.metrics()["squeeze/rank"] == 2


def test_parameters_keep_their_identity_and_old_memory_is_freed():
    model = build()
    optimizer = torch.optim.AdamW(trained(model))
    train(model, optimizer, LLAMA, 2)
    parameters = trained(model)
    old = [weakref.ref(one.untyped_storage()) for one in parameters]
    states = [weakref.ref(optimizer.state[one]["exp_avg"]) for one in parameters]
    switch(model, [optimizer], uniform(2))
    gc.collect()
    assert all(one is two for one, two in zip(parameters, trained(model), strict=True))
    assert [ref for ref in (*old, *states) if ref() is not None] == []
    assert all(optimizer.state[one]["exp_avg"].shape == one.shape for one in parameters)


# --- the geometry -------------------------------------------------------------------------------------------------


def balanced_layer(model, seed):
    """Give every module factors with A A^T = B^T B, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    for _, module in lora_modules(model):
        down, up = factors(module)
        left = torch.linalg.qr(torch.randn(up.shape, generator=generator, dtype=up.dtype)).Q
        right = torch.linalg.qr(torch.randn(down.T.shape, generator=generator, dtype=up.dtype)).Q
        sizes = 0.3 * 0.7 ** torch.arange(len(down), dtype=up.dtype)
        turn = torch.linalg.qr(torch.randn(len(down), len(down), generator=generator, dtype=up.dtype)).Q
        up.copy_(left * sizes @ turn)
        down.copy_(turn.T @ (sizes[:, None] * right.T))


@pytest.mark.parametrize("balance", BALANCES)
def test_where_factors_are_balanced_sgd_with_momentum_goes_on_as_if_nothing_had_happened(balance):
    model = build(dtype=torch.float64)
    balanced_layer(model, 1)
    optimizer = torch.optim.SGD(trained(model), lr=0.0, momentum=0.9)
    train(model, optimizer, LLAMA, 3)  # momentum without a step
    other, other_optimizer = copy.deepcopy((model, optimizer))
    switch(other, [other_optimizer], uniform(8), balance=balance)
    assert balance == "keep" or not torch.allclose(trained(other)[0], trained(model)[0], atol=1e-3)
    for optimizer_of, one in ((optimizer, model), (other_optimizer, other)):
        optimizer_of.param_groups[0]["lr"] = 0.5
        train(one, optimizer_of, LLAMA, 50)
    assert relative(updates(other), updates(model)) < 1e-10
    start = build(dtype=torch.float64)
    balanced_layer(start, 1)
    assert relative(updates(model), updates(start)) > 0.1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(3, 20),
    st.integers(0, 99),
    st.floats(-4, 4),
    st.sampled_from(BALANCES),
)
def test_every_change_is_a_projector_with_the_geometry_it_names(rank, target, width, seed, skew, balance):
    target = min(rank, target)
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(12, rank, generator=generator, dtype=torch.float64) * 10**skew
    down = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    layer = LoraLayer("layer", down, up, 1.0)
    found = basis(layer)
    change = changes_to({"layer": target}, {"layer": layer}, {"layer": found}, balance=balance)["layer"]
    new_up, new_down = change.up(up), change.down(down)
    assert relative(new_up @ new_down, truncation(up @ down, target)) < 1e-7
    live = change.kept
    assert torch.allclose(change.q[:live] @ change.p[:, :live], torch.eye(live, dtype=torch.float64), atol=1e-6)
    if balance == "balanced":
        ups, downs = new_up[:, :live], new_down[:live]
        assert torch.allclose(ups.T @ ups, downs @ downs.T, rtol=1e-5, atol=1e-8 * float(ups.norm() ** 2))
    elif live == target < rank:
        gram = change.p.T @ change.p
        assert relative(gram, change.q @ change.q.T) < 1e-5


def test_keep_leaves_the_sizes_of_the_factors_as_they_are():
    model = build()
    (name, module) = next(lora_modules(model))
    sizes = [float(factor.norm()) for factor in factors(module)]
    switch(model, [], uniform(7))
    kept = [float(factor.norm()) for factor in factors(dict(lora_modules(model))[name])]
    switch(model, [], uniform(7), balance="balanced")
    balanced = [float(factor.norm()) for factor in factors(dict(lora_modules(model))[name])]
    assert kept == pytest.approx(sizes, rel=0.15)
    assert balanced[0] == pytest.approx(balanced[1], rel=1e-5)


# --- dead directions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama embedding", "convolutions", "experts"])
def test_a_fresh_adapter_can_be_squeezed_and_learns(kind):
    base = KINDS[kind]
    torch.manual_seed(0)
    model = get_peft_model(base.build(), LoraConfig(**{"r": 8, **base.lora}))  # one factor is zero everywhere
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    done = switch(model, [optimizer], uniform(3))
    assert done.retained_variance == 1.0
    for name, layer in live_adapter(model).layers.items():
        assert (live_adapter(model).load(name).up == 0).all()
        assert (live_adapter(model).load(name).down.norm(dim=1) > 1e-3).all()
        assert layer.rank == 3
    before = loss_of(model, base).item()
    train(model, optimizer, base, 3)
    assert loss_of(model, base).item() < before
    assert torch.linalg.matrix_rank(updates(model).unsqueeze(0)) == 1  # it is not zero any more


def test_dead_directions_get_a_zero_column_a_row_and_a_typical_second_moment():
    model = build()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    with torch.no_grad():
        for _, module in lora_modules(model):
            factors(module)[1][:, 2:] = 0  # rank 2 of 8
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, LLAMA, 2)
    done = switch(model, [optimizer], uniform(4))
    assert done.dead == 2 * len(live_adapter(model).layers)
    assert done.retained_variance == 1.0
    for _, module in lora_modules(model):
        down, up = factors(module)
        assert (up[:, 2:] == 0).all()
        assert (down[2:].norm(dim=1) > 0.1).all()
        squares = optimizer.state[module.lora_A["default"].weight]["exp_avg_sq"]
        assert float(squares[2:].mean()) > 0.1 * float(squares[:2].mean())


# --- all or nothing -----------------------------------------------------------------------------------------------


def everything(model, optimizer):
    modules = {
        name: (module.r["default"], module.scaling["default"], module.lora_alpha["default"])
        for name, module in lora_modules(model)
    }
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), model.peft_config["default"].to_dict(), modules))


def same(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


class Failure(Exception):
    pass


@pytest.mark.parametrize("where", ["place", "_put_states", "record_ranks", "carried"])
def test_a_switch_that_fails_leaves_model_and_optimizer_as_they_were(monkeypatch, where):
    model = build(BERT)
    optimizer = torch.optim.AdamW(trained(model))
    train(model, optimizer, BERT, 2)
    gradients = [one.grad for one in trained(model)]
    before = everything(model, optimizer)
    real, calls = getattr(switch_module, where), []

    def failing(*args, **kwargs):
        calls.append(where)
        if len(calls) == {"place": 3}.get(where, 1):
            raise Failure
        return real(*args, **kwargs)

    monkeypatch.setattr(switch_module, where, failing)
    with pytest.raises(Failure):
        switch(model, [optimizer], uniform(3))
    assert same(everything(model, optimizer), before)
    assert all(one is parameter.grad for one, parameter in zip(gradients, trained(model), strict=True))
    monkeypatch.undo()
    switch(model, [optimizer], uniform(3))
    train(model, optimizer, BERT, 1)


class Unknown(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        for group in self.param_groups:
            for one in group["params"]:
                self.state[one]["mystery"] = one.grad.clone()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"choose": uniform(9)}, None, ""),  # a policy never asks for more than there is
        ({"choose": lambda spectra: Ranks("", {one.name: 0 for one in spectra})}, RankError, "rank 0 is not between 1"),
        ({"choose": lambda spectra: Ranks("", {one.name: 9 for one in spectra})}, RankError, "rank 9 is not between 1"),
        ({"balance": "even"}, SettingsError, "known are keep, balanced"),
        ({"state": "keep"}, SettingsError, "known are transport, reset"),
        ({"adapter_name": "other"}, AdapterError, "no adapter 'other'"),
    ],
)
def test_what_cannot_be_changes_nothing(options, error, message):
    model = build()
    optimizer = torch.optim.AdamW(trained(model))
    train(model, optimizer, LLAMA, 1)
    before = everything(model, optimizer)
    call = lambda: switch(model, [optimizer], **{"choose": uniform(3), **options})  # noqa: E731
    if error is None:
        call()
    else:
        with pytest.raises(error, match=message):
            call()
    assert same(everything(model, optimizer), before)


def test_factors_that_are_not_finite_are_named():
    model = build()
    optimizer = torch.optim.AdamW(trained(model))
    with torch.no_grad():
        factors(dict(lora_modules(model))["model.layers.1.self_attn.q_proj"])[0][0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"layers.1.self_attn.q_proj': lora_A holds NaN"):
        switch(model, [optimizer], uniform(3))


def test_unknown_optimizers_are_refused_by_name_or_reset_by_choice():
    model = build()
    optimizer = Unknown(trained(model))
    train(model, optimizer, LLAMA, 1)
    before = everything(model, optimizer)
    with pytest.raises(SettingsError, match=r"test_switch.Unknown is not an optimizer .* Adafactor.*state='reset'"):
        switch(model, [optimizer], uniform(3))
    assert same(everything(model, optimizer), before)
    switch(model, [optimizer], uniform(3), state="reset")
    assert all(parameter not in optimizer.state for parameter in trained(model))
    train(model, optimizer, LLAMA, 1)
