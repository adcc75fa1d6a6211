"""Errors that a user can act on: each message says what is wrong, where, and what to do.

The command-line entry points print the message on one line (no traceback) and exit with `exit_code`.
"""


class KdrlError(Exception):
    """The base class of every error that this project raises on purpose."""

    exit_code = 1


class ConfigError(KdrlError):
    """A configuration key or value is wrong."""

    exit_code = 2


class DataError(KdrlError):
    """A data set, a rollout file or a tokenizer is wrong."""


class ModelError(KdrlError):
    """A model directory is wrong, or holds an architecture or a feature that is not supported."""


class CheckpointError(KdrlError):
    """A training checkpoint is missing, incomplete or damaged, or belongs to another run."""


class StorageError(KdrlError):
    """The run directory cannot be written: its file system is full, read-only or gone."""


class RewardError(KdrlError):
    """The verifier failed, which never counts as a wrong answer."""


class NumericalError(KdrlError):
    """Loss, gradient or log-probs were NaN or infinite in too many consecutive updates, or an update made weights NaN or
    infinite."""


class GpuMemoryError(KdrlError):
    """The GPU does not have enough memory for this configuration."""


class EngineError(KdrlError):
    """A rollout engine failed and cannot be restarted, or refuses a request."""


class TeacherError(KdrlError):
    """A teacher's server failed, refuses a request, or is not the teacher that the run expects."""


class RefitError(KdrlError):
    """An engine did not receive the student's weights; its own weights are undefined until a refit succeeds."""


HANG_EXIT_CODE = 75
"""The exit code of a run that its watchdog ended (BSD's EX_TEMPFAIL). Started again, it resumes from its last checkpoint."""
