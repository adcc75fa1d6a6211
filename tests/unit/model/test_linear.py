"""Products without gradients, with plain and with packed weights."""

from __future__ import annotations

import pytest
import torch

from kdrl_mcore.model import linear
from kdrl_mcore.model.linear import pack, product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (0, 1), (7, 1), (200,)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_torch(bias: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, added = torch.randn(*shape, 48, dtype=dtype), torch.randn(4099, 48, dtype=dtype), torch.randn(4099, dtype=dtype)
    expected = torch.nn.functional.linear(x, weight, added if bias else None)
    with torch.no_grad():
        packed = pack(weight)
        assert packed is not None or dtype == torch.bfloat16  # for which some CPUs have no instructions
        for each in (weight, packed):
            if each is not None:
                found = product(x, each, added if bias else None)
                assert found.is_contiguous()
                torch.testing.assert_close(found, expected)


def test_rows_in_any_order_of_memory_are_multiplied_with_one_weight() -> None:
    """The input is an embedding's transposed hidden states, for which torch's product copies the weight for each row."""
    x, weight = torch.randn(1, 9, 48, dtype=torch.bfloat16).transpose(0, 1), torch.randn(64, 48, dtype=torch.bfloat16)
    with torch.no_grad(), torch.profiler.profile() as profile:
        product(x, weight)
    assert "aten::bmm" not in {event.key for event in profile.key_averages()}


def test_which_weights_get_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = torch.empty(512, 256), torch.empty(511, 256)
    assert pack(large) is not None
    assert pack(small) is None
    assert pack(large.to("meta")) is None
    assert pack(large.half()) is None
    monkeypatch.setattr(linear, "_has_bfloat16", lambda: False)
    assert pack(large.bfloat16()) is None
