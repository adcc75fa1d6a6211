"""Products of few rows with a large weight, as in a decoding step on a CPU."""

from __future__ import annotations

import pytest
import torch

from kdrl_mcore.model.linear import few_rows_product, has_few_rows


@pytest.mark.parametrize("rows", [1, 5, 128, 129])
def test_the_product_is_that_of_torch(rows: int) -> None:
    x, weight = torch.randn(rows, 48, dtype=torch.float32), torch.randn(4099, 48)
    with torch.no_grad():
        product = few_rows_product(x, weight)
    assert product.is_contiguous()
    torch.testing.assert_close(product, x @ weight.t())


def test_where_the_weight_comes_first() -> None:
    large, small = torch.empty(512, 256), torch.empty(511, 256)
    x = torch.empty(2, 64, 256)
    assert not has_few_rows(x, large)  # gradients are on
    with torch.no_grad():
        assert has_few_rows(x, large)
        assert not has_few_rows(x, small)
        assert not has_few_rows(torch.empty(129, 1, 256), large)
        assert not has_few_rows(x.bfloat16(), large.bfloat16())
        assert not has_few_rows(x.to("meta"), large.to("meta"))
