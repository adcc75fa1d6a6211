"""The parts of a refit that need no ranks: buckets, checksums and the digest of all tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdrl_mcore.rollout.refit.stream import checksum, cut, device_checksum, digest, num_bytes


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 40))
def test_buckets_hold_every_byte_once_and_are_full(sizes: list[int], bucket_bytes: int) -> None:
    tensors = {f"t{index}": size for index, size in enumerate(sizes)}
    buckets = list(cut(tensors, bucket_bytes))
    seen = [
        (piece.name, byte) for bucket in buckets for piece in bucket for byte in range(piece.start, piece.start + piece.length)
    ]
    assert seen == [(name, byte) for name, size in tensors.items() for byte in range(size)]
    assert all(num_bytes(bucket) == bucket_bytes for bucket in buckets[:-1]) and num_bytes(buckets[-1]) <= bucket_bytes
    for bucket in buckets:
        assert [piece.offset for piece in bucket] == [sum(p.length for p in bucket[:i]) for i in range(len(bucket))]


@pytest.mark.parametrize("of", [checksum, device_checksum])
@given(data=st.binary(min_size=2, max_size=60), index=st.integers(0, 59), bit=st.integers(0, 7))
def test_a_checksum_sees_a_changed_bit_and_a_changed_order(of: object, data: bytes, index: int, bit: int) -> None:
    assert callable(of)
    bytes_N = torch.tensor(list(data), dtype=torch.uint8)
    other_N = bytes_N.clone()
    other_N[index % len(data)] ^= 1 << bit
    assert of(bytes_N) == of(bytes_N.clone()) != of(other_N)
    words = torch.arange(8 * 6, dtype=torch.uint8).view(6, 8)
    assert of(words.flatten()) != of(words.flip(0).flatten())


def test_the_digest_is_that_of_the_tensors_not_of_their_order() -> None:
    table, sums = {"a": ((2, 3), "float32"), "b": ((6,), "float32")}, {"a": "1", "b": "2"}
    assert digest(table, sums) == digest(dict(reversed(table.items())), sums)
    assert digest(table, sums) != digest({**table, "a": ((3, 2), "float32")}, sums) != digest(table, {"a": "2", "b": "1"})
