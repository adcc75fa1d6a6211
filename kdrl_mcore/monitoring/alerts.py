"""The failure signatures of KDRL runs, as functions of the recent metrics.

Each signature compares a mean over the last `window` steps with earlier windows of the same run, and its alert gives advice.
Values that are missing or not finite are ignored (the trainer itself stops on those); before two windows there are no alerts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import overload

from kdrl_mcore.monitoring.metrics import bounded

History = Sequence[Mapping[str, float]]
"""The metrics of the steps so far, oldest first."""


@dataclass(frozen=True)
class Alert:
    """An observed failure signature: its name, and a line with what was observed and what to do."""

    name: str
    message: str


@dataclass(frozen=True)
class AlertThresholds:
    """When a signature counts as observed. `window` is in steps; a `_ratio` compares with an earlier window of the run."""

    window: int = 5
    reward_ratio: float = 0.5  # collapse: the reward is below this share of the run's best window
    reward_floor: float = 0.05  # ... and that best window was above this at all
    length_ratio: float = 1.5  # explosion: responses are this many times as long as in the first window
    truncated: float = 0.2  # ... and this share of them hits the length limit, more than in the first window
    entropy_ratio: float = 0.1  # collapse: the entropy is below this share of the first window's
    solved_accuracy: float = 0.95  # ... while the accuracy is below this (a solved task needs no entropy)
    kl_ratio: float = 2.0  # blow-up: the KL to the teacher is this many times the run's lowest window
    kl_floor: float = 0.1  # ... and above this, nats per token
    drift_mean: float = 0.05  # sampler and trainer differ by more than this on average, nats per token
    drift_max: float = 1.0  # ... or by more than this on one token, nats; infinite if one token proves nothing
    effective: float = 0.3  # corrections leave this effective share of the tokens
    taught: float = 0.01  # the teacher's weights leave this share of the tokens
    mixed: float = 0.01  # less than this share of a mixture is one of its two parts
    clipped: float = 0.5  # this share of the tokens is clipped
    signal: float = 0.1  # this share of the sampled groups has correct and incorrect responses
    sampled: bool = True  # the run samples its responses; otherwise their rewards and lengths do not depend on it
    has_sampler: bool = True  # responses have a sampler's log-probs, as replayed ones do too
    rewarded: bool = True  # the run learns from rewards
    distilled: bool = True  # the run learns from a teacher
    teachers: tuple[str, ...] = ()  # the names of several


DEFAULT_THRESHOLDS = AlertThresholds()

WATCHED = (
    *("reward", "accuracy", "response_length", "truncated", "entropy", "kl", "drift_mean", "drift_max"),
    *("correction_ess", "kd_importance_ess", "taught_share", "mixed_share", "clip_share", "signal_share"),
)
"""The metrics that the signatures use."""


def kl_of(teacher: str) -> str:
    """The metric of the KL to one of several teachers."""
    return f"teacher/{teacher}/kl"


def _is_watched(metric: str) -> bool:
    return metric in WATCHED or (metric.startswith("teacher/") and metric.endswith("/kl"))


def reward_collapse(history: History, thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> Alert | None:
    """The reward falls far below its earlier best (beta is too high, or KD is in the reward)."""
    if not (thresholds.sampled and thresholds.rewarded):
        return None
    means = _window_means(history, "reward", thresholds.window)
    if not means or max(means) <= thresholds.reward_floor or means[-1] >= thresholds.reward_ratio * max(means):
        return None
    return Alert(
        "reward_collapse",
        f"reward fell to {means[-1]:.3f} from {max(means):.3f}: lower "
        + ("objective.beta or optimizer.lr, or use objective.kd.placement=loss" if thresholds.distilled else "optimizer.lr"),
    )


def length_explosion(history: History, thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> Alert | None:
    """Responses grow and hit the length limit (the student over-imitates the teacher's style)."""
    if not thresholds.sampled:
        return None
    lengths = _window_means(history, "response_length", thresholds.window)
    clipped = _window_means(history, "truncated", thresholds.window)
    if not lengths or not clipped or lengths[-1] < thresholds.length_ratio * lengths[0]:
        return None
    if clipped[-1] < thresholds.truncated or clipped[-1] <= clipped[0]:
        return None
    return Alert(
        "length_explosion",
        f"responses grew from {lengths[0]:.0f} to {lengths[-1]:.0f} tokens and {clipped[-1]:.0%} hit the limit: "
        + ("lower objective.beta, anneal it, or " if thresholds.distilled else "")
        + "raise rollout.max_response_tokens",
    )


def entropy_collapse(history: History, thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> Alert | None:
    """The student stops exploring before the task is solved. Does not apply without rewards: a student that learns only from
    given answers or a teacher ends with their entropy."""
    if not (thresholds.sampled and thresholds.rewarded):
        return None
    entropies = _window_means(history, "entropy", thresholds.window)
    accuracies = _window_means(history, "accuracy", thresholds.window)
    if not entropies or entropies[-1] >= thresholds.entropy_ratio * entropies[0]:
        return None
    if accuracies and accuracies[-1] >= thresholds.solved_accuracy:
        return None
    return Alert(
        "entropy_collapse",
        f"entropy fell from {entropies[0]:.3f} to {entropies[-1]:.4f} nats per token: lower optimizer.lr or raise "
        "objective.clip_high",
    )


def kl_blow_up(history: History, thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> Alert | None:
    """The student moves away from the teacher it distils from."""
    if not thresholds.distilled or thresholds.teachers:
        return None
    return _kl_blow_up(history, thresholds, "kl", "kl_blow_up", "the teacher")


def kl_blow_ups(history: History, thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> list[Alert]:
    """The student moves away from one of several teachers: an alert for each of them."""
    alerts = (
        _kl_blow_up(history, thresholds, kl_of(name), f"kl_blow_up of {name}", f"the teacher {name}")
        for name in thresholds.teachers
    )
    return [alert for alert in alerts if alert is not None]


def _kl_blow_up(history: History, thresholds: AlertThresholds, metric: str, name: str, teacher: str) -> Alert | None:
    means = _window_means(history, metric, thresholds.window)
    if not means or means[-1] < thresholds.kl_floor or means[-1] < thresholds.kl_ratio * min(means):
        return None
    return Alert(
        name,
        f"KL to {teacher} rose to {means[-1]:.3f} from {min(means):.3f} nats per token: lower optimizer.lr, or check that "
        "the teacher fits this student and these prompts",
    )


def sampler_drift(history: History, thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> Alert | None:
    """The sampler's log-probs differ from the trainer's: the run is no longer on-policy."""
    if not thresholds.has_sampler:
        return None
    mean, largest = (_window_means(history, name, thresholds.window) for name in ("drift_mean", "drift_max"))
    worst_mean, worst_token = mean[-1] if mean else 0.0, largest[-1] if largest else 0.0
    if worst_mean <= thresholds.drift_mean and worst_token <= thresholds.drift_max:
        return None
    return Alert(
        "sampler_drift",
        f"sampler and trainer log-probs differ by {worst_mean:.4f} on average and up to {worst_token:.3f} nats: check the "
        "refit and the sampler's dtype (if it is rounding: rollout.max_log_prob_drift), or set "
        "objective.sampler_correction.kind=truncate",
    )


def few_effective_tokens(history: History, thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> Alert | None:
    """A few tokens carry most of the weight of an importance correction: the sampler is too far from the student."""
    names = {"correction_ess": "objective.sampler_correction", "kd_importance_ess": "objective.kd.importance"}
    lowest = {key: means[-1] for name, key in names.items() if (means := _window_means(history, name, thresholds.window))}
    key = min(lowest, key=lambda each: lowest[each], default=None)
    if not thresholds.has_sampler or key is None or lowest[key] >= thresholds.effective:
        return None
    return Alert(
        "few_effective_tokens",
        f"the weights of {key} rest on {lowest[key]:.0%} of the tokens: sample more often (batch.updates_per_step, "
        "rollout.steps_ahead), lower optimizer.lr or the bound, or correct tokens instead of sequences",
    )


def nothing_taught(history: History, thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> Alert | None:
    """Mask, combination and token weights leave almost nothing to distil."""
    means = _window_means(history, "taught_share", thresholds.window)
    if not thresholds.distilled or not means or means[-1] >= thresholds.taught:
        return None
    return Alert(
        "nothing_taught",
        f"{means[-1]:.1%} of the tokens are distilled: look at objective.combine, objective.kd.token_weight and the mask",
    )


def one_sided_mixture(history: History, thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> Alert | None:
    """A mixture of two forms of distillation uses one of them alone."""
    means = _window_means(history, "mixed_share", thresholds.window)
    if not thresholds.distilled or not means or thresholds.mixed <= means[-1] <= 1 - thresholds.mixed:
        return None
    return Alert(
        "one_sided_mixture",
        f"{means[-1]:.1%} of distillation is the divergence over the vocabulary: objective.kd.mix mixes nothing; change "
        "objective.kd.mix_above, or leave it out",
    )


def mostly_clipped(history: History, thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> Alert | None:
    """The policy loss has no gradient on most tokens: the policy is too far from the one it is compared with."""
    means = _window_means(history, "clip_share", thresholds.window)
    if not thresholds.rewarded or not means or means[-1] <= thresholds.clipped:
        return None
    return Alert(
        "mostly_clipped",
        f"{means[-1]:.0%} of the tokens are clipped: lower optimizer.lr or batch.updates_per_step, widen "
        "objective.clip_low and clip_high, or (objective.combine.kind=ratio) lower objective.beta",
    )


def few_signals(history: History, thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> Alert | None:
    """Most prompts are too easy or too hard, so the group filter drops most of what is sampled."""
    means = _window_means(history, "signal_share", thresholds.window)
    if not (thresholds.sampled and thresholds.rewarded) or not means or means[-1] >= thresholds.signal:
        return None
    return Alert(
        "few_signals",
        f"{means[-1]:.1%} of the sampled groups have correct and incorrect responses: choose prompts that fit the student, or "
        "raise rollout.responses_per_prompt",
    )


SIGNATURES: tuple[Callable[[History, AlertThresholds], Alert | None], ...] = (
    reward_collapse,
    length_explosion,
    entropy_collapse,
    kl_blow_up,
    sampler_drift,
    few_effective_tokens,
    nothing_taught,
    one_sided_mixture,
    mostly_clipped,
    few_signals,
)


def check_alerts(history: History, thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> list[Alert]:
    """Every failure signature observed at the end of `history`."""
    found = [alert for signature in SIGNATURES if (alert := signature(history, thresholds)) is not None]
    return found + kl_blow_ups(history, thresholds)


class GrowingHistory(Sequence[Mapping[str, float]]):
    """The steps so far, added one at a time. It updates the window means of every metric, so that checking signatures after
    each step does not read all earlier steps again."""

    def __init__(self, window: int) -> None:
        """An empty history; `window` is as in `AlertThresholds`."""
        self.window = window
        self._rows: list[Mapping[str, float]] = []
        self._values: dict[str, list[float]] = {}
        self._means: dict[str, list[list[float]]] = {}

    def append(self, row: Mapping[str, float]) -> None:
        """Add a step."""
        self._rows.append(row)
        for name in filter(_is_watched, row):
            if not math.isfinite(value := row.get(name, math.nan)):
                continue
            values = self._values.setdefault(name, [])
            values.append(value)
            if len(values) >= self.window:
                # Counted back from this value, there is one more window than from the value a window earlier.
                means = self._means.setdefault(name, [[] for _ in range(self.window)])
                mean, seen = fmean(values[-self.window :]), means[len(values) % self.window]
                lowest, highest = (min(mean, seen[1]), max(mean, seen[2])) if seen else (mean, mean)
                means[len(values) % self.window] = [seen[0] if seen else mean, lowest, highest, mean]

    def window_means(self, name: str) -> list[float]:
        """The first, lowest, highest and last of the means over successive windows counted back from the newest step, which is
        all that signatures need; [] before two windows."""
        values = self._values.get(name, [])
        return self._means[name][len(values) % self.window] if len(values) >= 2 * self.window else []

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, float]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mapping[str, float]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, float] | list[Mapping[str, float]]:
        return self._rows[index]


class AlertWatch:
    """Watches a run step by step and reports each signature when it appears, but not again while it persists."""

    def __init__(self, history: History = (), thresholds: AlertThresholds = DEFAULT_THRESHOLDS) -> None:
        """Start from the steps already done (`history`, for a resumed run)."""
        self._thresholds = thresholds
        self.load_state_dict(history)

    def state_dict(self) -> list[dict[str, float]]:
        """The steps so far, as JSON values."""
        return [dict(row) for row in self._history]

    def load_state_dict(self, history: History) -> None:
        """Continue from these steps, whose signatures have already been reported."""
        self._history = GrowingHistory(self._thresholds.window)
        for metrics in history:
            self._history.append(_watched(metrics))
        self._showing = {alert.name for alert in check_alerts(self._history, self._thresholds)}

    def observe(self, metrics: Mapping[str, float]) -> list[Alert]:
        """Add one step, and return the signatures that it newly shows."""
        self._history.append(_watched(metrics))
        alerts = check_alerts(self._history, self._thresholds)
        new = [alert for alert in alerts if alert.name not in self._showing]
        self._showing = {alert.name for alert in alerts}
        return new


def _watched(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if _is_watched(name) and math.isfinite(bounded(value))}


def _window_means(history: History, name: str, window: int) -> list[float]:
    """Means of the metric over successive windows counted back from the newest step, oldest first; [] before two windows."""
    if isinstance(history, GrowingHistory) and history.window == window:
        return history.window_means(name)
    values = [row[name] for row in history if name in row and math.isfinite(row[name])]
    if len(values) < 2 * window:
        return []
    first = len(values) % window
    return [fmean(values[start : start + window]) for start in range(first, len(values), window)]
