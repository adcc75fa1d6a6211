"""Paper CUDA: a rehearsal of a CUDA run on the CPU, with real numbers.

Tensors are ordinary CPU tensors whose memory is marked as a GPU's (`memory.py`). From these marks torch's functions answer as
they would on CUDA (`questions.py`, `module.py`). Every operation is checked where torch dispatches it (`dispatch.py`), in the
order that streams and events impose (`streams.py`). gloo stands in for NCCL (`collectives.py`), Triton's interpreter for Triton
(`triton_kernels.py`) and plain torch for the attention kernels (`attention.py`). What CUDA refuses is refused, and what it
would silently corrupt is an error too.

Call `install()` before importing anything of kdrl_mcore or Megatron-Core. It lasts for the life of the process and of the
processes forked from it: `import_training` prepares a process to fork ranks from, and each rank then chooses its GPU
(`choose_gpu`).
"""

from __future__ import annotations

import os
from typing import Any

_installed = False


def install() -> None:
    """Make this process one that has a paper GPU. Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch

    from tests.paper_cuda import attention, collectives, dispatch, module, products, questions, triton_kernels

    torch.compile = _leave_uncompiled  # type: ignore[assignment]  # importing the compiler takes longer than everything else
    attention.install()
    questions.install()
    module.install()
    collectives.install()
    products.install()
    triton_kernels.install()
    dispatch.install()


def _leave_uncompiled(function: Any = None, **options: Any) -> Any:
    return function if function is not None else _leave_uncompiled


def import_training() -> None:
    """Call `install` and import everything that a training run imports."""
    from tests.support.fork_server import import_torch

    import_torch()
    install()
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    import kdrl_mcore.cli.train
    import kdrl_mcore.trainer  # noqa: F401


def choose_gpu() -> None:
    """On a rank: make its GPU the current one."""
    import torch

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
