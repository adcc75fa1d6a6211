"""Load weights in place in vLLM's worker processes: all of vLLM (0.32 and 0.33) that a refit needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def reload_weights(worker: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Load tensors that arrive under their HF names, on CPU and CUDA.

    vLLM gathers a layer's tensors, then processes them (on CPU it packs them for its kernels) into the memory of the old ones.
    If the stream breaks off, some layers are incomplete, and vLLM would add the next stream's tensors to them. They are
    therefore finalized with the tensors that have arrived: the weights are then wrong, and the next refit replaces all of them.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    try:
        worker.reload_weights(weights_iterator=weights)
    except BaseException:
        with set_current_vllm_config(worker.vllm_config):
            finalize_layerwise_reload(worker.model_runner.get_model(), worker.model_config)
        raise
    _repack_tied_head(worker.model_runner.get_model())


def _repack_tied_head(model: nn.Module) -> None:
    """On CPU vLLM computes with a packed copy of each matrix. Its reload does not update the copy of a head that shares the
    embedding's weight, so the head would keep its old weights."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
