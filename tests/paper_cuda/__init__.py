"""Paper CUDA: a CUDA run rehearsed on the CPU, with real numbers.

Tensors are ordinary CPU tensors whose memory is marked as a GPU's (`memory.py`). torch answers from the marks as it would on
CUDA (`questions.py`, `module.py`), every operation is checked where torch dispatches it (`dispatch.py`), in the order that
streams and events give it (`streams.py`), NCCL is played by gloo (`collectives.py`) and Triton by its interpreter
(`triton_kernels.py`). What CUDA refuses is refused; what it would silently spoil is an error too.

`install()` comes before anything of kdrl_mcore or Megatron-Core is imported. It lasts for the life of the process.
"""

from __future__ import annotations

import os

_installed = False


def install() -> None:
    """Make this process one that has a GPU. Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from tests import varlen
    from tests.paper_cuda import collectives, dispatch, module, products, questions, triton_kernels

    varlen.install()
    questions.install()
    module.install()
    collectives.install()
    products.install()
    triton_kernels.install()
    dispatch.install()
