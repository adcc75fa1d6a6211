"""Paper CUDA: a CUDA run rehearsed on the CPU, with real numbers.

Tensors are ordinary CPU tensors whose memory is marked as a GPU's (`memory.py`). torch answers from the marks as it would on
CUDA (`questions.py`, `module.py`), every operation is checked where torch dispatches it (`dispatch.py`), in the order that
streams and events give it (`streams.py`), NCCL is played by gloo (`collectives.py`), Triton by its interpreter
(`triton_kernels.py`) and attention by plain torch (`attention.py`). What CUDA refuses is refused; what it would silently spoil
is an error too.

`install()` comes before anything of kdrl_mcore or Megatron-Core is imported. It lasts for the life of the process, and of those
that are forked from it: `import_training` prepares one to fork ranks from, each of which then chooses its GPU (`choose_gpu`).
"""

from __future__ import annotations

import os
from typing import Any

_installed = False


def install() -> None:
    """Make this process one that has a GPU. Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch

    from tests.paper_cuda import attention, collectives, dispatch, module, products, questions, triton_kernels

    torch.compile = _leave_uncompiled  # type: ignore[assignment]  # importing the compiler takes longer than all else
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
    """`install`, and import all that a training run does."""
    from tests.support.fork_server import import_torch

    import_torch()
    install()
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    import kdrl_mcore.cli.train
    import kdrl_mcore.trainer  # noqa: F401


def choose_gpu() -> None:
    """In a rank: its own GPU is the current one."""
    import torch

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
