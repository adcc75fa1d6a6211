"""The first form of off-load; only its mark."""

CPUOffloadEnabled = False
