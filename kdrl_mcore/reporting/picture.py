"""The report as a picture (PNG), for places that show no page: curves of a few runs; a dot and an interval for each setting."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from kdrl_mcore.monitoring.summary import Interval, curve, t_interval
from kdrl_mcore.reporting.runs import Group

COLOURS = ("#4269d0", "#e08a00", "#e5484d", "#2a9d8f", "#8e4ec6", "#3ca951", "#d6409f", "#9c6b4e", "#0091c2", "#858b98")
SMOOTHING_STEPS = 5
"""Training curves show each step faintly, and the mean over this many steps as the line."""
SMALLEST_BETA = 1e-4
"""Below this the log axis of beta goes on linearly to zero."""
PANELS: tuple[tuple[str, str, bool], ...] = (
    ("Accuracy (line with dots: held out)", "accuracy", True),
    ("Reward", "reward", False),
    ("KL to the teacher (nats per token)", "kl", False),
    ("Coefficient of distillation, beta (log scale)", "beta", False),
    ("Response length (tokens)", "response_length", False),
    ("Entropy of the student (nats per token)", "entropy", False),
)
"""Title, metric, and whether the axis is in per cent."""
STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
}


def picture(groups: Sequence[Group]) -> bytes:
    """Small multiples of curves against training steps, one colour a group, as PNG."""
    return _png(plot(groups))


def plot(groups: Sequence[Group]) -> Figure:
    """The figure of `picture`."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
        for axis, (title, metric, is_share) in zip(axes.flat, PANELS, strict=True):
            axis.set_title(title)
            for index, group in enumerate(groups):
                _draw(axis, group, metric, COLOURS[index % len(COLOURS)])
            _finish_axis(axis, is_share)
            if metric == "beta" and axis.lines:
                axis.set_yscale("symlog", linthresh=SMALLEST_BETA, linscale=0.3)
                axis.set_ylim(-SMALLEST_BETA / 2, 2 * max(axis.get_ylim()[1], SMALLEST_BETA))
                axis.yaxis.set_major_formatter("{x:g}")
        for axis in axes[-1]:
            axis.set_xlabel("training step")
        handles = [
            plt.Line2D([], [], color=COLOURS[index % len(COLOURS)], linewidth=3, label=_label(group))
            for index, group in enumerate(groups)
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(groups), 4), frameon=False, fontsize=12)
    return figure


def intervals_picture(title: str, panels: Mapping[str, Mapping[str, Interval]]) -> bytes:
    """A dot and an interval for each setting, a panel for each study, all on one axis of accuracy; as PNG."""
    rows = [max(1, len(panel)) for panel in panels.values()]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(8, 0.9 + sum(0.28 * count + 0.5 for count in rows)), layout="constrained", sharex=True,
            height_ratios=rows, squeeze=False,
        )  # fmt: skip
        for axis, (name, panel), colour in zip(axes.flat, panels.items(), COLOURS, strict=False):
            axis.set_title(name)
            for height, (setting, interval) in enumerate(panel.items()):
                axis.errorbar(interval.mean, height, xerr=interval.half_width, fmt="o", color=colour, capsize=3, label=setting)
            axis.set_yticks(range(len(panel)), list(panel))
            axis.set_ylim(max(1, len(panel)) - 0.5, -0.5)
            if not panel:
                _say_nothing(axis, "nothing is finished")
        axes[-1, 0].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes[-1, 0].set_xlabel(title)
    return _png(figure)


def _label(group: Group) -> str:
    return group.name if len(group.runs) == 1 else f"{group.name} (mean and 95 % interval, {len(group.runs)} seeds)"


def _draw(axis: Axes, group: Group, metric: str, colour: str) -> None:
    held_out = "eval/accuracy" if metric == "accuracy" else ""
    curves = [dict(zip(*curve(run.rows, held_out), strict=True)) for run in group.runs]
    steps = sorted(set.intersection(*map(set, curves)))
    has_line = len(steps) > 1
    if steps:
        intervals = [interval for step in steps if (interval := t_interval(each[step] for each in curves))]
        half = [interval.half_width or 0.0 for interval in intervals]
        mean = [interval.mean for interval in intervals]
        low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(steps, mean, color=colour, linewidth=2.2, marker="o", markersize=5)
    curves = [dict(zip(*curve(run.rows, metric), strict=True)) for run in group.runs]
    steps = sorted(set.intersection(*map(set, curves)))
    for each in curves if steps else []:
        axis.plot(steps, [each[step] for step in steps], color=colour, linewidth=0.8, alpha=0.3)
    if steps and not has_line:
        means = [fmean(each[step] for each in curves) for step in steps]
        axis.plot(steps, means if metric == "beta" else _smooth(means), color=colour, linewidth=2.0)


def _finish_axis(axis: Axes, is_share: bool) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if not axis.lines:
        _say_nothing(axis, "no run has this")
    elif is_share:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif axis.get_ylim()[0] > 0:
        axis.set_ylim(bottom=0)


def _say_nothing(axis: Axes, why: str) -> None:
    axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center", va="center", color="#999999")
    axis.set_yticks([])


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean over the last `SMOOTHING_STEPS` values at each point (fewer at the start)."""
    return [fmean(values[max(0, end - SMOOTHING_STEPS) : end]) for end in range(1, len(values) + 1)]


def _png(figure: Figure) -> bytes:
    """The figure as PNG, in 64 colours: a third of the size, and nothing that one could see is lost."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()
