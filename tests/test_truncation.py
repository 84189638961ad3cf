"""The truncation: each property × every route × every shape × every dtype, against the dense float64 SVD."""

import math

import pytest
import torch
from factors import (
    DEVICES,
    DTYPES,
    HALVES,
    SHAPES,
    dense,
    dense_svd,
    dense_truncation,
    every_difficulty,
    every_dtype,
    every_route,
    every_shape,
    random_layer,
    relative,
)

from lora_squeeze import LoraLayer
from lora_squeeze.spectrum import basis, singular_values
from lora_squeeze.truncation import Cut, truncate, truncate_together


@every_route
@every_shape
@every_dtype
def test_truncation_at_every_rank_is_the_dense_truncation(method, shape, dtype):
    layer = random_layer(shape, dtype)
    found = basis(layer, method=method)

    for rank in range(1, shape[2] + 1):
        squeezed = truncate(layer, found, rank).layer
        assert squeezed.up.shape == (shape[0], rank)
        assert squeezed.down.shape == (rank, shape[1])
        assert relative(dense(squeezed), dense_truncation(layer, rank)) < 1e-6


@every_route
@every_shape
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_results_are_as_good_as_the_rounded_exact_answer(method, shape, dtype):
    layer = random_layer(shape, dtype)
    u, s, vh = dense_svd(LoraLayer("layer", layer.down, layer.up, 1.0))
    found = basis(layer, method=method)

    for rank in range(1, len(s) + 1):
        exact = dense_truncation(layer, rank)
        rounded_up = (u[:, :rank] * s[:rank].sqrt()).to(dtype).double()
        rounded_down = (s[:rank, None].sqrt() * vh[:rank]).to(dtype).double()
        squeezed = truncate(layer, found, rank, down_dtype=dtype, up_dtype=dtype).layer

        assert squeezed.up.dtype == squeezed.down.dtype == dtype
        assert relative(dense(squeezed), exact) <= 1.05 * relative(layer.scale * rounded_up @ rounded_down, exact)


@every_route
@every_shape
def test_both_factors_carry_the_root_of_every_singular_value(method, shape):
    layer = random_layer(shape)
    found = basis(layer, method=method)
    rank = min(shape)

    squeezed = truncate(layer, found, rank).layer

    expected = torch.diag(dense_svd(layer)[1] / layer.scale)
    up, down = squeezed.up.double(), squeezed.down.double()
    torch.testing.assert_close(up.T @ up, expected, rtol=1e-6, atol=1e-6 * float(expected[0, 0]))
    torch.testing.assert_close(down @ down.T, expected, rtol=1e-6, atol=1e-6 * float(expected[0, 0]))


@every_route
@every_dtype
@pytest.mark.parametrize("result_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [SHAPES["tall"], SHAPES["rank above out and in"], SHAPES["one by one"]], ids=str)
def test_the_reported_error_is_the_error_of_the_rounded_result(method, dtype, result_dtype, shape):
    layer = random_layer(shape, dtype)
    found = basis(layer, method=method)

    for rank in range(1, shape[2] + 1):
        result = truncate(layer, found, rank, down_dtype=result_dtype, up_dtype=result_dtype)
        actual = relative(dense(result.layer), dense(layer))
        assert result.relative_error == pytest.approx(actual, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("down_dtype", "up_dtype"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float64)])
def test_the_factors_of_a_pair_may_have_different_dtypes(down_dtype, up_dtype):
    layer = random_layer(SHAPES["tall"])
    layer = LoraLayer("layer", layer.down.to(down_dtype), layer.up.to(up_dtype), layer.scale)

    result = truncate(layer, basis(layer), 3, down_dtype=down_dtype, up_dtype=up_dtype)

    assert (result.layer.down.dtype, result.layer.up.dtype) == (down_dtype, up_dtype)
    assert result.relative_error == pytest.approx(relative(dense(result.layer), dense(layer)), rel=1e-6)
    assert relative(dense(truncate(layer, basis(layer), 3).layer), dense_truncation(layer, 3)) < 1e-6


@every_route
@pytest.mark.parametrize("before", [0.5, -2.0])
@pytest.mark.parametrize("after", [0.03125, 7.0, -0.25])
def test_another_scale_keeps_the_update(method, before, after):
    layer = random_layer(SHAPES["tall"], scale=before)

    result = truncate(layer, basis(layer, method=method), 4, scale=after)

    assert result.layer.scale == after
    assert relative(dense(result.layer), dense_truncation(layer, 4)) < 1e-6
    assert result.relative_error == pytest.approx(relative(dense(result.layer), dense(layer)), rel=1e-6)


@every_route
def test_a_scale_of_zero_is_an_update_of_zero(method):
    layer = random_layer(SHAPES["tall"], scale=0.0)
    found = basis(layer, method=method)

    result = truncate(layer, found, 2, scale=2.0)

    assert set(singular_values(layer, found)) == {0.0}
    assert dense(result.layer).count_nonzero() == 0
    assert result.relative_error == 0.0


@every_route
@every_difficulty
@pytest.mark.parametrize("result_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_difficult_factors_lose_no_more_than_the_dense_truncation(method, layer, result_dtype):
    found = basis(layer, method=method)
    spacing = {None: 1e-7, torch.float32: 1e-6, torch.bfloat16: 2e-2}[result_dtype]

    for rank in range(1, 7):
        result = truncate(layer, found, rank, down_dtype=result_dtype, up_dtype=result_dtype)
        best = relative(dense_truncation(layer, rank), dense(layer))
        actual = relative(dense(result.layer), dense(layer))
        assert result.layer.up.isfinite().all()
        assert result.layer.down.isfinite().all()
        assert actual <= best + spacing
        assert result.relative_error == pytest.approx(actual, rel=1e-6, abs=1e-6)


@every_route
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_sizes_that_cancel_do_not_cost_digits_in_low_precision(method, dtype):
    layer = random_layer((40, 30, 4), torch.float64, decay=1.0)
    sizes = torch.tensor([1.0, 1e-2, 1e-4, 1e-6], dtype=torch.float64)
    layer = LoraLayer("layer", (layer.down / sizes.sqrt()[:, None]).to(dtype), (layer.up * sizes).to(dtype), 1.0)

    found = basis(layer, method=method)

    for rank in (1, 2, 3):
        assert relative(dense(truncate(layer, found, rank).layer), dense_truncation(layer, rank)) < 1e-6


@every_route
@every_shape
@every_dtype
def test_a_fresh_adapter_stays_zero_and_can_still_learn(method, shape, dtype):
    layer = random_layer(shape, dtype)
    layer.up.zero_()
    found = basis(layer, method=method)

    for rank in range(1, shape[2] + 1):
        result = truncate(layer, found, rank, down_dtype=dtype, up_dtype=dtype)
        assert result.relative_error == 0.0
        assert result.layer.up.count_nonzero() == 0
        assert result.layer.down.isfinite().all()
        learnable = min(rank, shape[1])
        assert (result.layer.down.double().norm(dim=1) > 0).sum() >= learnable


@every_route
@pytest.mark.parametrize("zero", ["down", "up and down"])
def test_zero_down_factors_give_zeros_and_no_nan(method, zero):
    layer = random_layer(SHAPES["tall"])
    layer.down.zero_()
    if zero == "up and down":
        layer.up.zero_()
    found = basis(layer, method=method)

    result = truncate(layer, found, 3)

    assert set(singular_values(layer, found)) == {0.0}
    assert result.relative_error == 0.0
    assert result.layer.up.count_nonzero() == 0
    assert result.layer.down.isfinite().all()


@every_route
def test_dead_directions_beside_living_ones_change_nothing_but_can_learn(method):
    layer = random_layer((40, 30, 6))
    layer.up[:, 2:] = 0

    squeezed = truncate(layer, basis(layer, method=method), 4).layer

    assert relative(dense(squeezed), dense(layer)) < 1e-6
    assert squeezed.up[:, 2:].count_nonzero() == 0
    assert (squeezed.down.norm(dim=1) > 0).all()


def test_an_overflow_of_the_result_dtype_shows_in_the_reported_error():
    layer = random_layer(SHAPES["tall"], scale=1.0)
    large = LoraLayer("layer", layer.down * 1e6, layer.up * 1e6, 1.0)
    result = truncate(large, basis(large), 3, down_dtype=torch.float16, up_dtype=torch.float16)
    assert not math.isfinite(result.relative_error)


@every_route
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_device_gives_the_dense_truncation(method, device, dtype):
    layer = random_layer(SHAPES["square"], dtype)

    found = basis(layer, method=method, device=device)
    squeezed = truncate(layer, found, 3).layer

    assert found.p.device.type == device
    assert squeezed.up.device.type == squeezed.down.device.type == "cpu"
    assert relative(dense(squeezed), dense_truncation(layer, 3)) < 1e-6


@pytest.mark.parametrize("borrow", [False, True], ids=["own memory", "borrowed memory"])
@pytest.mark.parametrize("large", [False, True], ids=["small ranks", "a large one"])
def test_layers_together_are_what_they_are_alone(borrow, large):
    layers = [
        random_layer(SHAPES["tall"], torch.bfloat16),
        random_layer(SHAPES["very wide"], torch.float16, seed=1, scale=-2.0),
        random_layer(SHAPES["tall"], torch.bfloat16, seed=2),
        random_layer(SHAPES["square"], torch.float32, seed=3, scale=0.0),
        random_layer((20000, 30, 24), torch.bfloat16, seed=4),
        *([random_layer((400, 300, 290), torch.bfloat16, seed=5, decay=0.99)] if large else []),
    ]
    layers[2].up[:, 1:] = 0  # has idle directions
    plans = [(2, 0.5), (4, 7.0), (3, -1.0), (5, 2.0), (1, 0.5), (280, 0.5)][: len(layers)]
    cuts = [
        Cut(layer, basis(layer), rank, scale, layer.down.dtype, layer.up.dtype)
        for layer, (rank, scale) in zip(layers, plans, strict=True)
    ]

    together = truncate_together(cuts, borrow=borrow)

    for cut, result in zip(cuts, together, strict=True):
        dtypes = {"down_dtype": cut.down_dtype, "up_dtype": cut.up_dtype}
        alone = truncate(cut.layer, cut.basis, cut.rank, scale=cut.scale, **dtypes)
        assert (result.layer.name, result.layer.scale) == (alone.layer.name, alone.layer.scale)
        assert torch.equal(result.layer.down, alone.layer.down)
        assert torch.equal(result.layer.up, alone.layer.up)
        assert result.relative_error == pytest.approx(alone.relative_error, rel=1e-12)
    assert together[1].relative_error > 0
    assert together[3].relative_error == 0


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_digits_that_a_training_gives_up_for_speed_are_not_given_up_here(precision):
    layer = random_layer(SHAPES["tall"], torch.bfloat16)
    before = truncate(layer, basis(layer), 3).layer
    torch.set_float32_matmul_precision(precision)
    try:
        now = truncate(layer, basis(layer), 3).layer
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (before.up.dtype, before.down.dtype) == (torch.float32, torch.float32)
    assert (now.up.dtype, now.down.dtype) == (torch.float64, torch.float64)
    assert relative(dense(now), dense_truncation(layer, 3)) < 1e-12


def test_no_layers_together_are_none():
    assert truncate_together([]) == []


def test_a_large_rank_does_not_pad_hundreds_of_small_ones(monkeypatch):
    sizes = []
    zeros = torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda *size, **options: sizes.append(math.prod(size)) or zeros(*size, **options)
    )
    layers = [random_layer((20, 20, 1), seed=seed) for seed in range(300)]
    layers.insert(150, random_layer((300, 300, 256), seed=301, decay=0.99))

    results = truncate_together([Cut(layer, basis(layer), layer.down.shape[0], layer.scale) for layer in layers])

    assert len(results) == 301
    assert max(sizes) <= 4 * 2**18


@pytest.mark.parametrize("scale", [1e200, 1e-170, -1e160])
def test_extreme_scales_are_no_error_and_hide_none(scale):
    layer = random_layer(SHAPES["tall"], torch.bfloat16)
    extreme = LoraLayer("layer", layer.down, layer.up, scale)
    dtypes = {"down_dtype": torch.bfloat16, "up_dtype": torch.bfloat16}
    usual = truncate(layer, basis(layer), 3, **dtypes).relative_error
    assert truncate(extreme, basis(extreme), 3, **dtypes).relative_error == pytest.approx(usual, rel=1e-9)


def test_an_overflow_of_idle_directions_shows_in_the_reported_error():
    layer = random_layer(SHAPES["tall"], torch.float32)
    fresh = LoraLayer("layer", layer.down * 1e6, torch.zeros_like(layer.up), 1.0)
    result = truncate(fresh, basis(fresh), 3, down_dtype=torch.float16, up_dtype=torch.float16)
    assert math.isinf(result.relative_error)


def test_memory_that_is_used_again_remembers_no_mode_of_torch():
    plain, live = random_layer((70, 50, 7)), random_layer((70, 50, 7))
    live.up.requires_grad_()
    live.down.requires_grad_()
    with torch.inference_mode():
        truncate(plain, basis(plain), 3)
    truncate(live, basis(live), 3)
    found = basis(plain)
    assert not found.p.requires_grad
    assert torch.equal(found.p, basis(live).p)
    assert not truncate(plain, found, 3).layer.up.requires_grad
