"""What planned studies say: one row a run in a CSV file, and a page with a table and plots.

Three axes of a study's grid have a meaning here: `nodes` (sizes of the cluster), `method` (the first choice is compared with the
second) and `batch` (the first choice is the same on every size, the second grows with it). What the others choose is a series.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_mcore.errors import DataError
from kdrl_mcore.experiments.local import PLAN_FILE, is_finished
from kdrl_mcore.experiments.study import Run

GIB = 2**30
PHASES = ("rollout", "teacher", "training")
SPECIAL = ("nodes", "method", "batch")

Answer = dict[str, Any]
"""The content of a `plan.json`."""


@dataclass(frozen=True)
class Point:
    """One series on one number of GPUs.

    Attributes:
        strong: the plan, on the fixed batch.
        weak, other: on the batch that grows, and of the other method; None where the study has none, or it does not fit.
    """

    series: str
    strong: Answer
    weak: Answer | None
    other: Answer | None

    @property
    def gpus(self) -> int:
        """That are paid for."""
        return int(self.strong["gpus"])

    @property
    def overhead(self) -> float | None:
        """Time of an iteration over the other method's."""
        return None if self.other is None else self.strong["seconds"] / self.other["seconds"]


def read_answer(run: Run) -> Answer | None:
    """A run's plan; None where it is not there, or its layout does not exist.

    Raises:
        DataError: the file is damaged.
    """
    if not is_finished(run):
        return None
    path = run.directory / PLAN_FILE
    try:
        answer: Answer = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: remove it, and start the study again") from error
    return None if "refused" in answer else answer


def collect_points(runs: Sequence[Run]) -> list[Point]:
    """Every point whose plan on the fixed batch fits."""
    found: dict[tuple[str, str], dict[tuple[str, str], Answer]] = {}
    choices: dict[str, list[str]] = {axis: [] for axis in SPECIAL}
    for run in runs:
        named = dict(zip(run.axes, run.setting, strict=True))
        for axis in SPECIAL:
            if named.get(axis, "") not in choices[axis]:
                choices[axis].append(named.get(axis, ""))
        answer = read_answer(run)
        if answer is not None and answer["fits"]:
            series = " ".join(name for axis, name in named.items() if axis not in SPECIAL)
            of_point = found.setdefault((series, named.get("nodes", "")), {})
            of_point[named.get("method", ""), named.get("batch", "")] = answer
    method, other = (choices["method"] + [""])[:2]
    fixed, growing = (choices["batch"] + [""])[:2]
    return [
        Point(
            series,
            answers[method, fixed],
            answers.get((method, growing)) if growing else None,
            answers.get((other, fixed)) if other else None,
        )
        for (series, _), answers in found.items()
        if (method, fixed) in answers
    ]


def csv_of(runs: Sequence[Run]) -> bytes:
    """One line a run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seconds = [f"{phase}_seconds" for phase in PHASES]
    numbers = ["seconds", *seconds, "peak_gib", "tokens_per_gpu_second", "gpu_hours", "usd"]
    writer.writerow(["study", *runs[0].axes, "planned", "fits", "gpus", *numbers, "directory"])
    for run in runs:
        answer = read_answer(run)
        cells: list[object] = [""] * (2 + len(numbers))
        if answer is not None:
            values = [answer["seconds"], *(_phase(answer, phase) for phase in PHASES), answer["peak_bytes"] / GIB]
            values += [answer[key] for key in ("tokens_per_gpu_second", "gpu_hours", "usd")]
            cells = [answer["fits"], answer["gpus"], *(f"{value:.6g}" for value in values)]
        writer.writerow([run.study, *run.setting, is_finished(run), *cells, run.directory])
    return text.getvalue().encode()


def _phase(answer: Answer, name: str) -> float:
    return float(answer["phases"].get(name, {"seconds": 0.0})["seconds"])


def strong_efficiency(first: Point, point: Point) -> float:
    """Speed-up on a fixed batch over the growth in GPUs."""
    return first.strong["seconds"] * first.gpus / (point.strong["seconds"] * point.gpus)


def weak_efficiency(first: Point, point: Point) -> float | None:
    """Throughput of one GPU on a batch that grows with the GPUs."""
    if first.weak is None or point.weak is None:
        return None
    return point.weak["tokens_per_gpu_second"] / first.weak["tokens_per_gpu_second"]


def _first(points: Iterable[Point], point: Point) -> Point:
    return next(other for other in points if other.series == point.series)


def table(points: Sequence[Point]) -> list[list[str]]:
    """A header, then a row a point."""
    header = ["", "parameters", "teacher", "GPUs", "s/iteration", *PHASES, "peak GiB", "tokens/s/GPU", "strong", "weak", "ratio"]
    rows = []
    for point in points:
        first, plan = _first(points, point), point.strong
        teacher = plan["teacher"]
        rows.append(
            [
                point.series,
                f"{plan['student']['parameters'] / 1e9:.1f}B",
                "-" if teacher is None else f"{teacher['parameters'] / 1e9:.1f}B",
                str(point.gpus),
                f"{plan['seconds']:.0f}",
                *(f"{_phase(plan, phase):.1f}" for phase in PHASES),
                f"{plan['peak_bytes'] / GIB:.0f}",
                f"{plan['tokens_per_gpu_second']:.0f}",
                _percent(strong_efficiency(first, point)),
                _percent(weak_efficiency(first, point)),
                "-" if point.overhead is None else f"{point.overhead:.2f}",
            ]
        )
    return [header, *rows]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def page(points: Sequence[Point], runs: Sequence[Run], study: Path, picture: str, table_text: str) -> str:
    """The study's page, in Markdown."""
    plan, left_out = points[0].strong, _left_out(points, runs)
    methods = _choices(runs, "method")
    lines = [
        f"# {study.stem.replace('_', ' ').capitalize()}: a plan, not a measurement",
        "",
        f"**Nothing on this page was measured.** `python tools/experiments.py {study}` computed it from the equations of",
        f"[planning.md](planning.md), which also tells how far they are off published runs, for {plan['cluster']}.",
        "",
        f"Responses have {plan['response_tokens']} tokens on average, {plan['longest_response']} at most, after prompts of "
        f"{plan['prompt_tokens']}; {plan['responses']} a step.",
        "Data parallelism and rollout engines grow with the GPUs; an engine takes what training leaves of a GPU, in steps of a "
        "twentieth.",
        f"Left out, because a rank is too small for it or the layout does not exist: {left_out}.",
        "",
        f"![Planned]({picture})",
        "",
        table_text,
        "Seconds are of one iteration. Efficiency is relative to the series' first row: strong (a fixed batch), its time x GPUs over",
        "this row's; weak (the batch grows with the GPUs), this row's tokens/s/GPU over its. Above 100 % the first row's GPUs are so",
        "full that their KV cache holds few responses at once.",
    ]
    if len(methods) > 1:
        lines.append(f"Ratio: time of an iteration, {methods[0]} over {methods[1]}.")
    return "\n".join(lines) + "\n"


def _choices(runs: Sequence[Run], axis: str) -> list[str]:
    return list(dict.fromkeys(dict(zip(run.axes, run.setting, strict=True)).get(axis, "") for run in runs))


def _left_out(points: Sequence[Point], runs: Sequence[Run]) -> str:
    """The points that are not in the table, for people."""
    every = dict.fromkeys(
        (
            " ".join(name for axis, name in zip(run.axes, run.setting, strict=True) if axis not in SPECIAL),
            dict(zip(run.axes, run.setting, strict=True)).get("nodes", ""),
        )
        for run in runs
    )
    there = {(point.series, point.strong["gpus"]) for point in points}
    sizes = {name: size for name, size in _sizes(runs).items()}
    missing = [(series, nodes) for series, nodes in every if (series, sizes.get(nodes)) not in there]
    return ", ".join(f"{series}{f' on {nodes} nodes' if nodes else ''}" for series, nodes in missing) or "none"


def _sizes(runs: Sequence[Run]) -> dict[str, int]:
    """GPUs by the name on the axis `nodes`."""
    sizes = {}
    for run in runs:
        answer = read_answer(run)
        if answer is not None:
            sizes[dict(zip(run.axes, run.setting, strict=True)).get("nodes", "")] = int(answer["gpus"])
    return sizes


def picture_of(points: Sequence[Point]) -> bytes:
    """Time, phases, efficiencies and the teacher's overhead over sizes of the cluster; on a single size the phases alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = list(dict.fromkeys(point.series for point in points))
    smallest = [next(point for point in points if point.series == name) for name in series]
    if len({point.gpus for point in points}) == 1:
        figure, axis = plt.subplots(figsize=(9, 0.3 * len(series) + 1.2), layout="constrained")
        _stack(axis.barh, series[::-1], smallest[::-1], "left", shares=False)
        axis.set(title="Iteration by phase", xlabel="seconds")
        axis.legend(fontsize=7)
    else:
        figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")

        def lines(axis: Any, title: str, value: Callable[[Point], float | None], unit: str) -> None:
            for name in series:
                mine = [(point.gpus, value(point)) for point in points if point.series == name]
                kept = [(gpus, y) for gpus, y in mine if y is not None]
                axis.plot([gpus for gpus, _ in kept], [y for _, y in kept], marker="o", ms=3, label=name)
            axis.set(title=title, xlabel="GPUs", ylabel=unit)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")

        lines(axes[0, 0], "Iteration, fixed batch", lambda point: point.strong["seconds"], "seconds")
        axes[0, 0].set_yscale("log")
        axes[0, 0].legend(fontsize=7)
        lines(axes[0, 1], "Strong scaling", lambda point: strong_efficiency(_first(points, point), point), "efficiency")
        lines(axes[0, 2], "Weak scaling", lambda point: weak_efficiency(_first(points, point), point), "efficiency")
        lines(axes[1, 0], "Peak memory of a GPU", lambda point: point.strong["peak_bytes"] / GIB, "GiB")
        _stack(axes[1, 1].bar, series, smallest, "bottom", shares=True)
        axes[1, 1].set(title="Phases on the fewest GPUs", ylabel="share of the iteration")
        axes[1, 1].legend(fontsize=7)
        axes[1, 2].bar(series, [point.overhead or 0.0 for point in smallest])
        axes[1, 2].axhline(1.0, color="grey", lw=0.8)
        axes[1, 2].set(title="With over without the teacher, fewest GPUs", ylabel="time of an iteration")
        for axis in axes[1, 1:]:
            axis.tick_params(axis="x", labelsize=7)
    figure.suptitle("Planned, not measured")
    content = io.BytesIO()
    figure.savefig(content, dpi=70, format="png")
    plt.close(figure)
    return content.getvalue()


def _stack(bars: Callable[..., Any], names: Sequence[str], points: Sequence[Point], start: str, *, shares: bool) -> None:
    below = [0.0] * len(names)
    for phase in PHASES:
        sizes = [_phase(p.strong, phase) / (p.strong["seconds"] if shares else 1.0) for p in points]
        bars(names, sizes, **{start: below}, label=phase)
        below = [low + size for low, size in zip(below, sizes, strict=True)]
