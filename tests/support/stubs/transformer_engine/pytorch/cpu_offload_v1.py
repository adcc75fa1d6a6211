"""The first form of off-loading; only its flag."""

CPUOffloadEnabled = False
