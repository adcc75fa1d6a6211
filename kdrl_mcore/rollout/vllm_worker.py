"""What vLLM's workers can do more (`worker_extension_cls`): read the student's weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdrl_mcore.errors import RefitError
from kdrl_mcore.rollout.weight_reader import WeightReader


class RefitWorker:
    """Mixed into each worker of an engine."""

    rank: int
    device: torch.device
    parallel_config: Any

    def receive_weights(self, spec: dict) -> dict:
        """Load what a trainer sends.

        Args:
            spec: of the server's request, as `WeightWriter` made it.

        Returns:
            The digest of what was received, and the number of its tensors and bytes.

        Raises:
            RefitError: naming the tensor. The weights are then a mixture.
        """
        reader = WeightReader(spec, self.rank, self.parallel_config.world_size, self.device)
        try:
            self.load_received(iter(reader))
        finally:
            reader.close()
        if not reader.result:
            raise RefitError(f"worker {self.rank} did not read all tensors")
        return reader.result

    def load_received(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Load tensors that come under their HF names."""
        from kdrl_mcore.rollout.vllm_reload import reload_weights

        reload_weights(self, weights)
