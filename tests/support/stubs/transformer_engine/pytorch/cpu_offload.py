"""Whether activations are being off-loaded: from 2.10 on, this holds only for the first of two forms of off-loading."""

from __future__ import annotations

from transformer_engine.pytorch import cpu_offload_v1 as v1_code_path

NVTE_CPU_OFFLOAD_V1 = False


def is_cpu_offload_enabled() -> bool:
    return NVTE_CPU_OFFLOAD_V1 and v1_code_path.CPUOffloadEnabled
