"""Each property of the kernel × every route × every shape × every dtype, against the dense float64 SVD."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_squeeze import LoraLayer
from lora_squeeze.errors import AdapterError
from lora_squeeze.spectrum import METHODS, basis, singular_values, truncate

SHAPES = {  # out, in, rank
    "tall": (40, 12, 6),
    "wide": (12, 40, 6),
    "square": (24, 24, 8),
    "rank above out and in": (5, 7, 9),
    "rank above in": (30, 6, 9),
    "rank above out": (6, 30, 9),
    "rank one": (20, 30, 1),
    "one by one": (1, 1, 1),
    "very tall": (20000, 9, 4),
    "very wide": (9, 20000, 4),
}
DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
HALVES = [torch.float16, torch.bfloat16]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]

every_route = pytest.mark.parametrize("method", METHODS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def random_layer(shape, dtype=torch.float32, *, seed=0, scale=0.5, decay=0.7) -> LoraLayer:
    m, n, r = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = decay ** torch.arange(r, dtype=torch.float64)
    down = torch.randn(r, n, generator=generator, dtype=torch.float64) * sizes[:, None]
    up = torch.randn(m, r, generator=generator, dtype=torch.float64) * sizes
    return LoraLayer("layer", down.to(dtype), up.to(dtype), scale)


def dense(layer: LoraLayer) -> Tensor:
    return layer.scale * layer.up.double() @ layer.down.double()


def dense_svd(layer: LoraLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Of the effective update, cut to its possible rank."""
    u, s, vh = torch.linalg.svd(dense(layer), full_matrices=False)
    size = min(*layer.up.shape, layer.down.shape[1])
    return u[:, :size], s[:size], vh[:size]


def dense_truncation(layer: LoraLayer, rank: int) -> Tensor:
    u, s, vh = dense_svd(layer)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def relative(difference_of: Tensor, reference: Tensor) -> float:
    return float((difference_of - reference).norm() / reference.norm())


@every_route
@every_shape
@every_dtype
def test_singular_values_are_those_of_the_effective_update(method, shape, dtype):
    layer = random_layer(shape, dtype)
    exact = dense_svd(layer)[1]

    found = torch.tensor(singular_values(layer, basis(layer, method=method)), dtype=torch.float64)

    assert found.shape == exact.shape
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12 * float(exact[0]))


@every_route
@every_dtype
@pytest.mark.parametrize("rank", [12, 13, 24, 25, 40, 64])
def test_singular_values_of_layers_of_high_rank(method, dtype, rank):
    # On the CPU the second moments are put together from strips of columns.
    layer = random_layer((3000, 150, rank), dtype, decay=0.95)
    exact = dense_svd(layer)[1]

    found = torch.tensor(singular_values(layer, basis(layer, method=method)), dtype=torch.float64)

    torch.testing.assert_close(found, exact, rtol=1e-9, atol=0)


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
@every_shape
def test_q_inverts_p(method, shape):
    found = basis(random_layer(shape), method=method)

    identity = torch.eye(min(shape), dtype=torch.float64)
    assert found.numerical_rank == min(shape)
    torch.testing.assert_close(found.q @ found.p, identity, rtol=0, atol=1e-7)


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
def test_singular_values_of_a_negative_scale_are_positive(method):
    layer = random_layer(SHAPES["square"], scale=-3.0)
    found = torch.tensor(singular_values(layer, basis(layer, method=method)), dtype=torch.float64)
    torch.testing.assert_close(found, dense_svd(layer)[1], rtol=1e-9, atol=1e-12)


@every_route
def test_a_scale_of_zero_is_an_update_of_zero(method):
    layer = random_layer(SHAPES["tall"], scale=0.0)
    found = basis(layer, method=method)

    result = truncate(layer, found, 2, scale=2.0)

    assert set(singular_values(layer, found)) == {0.0}
    assert dense(result.layer).count_nonzero() == 0
    assert result.relative_error == 0.0


def _duplicate_columns(m, n, r):
    layer = random_layer((m, n, r))
    layer.up[:, 1:4] = layer.up[:, :1]
    return layer


def _duplicate_rows(m, n, r):
    layer = random_layer((m, n, r))
    layer.down[1:4] = layer.down[:1]
    return layer


def _zero_columns(m, n, r):
    layer = random_layer((m, n, r))
    layer.up[:, ::2] = 0
    return layer


def _cancelling(m, n, r):
    layer = random_layer((m, n, r))
    layer.up[:, 1] = layer.up[:, 0] * (1 + 1e-4)
    layer.down[1] = -layer.down[0]
    return layer


def _orthogonal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def _conditioned(m, n, r, *, up_exponent, down_exponent):
    up = _orthogonal(m, r, 1) * torch.logspace(0, up_exponent, r, dtype=torch.float64) @ _orthogonal(r, r, 2)
    down = _orthogonal(n, r, 3) * torch.logspace(0, down_exponent, r, dtype=torch.float64) @ _orthogonal(r, r, 4)
    return LoraLayer("layer", down.T.contiguous(), up, 0.5)


def _sized(m, n, r, *, up_exponent, down_exponent):
    layer = random_layer((m, n, r), torch.float64, decay=1.0)
    up_sizes, down_sizes = (
        torch.logspace(0, exponent, r, dtype=torch.float64) for exponent in (up_exponent, down_exponent)
    )
    return LoraLayer("layer", layer.down * down_sizes[:, None], layer.up * up_sizes, 0.5)


DIFFICULT = {
    "duplicate columns": _duplicate_columns(40, 30, 6),
    "duplicate rows": _duplicate_rows(40, 30, 6),
    "zero columns": _zero_columns(40, 30, 6),
    "cancelling columns": _cancelling(40, 30, 6),
    "up of condition 1e10": _conditioned(40, 30, 6, up_exponent=-10, down_exponent=0),
    "down of condition 1e10": _conditioned(40, 30, 6, up_exponent=0, down_exponent=-10),
    "both of condition 1e10": _conditioned(40, 30, 6, up_exponent=-10, down_exponent=-10),
    "up columns 1e8 apart": _sized(40, 30, 6, up_exponent=-8, down_exponent=0),
    "sizes 1e8 apart that multiply to one": _sized(40, 30, 6, up_exponent=-8, down_exponent=8),
    "sizes 1e8 apart that add up": _sized(40, 30, 6, up_exponent=8, down_exponent=8),
}
every_difficulty = pytest.mark.parametrize("layer", DIFFICULT.values(), ids=DIFFICULT)


@every_route
@every_difficulty
def test_difficult_factors_keep_their_spectrum(method, layer):
    exact = dense_svd(layer)[1]
    found = torch.tensor(singular_values(layer, basis(layer, method=method)), dtype=torch.float64)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9 * float(exact[0]))


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


@every_route
@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["lora_A", "lora_B"])
def test_values_that_are_not_finite_name_layer_and_tensor(method, dtype, value, where):
    layer = random_layer(SHAPES["tall"], dtype)
    (layer.down if where == "lora_A" else layer.up)[-1, -1] = value

    with pytest.raises(AdapterError) as caught:
        basis(layer, method=method)

    other = {"lora_A": "lora_B", "lora_B": "lora_A"}[where]
    assert "'layer'" in str(caught.value)
    assert where in str(caught.value)
    assert other not in str(caught.value)


@every_route
def test_nan_is_found_even_where_the_other_factor_is_zero(method):
    layer = random_layer(SHAPES["tall"])
    layer.up.zero_()
    layer.down[0, 0] = math.nan
    with pytest.raises(AdapterError, match="lora_A"):
        basis(layer, method=method)


def test_an_overflow_of_the_result_dtype_shows_in_the_reported_error():
    layer = random_layer(SHAPES["tall"], scale=1.0)
    large = LoraLayer("layer", layer.down * 1e6, layer.up * 1e6, 1.0)
    result = truncate(large, basis(large), 3, down_dtype=torch.float16, up_dtype=torch.float16)
    assert not math.isfinite(result.relative_error)


def test_randomized_repeats_with_its_seed():
    layer = random_layer((200, 150, 30))
    first, again, other = (basis(layer, method="randomized", rank=4, seed=seed) for seed in (1, 1, 2))

    assert torch.equal(first.singular_values, again.singular_values)
    assert torch.equal(first.p, again.p)
    assert torch.equal(first.q, again.q)
    assert not torch.equal(first.p, other.p)


def test_randomized_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    basis(random_layer(SHAPES["square"]), method="randomized")
    assert torch.equal(torch.get_rng_state(), before)


def test_randomized_finds_the_leading_components_with_a_small_sketch():
    layer = random_layer((200, 150, 60), decay=0.9)

    found = basis(layer, method="randomized", rank=8)

    leading = torch.tensor(singular_values(layer, found)[:8], dtype=torch.float64)
    torch.testing.assert_close(leading, dense_svd(layer)[1][:8], rtol=1e-3, atol=0)
    best = relative(dense_truncation(layer, 8), dense(layer))
    assert relative(dense(truncate(layer, found, 8).layer), dense(layer)) <= 1.001 * best


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


sizes = st.integers(1, 12)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.integers(1, 14), st.integers(0, 10**6), st.sampled_from(list(DTYPES.values())))
def test_all_routes_agree_on_random_factors(m, n, r, seed, dtype):
    _assert_routes_agree(random_layer((m, n, r), dtype, seed=seed))


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.integers(1, 14), st.integers(0, 10**6))
def test_all_routes_agree_on_small_whole_numbers(m, n, r, seed):
    # These are often rank-deficient, and have equal singular values.
    generator = torch.Generator().manual_seed(seed)
    down = torch.randint(-1, 2, (r, n), generator=generator).float()
    up = torch.randint(-1, 2, (m, r), generator=generator).float()
    _assert_routes_agree(LoraLayer("layer", down, up, 1.5))


def _assert_routes_agree(layer: LoraLayer) -> None:
    exact = dense_svd(layer)[1]
    norm = float(exact.norm())
    for method in METHODS:
        found = basis(layer, method=method)
        values = torch.tensor(singular_values(layer, found), dtype=torch.float64)
        torch.testing.assert_close(values, exact, rtol=1e-7, atol=1e-9 * norm)
        for rank in range(1, layer.down.shape[0] + 1):
            result = truncate(layer, found, rank)
            lost = float((dense(result.layer) - dense(layer)).norm())
            assert lost == pytest.approx(float(exact[rank:].norm()), rel=1e-5, abs=1e-6 * norm)
            assert result.relative_error * norm == pytest.approx(lost, rel=1e-6, abs=1e-6 * norm)
