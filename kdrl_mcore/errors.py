"""Errors a user can act on: each message says what is wrong, where, and what to do.

The command-line entry points print the message on one line (no traceback) and exit with `exit_code`.
"""


class KdrlError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = 1


class ConfigError(KdrlError):
    """A configuration key or value is wrong."""

    exit_code = 2


class DataError(KdrlError):
    """A data set, a rollout file or a tokenizer is wrong."""


class ModelError(KdrlError):
    """A model directory is wrong, or holds an architecture or a feature that is not supported."""


class CheckpointError(KdrlError):
    """A training checkpoint is missing, incomplete, damaged, or of another run."""


class StorageError(KdrlError):
    """The run directory cannot be written: a full, read-only or vanished file system."""


class RewardError(KdrlError):
    """The verifier failed (which is never the same as a wrong answer)."""


class NumericalError(KdrlError):
    """Loss, gradient or log-probs were NaN or infinite too many updates in a row."""


class GpuMemoryError(KdrlError):
    """The GPU has not the memory for what the configuration asks of it."""


class EngineError(KdrlError):
    """A rollout engine failed and cannot be brought back, or refuses what it is asked."""


class RefitError(KdrlError):
    """An engine did not get the student's weights: what it holds is unknown until a refit succeeds."""


HANG_EXIT_CODE = 75
"""Of a run that its watchdog ended (BSD's EX_TEMPFAIL): started again, it goes on from its last checkpoint."""
