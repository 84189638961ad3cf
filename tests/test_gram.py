"""Second moments from strips of columns, beside the plain product."""

import pytest
import torch

from lora_squeeze.gram import second_moment

WIDTHS = [1, 5, 12, 13, 16, 24, 25, 32, 48, 64, 100, 128, 256]
LAYOUTS = {"rows contiguous": lambda tall: tall, "columns contiguous": lambda tall: tall.T.contiguous().T}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [3, 2048, 5000])
def test_it_is_the_product_of_the_factor_with_itself(width, layout, dtype, rows):
    tall = layout(torch.randn(rows, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64))
    tall = tall.to(dtype)

    found = second_moment(tall)

    exact = tall.double().T @ tall.double()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-13 * float(exact.diagonal().max()))


def test_not_finite_numbers_stay_visible():
    tall = torch.ones(5000, 64)
    tall[4999, 40] = float("nan")
    assert second_moment(tall)[40].isnan().all()
