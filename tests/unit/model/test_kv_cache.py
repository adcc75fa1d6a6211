"""The cache of keys and values gives attention over everything before a token, whatever the shape of the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdrl_mcore.model.kv_cache import KVCache, padded_columns

PROMPTS, RESPONSES, HEADS, GROUPS, WIDTH = [2, 5, 61], 2, 4, 2, 8
STEPS = 72
WINDOWS = {1: None, 2: 66}  # the second is reached while decoding
CHECKED = (0, 1, 2, 3, 4, 66, 67, 70, 71)  # before and after slots leave, and the cache grows


def draw(rows: int, heads: int, seed: int) -> Tensor:
    return torch.randn(rows, heads, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("few_shapes", [True, False])
def test_decoding_attends_to_the_prompt_and_all_tokens_before(few_shapes: bool) -> None:
    """There are two layers, one with a window, copies of prompts, slots that leave, and rows beyond the slots."""
    cache = KVCache(PROMPTS, RESPONSES, STEPS, few_shapes=few_shapes)
    prompts = {layer: (draw(sum(PROMPTS), GROUPS, layer), draw(sum(PROMPTS), GROUPS, 10 + layer)) for layer in (1, 2)}
    for layer, (key, value) in prompts.items():
        cache.fill(layer, key, value)
    seen: dict[int, list[list[Tensor]]] = {}  # [layer][slot]: keys and values so far
    for layer, pair in prompts.items():
        parts = zip(*(x.split(PROMPTS) for x in pair), strict=True)
        seen[layer] = [list(part) for part in parts for _ in range(RESPONSES)]
    cache.begin_decoding()
    for step in range(STEPS):
        if step in (3, 70):
            kept = torch.tensor([0, 1, 3, 5] if step == 3 else [1, 2])
            cache.keep(kept)
            seen = {layer: [slots[i] for i in kept.tolist()] for layer, slots in seen.items()}
        slots = len(seen[1])
        for layer in seen:
            query, key, value = (draw(slots + 1, n, 1000 * layer + 3 * step + i) for i, n in enumerate((HEADS, GROUPS, GROUPS)))
            window = WINDOWS[layer]
            found = cache.attend(layer, query, key, value, scale=0.3, window=window)
            assert found[slots:].eq(0).all()
            for slot, pair in enumerate(seen[layer]):
                pair[:] = [torch.cat((old, new[slot : slot + 1])) for old, new in zip(pair, (key, value), strict=True)]
                if step not in CHECKED:
                    continue
                k, v = (x[-(window or 0) :].transpose(0, 1) for x in pair)
                expected = F.scaled_dot_product_attention(query[slot, :, None], k, v, scale=0.3, enable_gqa=True)[:, 0]
                torch.testing.assert_close(found[slot], expected, rtol=1e-5, atol=1e-6)
        cache.advance()


def test_few_shapes_and_little_memory_for_thousands_of_tokens() -> None:
    """With 8192 tokens, attention has 41 shapes, all aligned, and at most an eighth of its work is wasted."""
    sizes = {columns: padded_columns(columns) for columns in range(1, 9217)}
    assert len(set(sizes.values())) <= 41
    assert all(size % 64 == 0 for size in sizes.values())
    assert all(columns <= size <= max(columns + 63, columns * 9 / 8) for columns, size in sizes.items())


def test_attention_meets_few_shapes_and_the_cache_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, places = set(), set()

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scale: float | None) -> Tensor:
        shapes.add((query.shape, key.shape, attn_mask.shape))
        places.add(key.data_ptr())
        assert attn_mask.dtype == query.dtype == torch.bfloat16  # no conversion at each call
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    cache = KVCache([3, 4], 1, 500, few_shapes=True)
    one = torch.zeros(2, 1, 8, dtype=torch.bfloat16)
    cache.fill(1, *(torch.zeros(7, 1, 8, dtype=torch.bfloat16),) * 2)
    cache.begin_decoding()
    held = []
    for _ in range(500):
        cache.attend(1, one, one, one)
        held.append(cache._keys[1])  # so that no memory is used twice
        cache.advance()
    assert len(shapes) == len(places) == 8  # 64, 128, ... 512 columns
