"""The report as a picture (PNG), where no page can be shown: curves of a few runs, or a dot and an interval per setting."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from kdrl_mcore.studies.report.curves import CURVES, Curve, present
from kdrl_mcore.studies.report.lines import Line, coinciding, line_of
from kdrl_mcore.studies.report.runs import Group
from kdrl_mcore.studies.summary import Interval

COLOURS = ("#4269d0", "#e08a00", "#e5484d", "#2a9d8f", "#8e4ec6", "#3ca951", "#d6409f", "#9c6b4e", "#0091c2", "#858b98")
MARKERS = ("o", "s", "^", "D")
FEW_POINTS = 30
"""Lines with at most this many points have markers."""
DASH = 6.0
"""Curves that coincide share the line: a dash of each colour in turn. The length of a dash in line widths."""
SMALLEST_BETA = 1e-4
"""Below this the log axis of beta is linear down to zero."""
MAIN_PANELS = ("accuracy", "reward", "kl", "beta", "response_length", "entropy")
"""The panels that come first, or are the only ones. The panel with the accuracy of sampled responses also shows the held-out
accuracy."""
HELD_OUT_ACCURACY = next(each for each in CURVES if each.key == "eval/accuracy")
COLUMNS = 3
STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
    "text.parse_math": False,  # a name may hold "$"
}


def picture(groups: Sequence[Group], main_panels: bool = False) -> bytes:
    """Small multiples of curves against training steps, with one colour per group, as PNG: a panel for each metric that a run
    has, or only the main ones."""
    return _png(plot(groups, main_panels))


def plot(groups: Sequence[Group], main_panels: bool = False) -> Figure:
    """The figure of `picture`."""
    panels = _panels(groups, main_panels)
    rows = -(-len(panels) // COLUMNS)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, COLUMNS, figsize=(13, 0.6 + 3.2 * rows), layout="constrained", squeeze=False)
        for axis, each in zip(axes.flat, panels, strict=False):
            axis.set_title(_title(each))
            _draw(axis, each, groups)
            _finish_axis(axis, each)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        for axis in axes.flat[max(0, len(panels) - COLUMNS) : len(panels)]:
            axis.set_xlabel("training step")
        handles = [
            plt.Line2D([], [], color=_colour(index), linewidth=3, label=_label(group)) for index, group in enumerate(groups)
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(groups), 4), frameon=False, fontsize=12)
    return figure


def _panels(groups: Sequence[Group], main_panels: bool) -> list[Curve]:
    main = [next(each for each in CURVES if each.key == key) for key in MAIN_PANELS]
    return main if main_panels else [*main, *(each for each in present(groups) if each not in (*main, HELD_OUT_ACCURACY))]


def _title(each: Curve) -> str:
    if each.key == "accuracy":
        return "Accuracy (line with dots: held out)"
    unit = {"": "", "%": "", "nats/token": " (nats per token)"}.get(each.unit, f" ({each.unit})")
    return f"{each.title}{' (log scale)' if each.key == 'beta' else unit}"


def intervals_picture(title: str, panels: Mapping[str, Mapping[str, Interval]]) -> bytes:
    """A dot and an interval for each setting, with a panel for each study and a shared axis of accuracy; as PNG."""
    rows = [max(1, len(panel)) for panel in panels.values()]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(8, 0.9 + sum(0.28 * count + 0.5 for count in rows)), layout="constrained", sharex=True,
            height_ratios=rows, squeeze=False,
        )  # fmt: skip
        for axis, (name, panel), colour in zip(axes.flat, panels.items(), COLOURS, strict=False):
            axis.set_title(name)
            for height, (setting, interval) in enumerate(panel.items()):
                low, high = (interval.mean if end is None else end for end in (interval.low, interval.high))
                ends = [[interval.mean - low], [high - interval.mean]]
                axis.errorbar(interval.mean, height, xerr=ends, fmt="o", color=colour, capsize=3, label=setting)
            axis.set_yticks(range(len(panel)), list(panel))
            axis.set_ylim(max(1, len(panel)) - 0.5, -0.5)
            if not panel:
                _leave_empty(axis, "no run is finished")
        axes[-1, 0].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes[-1, 0].set_xlabel(title)
    return _png(figure)


def _label(group: Group) -> str:
    return group.name if len(group.runs) == 1 else f"{group.name} (mean and 95 % interval, {len(group.runs)} seeds)"


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _draw(axis: Axes, each: Curve, groups: Sequence[Group]) -> None:
    """Draw a metric of every group. In the panel of accuracy the main line is the held-out accuracy, if there is one."""
    lines = {index: line for index, group in enumerate(groups) if (line := line_of(group, each)) is not None}
    for index, line in lines.items():
        held_out = line_of(groups[index], HELD_OUT_ACCURACY) if each.key == "accuracy" else None
        if held_out is not None or len(line.each) > 1 or line.is_smoothed:
            for steps, values in line.each:
                axis.plot(steps, values, color=_colour(index), linewidth=0.8, alpha=0.3)
        lines[index] = held_out or line
    shared = coinciding(list(lines.values()))
    for number, (index, line) in enumerate(lines.items()):
        members = next((each for each in shared if number in each), [number])
        _draw_line(axis, line, index, members.index(number), len(members))


def _draw_line(axis: Axes, line: Line, index: int, turn: int, members: int) -> None:
    """Draw a line with its interval; if several lines coincide, draw only this member's dashes."""
    colour = _colour(index)
    axis.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    style = "-" if members == 1 else (DASH * (members - turn), (DASH, DASH * (members - 1)))
    axis.plot(
        line.steps, line.mean, color=colour, linewidth=2.0, linestyle=style, dash_capstyle="butt",
        marker=MARKERS[index % len(MARKERS)] if len(line.steps) <= FEW_POINTS else "", markersize=4,
    )  # fmt: skip


def _finish_axis(axis: Axes, each: Curve) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if not axis.lines:
        _leave_empty(axis, "no run has this")
    elif each.unit == "%":
        axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
    elif each.key == "beta":
        axis.set_yscale("symlog", linthresh=SMALLEST_BETA, linscale=0.3)
        axis.set_ylim(-SMALLEST_BETA / 2, 2 * max(axis.get_ylim()[1], SMALLEST_BETA))
        axis.yaxis.set_major_formatter("{x:g}")
    elif axis.get_ylim()[0] > 0:
        axis.set_ylim(bottom=0)


def _leave_empty(axis: Axes, why: str) -> None:
    axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center", va="center", color="#999999")
    axis.set_yticks([])


def _png(figure: Figure) -> bytes:
    """The figure as PNG in 256 colours, which halves its size without a visible loss."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()
