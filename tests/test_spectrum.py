"""The decomposition: each property × every route × every shape × every dtype, against the dense float64 SVD."""

import math

import pytest
import torch
from factors import (
    DTYPES,
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
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_squeeze import LoraLayer
from lora_squeeze.errors import AdapterError
from lora_squeeze.spectrum import METHODS, basis, singular_values
from lora_squeeze.truncation import truncate


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
def test_q_inverts_p(method, shape):
    found = basis(random_layer(shape), method=method)

    identity = torch.eye(min(shape), dtype=torch.float64)
    assert found.numerical_rank == min(shape)
    torch.testing.assert_close(found.q @ found.p, identity, rtol=0, atol=1e-7)


@every_route
def test_singular_values_of_a_negative_scale_are_positive(method):
    layer = random_layer(SHAPES["square"], scale=-3.0)
    found = torch.tensor(singular_values(layer, basis(layer, method=method)), dtype=torch.float64)
    torch.testing.assert_close(found, dense_svd(layer)[1], rtol=1e-9, atol=1e-12)


@every_route
@every_difficulty
def test_difficult_factors_keep_their_spectrum(method, layer):
    exact = dense_svd(layer)[1]
    found = torch.tensor(singular_values(layer, basis(layer, method=method)), dtype=torch.float64)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9 * float(exact[0]))


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
