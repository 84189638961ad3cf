"""Optimizer state through a change of basis: exact where it can be, for every optimizer that is named."""

import copy

import pytest
import torch
from adapters import LLAMA, factors, lora_modules, relative
from test_peft_experts import MIXTRAL
from test_peft_kinds import GROUPED
from test_switch import KINDS, build, loss_of, train, trained, uniform, updates

from lora_squeeze.annealing.change import BALANCES
from lora_squeeze.annealing.live import live_adapter, sites
from lora_squeeze.annealing.switch import switch
from lora_squeeze.annealing.transport import RULES

transformers = pytest.importorskip("transformers")


def gradients(model, base):
    for one in trained(model):
        one.grad = None
    loss_of(model, base).backward()
    return [one.grad.clone() for one in trained(model)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("balance", BALANCES)
def test_gradients_after_a_full_switch_are_the_transported_gradients(kind, balance):
    """∂L/∂B' = (∂L/∂B) Q^T and ∂L/∂A' = P^T (∂L/∂A), to 1e-10 in float64."""
    base = KINDS[kind]
    rank = 4 if kind in ("volumes", "grouped") else 8  # small enough that no direction has to be drawn anew
    model = build(base, r=rank, dtype=torch.float64).eval()  # without dropout
    gradients(model, base)
    switch(model, [], uniform(8), balance=balance)
    carried = [one.grad for one in trained(model)]
    for one, two in zip(carried, gradients(model, base), strict=True):
        assert relative(one, two) < 1e-10


@pytest.mark.parametrize("kind", ["llama", "bert", "experts", "grouped"])
@pytest.mark.parametrize("balance", BALANCES)
def test_gradients_at_the_projected_point_are_the_transported_gradients(kind, balance):
    """With G = ∂L/∂ΔW taken at the new update: here it is given, so that it is the same at both points."""
    base = KINDS[kind]
    model = build(base, dtype=torch.float64)
    wanted = {}
    generator = torch.Generator().manual_seed(1)

    def linear_loss():
        total = torch.zeros((), dtype=torch.float64)
        for site in sites(model).values():
            update = site.scale * site.ups(site.up) @ site.downs(site.down)
            g = wanted.setdefault(site.name, torch.randn(update.shape, generator=generator, dtype=torch.float64))
            total = total + (g * update).sum()
        return total

    def backward():
        for one in trained(model):
            one.grad = None
        linear_loss().backward()
        return [one.grad.clone() for site in sites(model).values() for one in (site.down, site.up)]

    backward()
    switch(model, [], uniform(1 if kind == "grouped" else 3), balance=balance)
    carried = [one.grad for site in sites(model).values() for one in (site.down, site.up)]
    for one, two in zip(carried, backward(), strict=True):
        assert relative(one, two) < 1e-10


def adam(kind, **options):
    return lambda parameters: kind(parameters, lr=1e-3, **options)


def lion(parameters):
    return pytest.importorskip("lion_pytorch").Lion(parameters, lr=1e-3)


def bitsandbytes(name, **options):
    def make(parameters):
        bnb = pytest.importorskip("bitsandbytes")
        return getattr(bnb.optim, name)(parameters, lr=1e-3, **options)

    return make


OPTIMIZERS = {
    "Adam": adam(torch.optim.Adam),
    "AdamW foreach": adam(torch.optim.AdamW, foreach=True),
    "AdamW fused": adam(torch.optim.AdamW, fused=True),
    "AdamW amsgrad": adam(torch.optim.AdamW, amsgrad=True),
    "NAdam": adam(torch.optim.NAdam),
    "RAdam": adam(torch.optim.RAdam),
    "Adamax": adam(torch.optim.Adamax),
    "Adagrad": adam(torch.optim.Adagrad),
    "RMSprop": adam(torch.optim.RMSprop, momentum=0.9, centered=True),
    "SGD": adam(torch.optim.SGD),
    "SGD momentum": adam(torch.optim.SGD, momentum=0.9, nesterov=True),
    "Adafactor (torch)": adam(torch.optim.Adafactor),
    "Adafactor (transformers)": lambda parameters: transformers.optimization.Adafactor(
        parameters, lr=1e-3, relative_step=False, scale_parameter=False, beta1=0.9
    ),
    "Lion (lion-pytorch)": lion,
    "bitsandbytes AdamW": bitsandbytes("AdamW"),
    "bitsandbytes AdamW8bit": bitsandbytes("AdamW8bit", min_8bit_size=64),
    "bitsandbytes PagedAdamW8bit": bitsandbytes("PagedAdamW8bit", min_8bit_size=64),
    "bitsandbytes Lion": bitsandbytes("Lion"),
    "bitsandbytes Lion8bit": bitsandbytes("Lion8bit", min_8bit_size=64),
    "bitsandbytes SGD8bit": bitsandbytes("SGD8bit", momentum=0.9, min_8bit_size=64),
    "bitsandbytes RMSprop": bitsandbytes("RMSprop"),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = adam(torch.optim.Muon)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_every_optimizer_goes_on(name):
    model = build()
    optimizer = OPTIMIZERS[name](trained(model))
    train(model, optimizer, LLAMA, 3)
    before = [optimizer.state.get(one, {}).get("step") for one in trained(model)]
    switch(model, [optimizer], uniform(3))
    assert [optimizer.state.get(one, {}).get("step") for one in trained(model)] == before
    for one in trained(model):
        for key, value in optimizer.state.get(one, {}).items():
            assert not isinstance(value, torch.Tensor) or torch.isfinite(value.float()).all(), key
    ended = loss_of(model, LLAMA).item()
    train(model, optimizer, LLAMA, 3)
    assert loss_of(model, LLAMA).item() < ended
    copied = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(copied)
    train(model, optimizer, LLAMA, 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_reset_starts_every_factor_anew(name):
    model = build()
    head = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = OPTIMIZERS[name]([*trained(model), head])
    head.grad = torch.ones(3, 2)
    train(model, optimizer, LLAMA, 1)
    head.grad = torch.ones(3, 2)
    optimizer.step()
    kept = copy.deepcopy(dict(optimizer.state.get(head, {})))
    switch(model, [optimizer], uniform(3), state="reset")
    assert not any(optimizer.state.get(one) for one in trained(model))
    assert kept.keys() == optimizer.state.get(head, {}).keys()
    train(model, optimizer, LLAMA, 1)


@pytest.mark.parametrize("name", ["Adam", "SGD momentum", "RMSprop", "bitsandbytes AdamW"])
@pytest.mark.parametrize("balance", BALANCES)
def test_a_rotation_that_permutes_moves_every_state_exactly(name, balance):
    """Factors along orthogonal axes are only re-ordered (and negated): then squares are exact, too."""
    model = build()
    for _, module in lora_modules(model):
        down, up = factors(module)
        left, right = (torch.linalg.qr(torch.randn(len(one), 8)).Q for one in (up, down.T))
        sizes = torch.tensor([0.1, 0.5, 0.3, 0.8, 0.2, 0.7, 0.6, 0.4])
        up.copy_(left * sizes)
        down.copy_(sizes[:, None] * right.T)
    order = [3, 5, 6, 1, 7, 2, 4, 0]
    optimizer = OPTIMIZERS[name](trained(model))
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, LLAMA, 2)
    before = {one: dict(optimizer.state[one]) for one in trained(model)}
    switch(model, [optimizer], uniform(5), balance=balance)
    for site in sites(model).values():
        for one, at in ((site.down, lambda value: value[order[:5]]), (site.up, lambda value: value[:, order[:5]])):
            for key, value in before[one].items():
                if isinstance(value, torch.Tensor) and value.dim() == 2:
                    assert torch.allclose(optimizer.state[one][key].abs(), at(value).abs(), rtol=1e-3, atol=1e-7), key


def test_factored_squares_map_like_the_full_ones():
    """Adafactor's rows and columns, where the squares really are a product of the two."""
    results = {}
    for name, keys in (
        ("Adam", ("exp_avg_sq",)),
        ("Adafactor (torch)", ("row_var", "col_var")),
        ("Adafactor (transformers)", ("exp_avg_sq_row", "exp_avg_sq_col")),
    ):
        model = build()
        optimizer = OPTIMIZERS[name](trained(model))
        train(model, optimizer, LLAMA, 1)
        start = build()
        for one, fresh in zip(trained(model), trained(start), strict=True):
            one.data = fresh.data
            generator = torch.Generator().manual_seed(one.numel())
            rows = torch.rand(one.shape[0], generator=generator) + 0.1
            columns = torch.rand(one.shape[1], generator=generator) + 0.1
            rows = rows * columns.mean() / rows.mean()  # both are means of the same squares
            full = torch.outer(rows, columns) / rows.mean()
            values = [full] if len(keys) == 1 else [full.mean(1), full.mean(0)]
            for key, value in zip(keys, values, strict=True):
                optimizer.state[one][key] = value.reshape(optimizer.state[one][key].shape)
        switch(model, [optimizer], uniform(4))
        states = [[optimizer.state[one][key] for key in keys] for one in trained(model)]
        results[name] = [
            [one[0].mean(1), one[0].mean(0)] if len(keys) == 1 else [part.flatten() for part in one] for one in states
        ]
    expected = results.pop("Adam")
    for name, found in results.items():
        for one, two in zip(expected, found, strict=True):
            assert all(torch.allclose(x, y, rtol=1e-4) for x, y in zip(one, two, strict=True)), name


def test_8_bit_states_lose_only_their_rounding():
    pytest.importorskip("bitsandbytes")
    models = [build(), build()]
    optimizers = [
        OPTIMIZERS[name](trained(model))
        for name, model in zip(("bitsandbytes AdamW", "bitsandbytes AdamW8bit"), models, strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.param_groups[0]["lr"] = 0.0
        train(model, optimizer, LLAMA, 2)
        switch(model, [optimizer], uniform(4))
        optimizer.param_groups[0]["lr"] = 1e-2
        assert {optimizer.state[one]["state1"].dtype for one in trained(model)} == {
            torch.float32 if optimizer is optimizers[0] else torch.uint8
        }
    start = updates(models[0])
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, LLAMA, 3)
    full, eight = (updates(model) - start for model in models)
    assert relative(eight, full) < 0.1


def test_param_groups_keep_their_hyperparameters_and_order():
    model = build()
    named = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [one for name, one in named if "lora_B" in name], "lr": 1e-2, "weight_decay": 0.0},  # LoRA+
            {"params": [one for name, one in named if "lora_A" in name], "lr": 1e-3, "betas": (0.8, 0.9)},
        ]
    )
    train(model, optimizer, LLAMA, 2)
    before = [(id(group), group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups]
    parameters = [group["params"][:] for group in optimizer.param_groups]
    switch(model, [optimizer], uniform(2))
    assert before == [
        (id(group), group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups
    ]
    for group, old in zip(optimizer.param_groups, parameters, strict=True):
        assert all(one is two for one, two in zip(group["params"], old, strict=True))
    train(model, optimizer, LLAMA, 2)


class Logged(torch.optim.AdamW):
    """Has AdamW's own step, and something beside it."""

    logged = 0


class Other(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


def test_a_subclass_is_known_as_long_as_it_steps_like_its_parent():
    from lora_squeeze.errors import SettingsError

    model = build()
    switch(model, [Logged(trained(model))], uniform(4))
    with pytest.raises(SettingsError, match=r"test_transport\.Other is not an optimizer"):
        switch(model, [Other(trained(model))], uniform(4))


def test_an_unknown_entry_of_a_known_optimizer_is_refused():
    from lora_squeeze.errors import SettingsError

    model = build()
    optimizer = torch.optim.AdamW(trained(model))
    train(model, optimizer, LLAMA, 1)
    optimizer.state[trained(model)[0]]["extra"] = torch.ones(3)
    with pytest.raises(SettingsError, match="nothing is known of its state 'extra'"):
        switch(model, [optimizer], uniform(4))


def test_your_own_optimizer_is_one_line_away(monkeypatch):
    class Mine(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.01})

        @torch.no_grad()
        def step(self, closure=None):
            for one in self.param_groups[0]["params"]:
                average = self.state[one].setdefault("average", torch.zeros_like(one))
                one -= 0.01 * average.lerp_(one.grad, 0.1)

    model = build()
    optimizer = Mine(trained(model))
    train(model, optimizer, LLAMA, 2)
    monkeypatch.setitem(RULES, f"{Mine.__module__}.{Mine.__qualname__}", {"average": "gradient"})
    switch(model, [optimizer], uniform(4))
    train(model, optimizer, LLAMA, 2)


def test_several_optimizers_and_factors_that_none_of_them_has():
    model = build()
    downs = [one for name, one in model.named_parameters() if "lora_A" in name]
    ups = [one for name, one in model.named_parameters() if "lora_B" in name]
    optimizers = [torch.optim.AdamW(downs), torch.optim.SGD(ups[1:], lr=0.1, momentum=0.9)]
    for _ in range(2):
        loss_of(model, LLAMA).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    switch(model, optimizers, uniform(2))
    loss_of(model, LLAMA).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert live_adapter(model).rank == 2


def test_grouped_convolutions_and_experts_carry_every_part():
    for base in (MIXTRAL, GROUPED):
        model = build(base)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
        train(model, optimizer, base, 3)
        switch(model, [optimizer], uniform(1))
        before = loss_of(model, base).item()
        train(model, optimizer, base, 5)
        assert loss_of(model, base).item() < before
