"""Small programs with and without a mistake, run by a rank on paper CUDA, which refuses only the wrong ones.

Each has an argument, `right`. If it is False, the program does what CUDA would refuse or silently corrupt.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gpu(*shape: int) -> Tensor:
    return torch.ones(*shape, device="cuda")


def mixed_devices(right: bool) -> None:
    where = "cuda" if right else "cpu"
    gpu(2, 3) @ torch.ones(3, 2, device=where)


def mixed_devices_in_a_backward_pass(right: bool) -> None:
    weight = gpu(3).requires_grad_()
    product = weight * gpu(3)
    product.register_hook(lambda gradient: gradient + torch.ones(3, device="cuda" if right else "cpu"))
    product.sum().backward()
    assert weight.grad is not None and weight.grad.is_cuda


def a_host_index_into_gpu_memory(right: bool) -> None:
    index = torch.tensor([0, 1])
    if right:
        assert gpu(3)[index].is_cuda  # allowed: torch copies it
    else:
        torch.ones(3)[index.cuda()]


def a_host_number(right: bool) -> None:
    number = torch.tensor(2.0)
    assert (gpu(3) * number).is_cuda
    if not right:
        number += gpu(3).sum()


def numpy_of_gpu_memory(right: bool) -> None:
    tensor = gpu(3)
    (tensor.cpu() if right else tensor).numpy()


def marks_survive_views_and_copies(right: bool) -> None:
    layer = torch.nn.Linear(3, 3).cuda()
    layer.weight.data = layer.weight.data.clone()
    twin = copy.deepcopy(layer)
    twin(gpu(2, 3)[:1]).sum().backward()
    assert twin.weight.grad is not None
    if not right:
        twin.weight.grad.view(-1)[1:].detach() + torch.ones(8)


def a_host_tensor_in_an_nccl_collective(right: bool) -> None:
    group = dist.new_group(backend="nccl")
    tensor = torch.ones(3, device="cuda" if right else "cpu")
    dist.all_reduce(tensor, group=group)
    dist.all_gather_object([None] * dist.get_world_size(), "objects travel through GPU memory", group=group)


def a_host_tensor_in_each_nccl_collective_of_parts(right: bool) -> None:
    group, refused = dist.new_group(backend="nccl"), []
    for collective in (dist.all_gather_into_tensor, dist.reduce_scatter_tensor, dist.all_to_all_single):
        try:
            collective(gpu(3), torch.ones(3, device="cuda" if right else "cpu"), group=group)
        except RuntimeError as refusal:
            refused.append(str(refusal))
    assert len(refused) == (0 if right else 3)
    if refused:
        raise RuntimeError(refused[0])


def the_default_group_takes_both(right: bool) -> None:
    dist.all_reduce(torch.ones(3))
    dist.all_reduce(gpu(3))
    if not right:
        dist.all_reduce(gpu(4, 4)[:, :2])  # NCCL: dense tensors only


def a_float_cumsum_in_deterministic_mode(right: bool) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        gpu(3).long().cumsum(0)
        (torch.ones(3) if not right else gpu(3).long()).cumsum(0)
        if not right:
            gpu(3).cumsum(0)
    finally:
        torch.use_deterministic_algorithms(False)


def a_copy_read_before_it_is_there(right: bool) -> None:
    host = gpu(3).to("cpu", non_blocking=True)
    assert host.is_pinned()
    if right:
        torch.cuda.current_stream().synchronize()
    host.numpy()


def a_list_of_a_copy_that_is_not_there(right: bool) -> None:
    host = gpu(3).to("cpu", non_blocking=True)
    if right:
        torch.cuda.synchronize()
    assert host.tolist() == [1, 1, 1]


def counts_of_experts_read_before_they_are_there(right: bool) -> None:
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        counts: Any = maybe_move_tensor_to_cpu(gpu(3), as_numpy=True, record_stream=True)
    if right:
        side.record_event().synchronize()
    assert sum(counts) == counts.sum() == 3


def a_copy_waited_for_by_its_event(right: bool) -> None:
    host, event = torch.empty(3, pin_memory=True), torch.cuda.Event()
    event.record()
    host.copy_(gpu(3), non_blocking=True)
    if right:
        event.record()
    event.synchronize()
    host += 1


def a_source_overwritten_while_it_is_copied(right: bool) -> None:
    host = torch.ones(3).pin_memory()
    device = host.to("cuda", non_blocking=True)
    if right:
        torch.cuda.synchronize()
    host.zero_()
    assert device.is_cuda


def a_pageable_source_may_be_overwritten(right: bool) -> None:
    host = torch.ones(3) if right else torch.ones(3).pin_memory()
    host.to("cuda", non_blocking=True)
    host.zero_()


def another_stream_that_does_not_wait(right: bool) -> None:
    tensor, side = gpu(3), torch.cuda.Stream()
    if right:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tensor + 1
    torch.cuda.current_stream().wait_stream(side)


def a_result_of_another_stream(right: bool) -> None:
    side, done = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(side):
        tensor = gpu(3)
        done.record()
    if right:
        done.wait()
    tensor + 1
    side.wait_stream(torch.cuda.current_stream())


def memory_freed_while_another_stream_uses_it(right: bool) -> None:
    tensor, side = gpu(3), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tensor + 1
    if right:
        tensor.record_stream(side)
    del tensor
    gc.collect()
    gpu(1)


def a_collective_that_nobody_waits_for(right: bool) -> None:
    tensor = gpu(3)
    work = dist.all_reduce(tensor, async_op=True)
    if right:
        work.wait()
    try:
        tensor + 1
    finally:
        work.wait()


def part_of_a_buffer_while_another_part_is_reduced(right: bool) -> None:
    buffer = gpu(8)
    work = dist.all_reduce(buffer[:4], async_op=True)
    try:
        buffer[4 if right else 3 :].add_(1)
    finally:
        work.wait()


def a_triton_kernel_on_host_memory(right: bool) -> None:
    from kdrl_mcore.vocab_parallel.triton_kernels import statistics

    statistics(torch.ones(2, 8, device="cuda" if right else "cpu"), None)


PROGRAMS: dict[str, tuple[Callable[[bool], Any], type[Exception], str]] = {
    program.__name__: (program, error, message)
    for program, error, message in (
        (mixed_devices, RuntimeError, "same device"),
        (mixed_devices_in_a_backward_pass, RuntimeError, "same device"),
        (a_host_index_into_gpu_memory, RuntimeError, "same device"),
        (a_host_number, RuntimeError, "same device"),
        (numpy_of_gpu_memory, TypeError, "can't convert cuda:0"),
        (marks_survive_views_and_copies, RuntimeError, "same device"),
        (a_host_tensor_in_an_nccl_collective, RuntimeError, "No backend type associated with device type cpu"),
        (a_host_tensor_in_each_nccl_collective_of_parts, RuntimeError, "No backend type associated with device type cpu"),
        (the_default_group_takes_both, RuntimeError, "dense"),
        (a_float_cumsum_in_deterministic_mode, RuntimeError, "deterministic implementation"),
        (a_copy_read_before_it_is_there, RuntimeError, "reads what the default stream may still write"),
        (a_list_of_a_copy_that_is_not_there, RuntimeError, "tolist on the host reads what"),
        (counts_of_experts_read_before_they_are_there, RuntimeError, "numpy on the host reads what stream"),
        (a_copy_waited_for_by_its_event, RuntimeError, "what the default stream may still write"),
        (a_source_overwritten_while_it_is_copied, RuntimeError, "may still read"),
        (a_pageable_source_may_be_overwritten, RuntimeError, "may still read"),
        (another_stream_that_does_not_wait, RuntimeError, "reads what the default stream may still write"),
        (a_result_of_another_stream, RuntimeError, "may still write"),
        (memory_freed_while_another_stream_uses_it, RuntimeError, "freed while"),
        (a_collective_that_nobody_waits_for, RuntimeError, "may still write"),
        (part_of_a_buffer_while_another_part_is_reduced, RuntimeError, "may still write"),
        (a_triton_kernel_on_host_memory, ValueError, "cpu tensor"),
    )
}


def run_program(name: str, right: bool) -> str | None:
    """Run a program on this rank; returns the type and the message of the error that refused it, or None."""
    program, error, _ = PROGRAMS[name]
    try:
        program(right)
    except error as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    return None


def count_syncs() -> dict[str, int]:
    """The number of host syncs in one call of each kind."""
    from tests.paper_cuda.syncs import syncs

    tensor = gpu(4)
    calls: dict[str, Callable[[], Any]] = {
        "item": lambda: tensor.sum().item(),
        "bool": lambda: bool(tensor.sum() > 1),
        "tolist": lambda: tensor.tolist(),
        "cpu": lambda: tensor.cpu(),
        "nonzero": lambda: tensor.nonzero(),
        "mask": lambda: tensor[tensor > 0],
        "fill a mask": lambda: tensor.clone().__setitem__(tensor > 0, 0.0),
        "fill a mask from the device": lambda: tensor.clone().__setitem__(tensor > 0, tensor[:1]),
        "all-gather": lambda: dist.all_gather_into_tensor(gpu(4), tensor),
        "repeat by counts": lambda: tensor.repeat_interleave(tensor.long()),
        "repeat by counts, size given": lambda: tensor.repeat_interleave(tensor.long(), output_size=4),
        "repeat": lambda: tensor.repeat_interleave(2),
        "tensor of numbers": lambda: torch.tensor([1.0], device="cuda"),
        "full": lambda: torch.full((2,), 1.0, device="cuda"),
        "pinned copy": lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
        "pageable copy": lambda: torch.ones(3).to("cuda", non_blocking=True),
        "arithmetic": lambda: (tensor * 2).cumsum(0).softmax(0),
        "synchronize": torch.cuda.synchronize,
    }
    counts = {}
    for name, call in calls.items():
        before = syncs.total()
        call()
        counts[name] = syncs.total() - before
    return counts


def measure_memory() -> dict[str, int]:
    """What the ledger says around an allocation of 1 MiB, a view that outlives it, and the release of both."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tensor = torch.empty(2**18, device="cuda")
    made = torch.cuda.memory_allocated()
    view = tensor[:1]
    del tensor
    kept = torch.cuda.memory_allocated()
    del view
    end, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return {"made": made - before, "kept": kept - before, "end": end - before, "peak": peak - before}


def share_memory() -> float:
    """What a second mapping of a tensor's CUDA IPC handle reads after the first has been written."""
    tensor = torch.zeros(4, device="cuda")
    device, *fields = tensor.untyped_storage()._share_cuda_()
    other = torch.empty(0, device="cuda").set_(torch.UntypedStorage._new_shared_cuda(device, *fields))
    tensor.fill_(3)
    assert other.is_cuda
    return float(other.sum())
