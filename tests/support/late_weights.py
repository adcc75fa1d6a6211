"""Runs in which the gathered weights arrive as late as possible."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch

from tests.support.training import Outcome, train_on_rank

OVERLAPPED = "parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true parallel.bucket_size=3000"
"""Overlapped communication, with several buckets in the tests' models."""


def train_with_late_weights_on_rank(overrides: Sequence[str]) -> Outcome:
    """`train_on_rank`, with weights that arrive only when they are waited for: until then, what other ranks have updated is
    NaN. Garbage is collected before every micro-batch and at no other time. `found` has the number of gathers, and how many of
    them nobody had waited for when the run ended."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    import torch.distributed as dist
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    from kdrl_mcore.student.student import Student

    forward_step = Student._forward_step
    waiting: list[Any] = []
    gathered = 0

    class Late:
        def __init__(self, group: Any) -> None:
            self.arrived = [bucket.param_data.clone() for bucket in group.buckets]
            self.buckets = group.buckets
            waiting.append(self)

        def wait(self) -> None:
            waiting.remove(self)
            for bucket, arrived in zip(self.buckets, self.arrived, strict=True):
                bucket.param_data.copy_(arrived)

    def start_late(group: Any, force_sync: bool = False) -> None:
        nonlocal gathered
        assert not force_sync and group.param_gather_handle is None
        gathered += 1
        members, rank = group.intra_distributed_optimizer_instance_group, group.intra_distributed_optimizer_instance_rank
        own = [bucket.param_data.chunk(members.size())[rank].clone() for bucket in group.buckets]
        for bucket, part in zip(group.buckets, own, strict=True):
            dist.all_gather_into_tensor(bucket.param_data, part, group=members)
        group.param_gather_handle, group.param_gather_dispatched = Late(group), True
        for bucket, part in zip(group.buckets, own, strict=True):
            bucket.param_data.fill_(torch.nan)
            bucket.param_data.chunk(members.size())[rank].copy_(part)

    def collect_first(*args: Any) -> Any:
        gc.collect()
        return forward_step(*args)

    gc.freeze()
    gc.disable()
    try:
        with patch.object(Group, "start_param_sync", start_late), patch.object(Student, "_forward_step", collect_first):
            outcome = train_on_rank(overrides)
    finally:
        gc.enable()
        gc.unfreeze()
    outcome.found = {"gathered": gathered, "waiting": len(waiting)}
    return outcome
