"""The progress of a run for a person: a live display on a terminal, otherwise a plain line from time to time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress

from rich import progress as rich_progress
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

MIN_SECONDS_BETWEEN_LINES = 1.0
"""Plain output skips steps that end sooner than this after the last line, except evaluations and the last step."""

KEY_NUMBERS: tuple[tuple[str, str, str], ...] = (
    ("eval/accuracy", "held-out", ".1%"),
    ("accuracy", "accuracy", ".1%"),
    ("reward", "reward", ".3f"),
    ("kl", "KL", ".4f"),
    ("beta", "beta", ".2g"),
    ("response_length", "length", ".1f"),
    ("loss", "loss", ".4f"),
)
"""Metric, label and format of the displayed numbers, if a step has them."""


class Progress:
    """Phase, step k of n, time left and the key numbers of a run, on rank 0, between `start` and `close`.

    On a terminal it is a live display; otherwise it prints concise lines without control codes. `enabled=False`
    (`logging.progress=false`) shows only `message`s.
    """

    def __init__(self, steps: int, enabled: bool = True, console: Console | None = None) -> None:
        """`steps` is the number of the run's last step; `console` is where to write, standard output by default."""
        self._steps = steps
        self._console = console or Console(highlight=False)
        self._enabled = enabled
        self._first_step = 0
        self._started = time.monotonic()
        self._last_line = -MIN_SECONDS_BETWEEN_LINES
        self._numbers = Text()
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description:<10}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[left]}"),
            console=self._console,
        )
        self._task = self._bar.add_task("starting", total=steps, left="")
        live = enabled and self._console.is_terminal and self._console.file.isatty()
        self._live = Live(Group(self._bar, self._numbers), console=self._console, refresh_per_second=4) if live else None

    def start(self, first_step: int = 0) -> None:
        """Begin, with `first_step` steps already done (a resumed run)."""
        self._first_step = first_step
        self._started = time.monotonic()
        self._bar.update(self._task, completed=first_step)
        if self._live is not None:
            self._live.start()

    def close(self) -> None:
        """End the live display, leaving its last state on the terminal."""
        if self._live is not None:
            self._live.stop()

    def phase(self, name: str) -> None:
        """Show what the run is doing (rollout, teacher, train, evaluation, ...), only on a terminal."""
        self._bar.update(self._task, description=name)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` is done (counted from 1; 0 for an evaluation before training), with its metrics."""
        left = f"{_duration(self._seconds_left(step))} left" if step > self._first_step else ""
        numbers = key_numbers(metrics)
        if self._live is not None:
            self._bar.update(self._task, completed=step, left=left)
            self._numbers.plain = numbers
        elif self._enabled and self._line_is_due(step, metrics):
            self._last_line = time.monotonic()
            self._print("  ".join(part for part in (f"step {step}/{self._steps}", numbers, left) if part))

    def message(self, text: str) -> None:
        """Print a line above the display: an alert, a checkpoint written, the end of the run."""
        self._print(text)

    def _print(self, text: str) -> None:
        with suppress(OSError):  # a full disk, or a terminal that is gone, must not end the run
            self._console.print(text, markup=False, soft_wrap=self._live is None)  # plain lines are not cut at a width

    def _line_is_due(self, step: int, metrics: Mapping[str, float]) -> bool:
        waited = time.monotonic() - self._last_line >= MIN_SECONDS_BETWEEN_LINES
        return waited or step == self._steps or "eval/accuracy" in metrics

    def _seconds_left(self, step: int) -> float:
        return (time.monotonic() - self._started) / (step - self._first_step) * (self._steps - step)


def key_numbers(metrics: Mapping[str, float]) -> str:
    """The numbers of `KEY_NUMBERS` that `metrics` has, and the tokens per second of the step, on one line."""
    shown = [f"{label} {metrics[name]:{form}}" for name, label, form in KEY_NUMBERS if name in metrics]
    if metrics.get("time/step", 0.0) > 0.0 and "tokens" in metrics:
        shown.append(f"{metrics['tokens'] / metrics['time/step']:.0f} tokens/s")
    return "  ".join(shown)


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {int(seconds) % 60:02d} s" if minutes else f"{int(seconds)} s"
