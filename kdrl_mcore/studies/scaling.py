"""The results of planned studies: a CSV file with a row per run, and a page with a table and plots.

Two axes of a study's grid have a special meaning: `nodes`, the sizes of the cluster, and `run`, whose choices may be `strong`
(KDRL on the same batch for all sizes), `weak` (on a batch that grows with the cluster) and `grpo` (like `strong` without the
teacher). The choices on the other axes identify a series.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_mcore.config import conf_dir
from kdrl_mcore.errors import DataError
from kdrl_mcore.studies.local import PLAN_FILE, is_finished
from kdrl_mcore.studies.study import StudyRun

GIB = 2**30
PHASES = ("rollout", "teacher", "training")
SPECIAL = ("nodes", "run")

Answer = dict[str, Any]
"""The content of a `plan.json`."""


@dataclass(frozen=True)
class Point:
    """One series on one number of GPUs.

    Attributes:
        strong: the plan on the fixed batch.
        weak, grpo: the plans on the growing batch and without the teacher; None if the study has none, or it does not fit.
    """

    series: str
    strong: Answer
    weak: Answer | None
    grpo: Answer | None

    @property
    def gpus(self) -> int:
        """The number of GPUs paid for."""
        return int(self.strong["gpus"])

    @property
    def overhead(self) -> float | None:
        """The time of a KDRL iteration divided by that of a GRPO iteration."""
        return None if self.grpo is None else self.strong["seconds"] / self.grpo["seconds"]


def read_answer(run: StudyRun) -> Answer | None:
    """A run's plan; None if it is missing, or its layout is impossible.

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


def collect_points(runs: Sequence[StudyRun]) -> list[Point]:
    """Every point whose plan on the fixed batch fits."""
    found: dict[tuple[str, str], dict[str, Answer]] = {}
    for run in runs:
        answer = read_answer(run)
        if answer is not None and answer["fits"]:
            found.setdefault(_series_and_nodes(run), {})[_named(run).get("run", "strong")] = answer
    return [
        Point(series, answers["strong"], answers.get("weak"), answers.get("grpo"))
        for (series, _), answers in found.items()
        if "strong" in answers
    ]


def _named(run: StudyRun) -> dict[str, str]:
    return dict(zip(run.axes, run.setting, strict=True))


def _series_and_nodes(run: StudyRun) -> tuple[str, str]:
    """A run's series, and its choice on the axis `nodes`."""
    named = _named(run)
    return " ".join(name for axis, name in named.items() if axis not in SPECIAL), named.get("nodes", "")


def csv_of(runs: Sequence[StudyRun]) -> bytes:
    """A CSV file with one line per run."""
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
    """Strong-scaling efficiency: the speed-up on a fixed batch divided by the growth in GPUs."""
    return first.strong["seconds"] * first.gpus / (point.strong["seconds"] * point.gpus)


def weak_efficiency(first: Point, point: Point) -> float | None:
    """Weak-scaling efficiency: the relative throughput per GPU on a batch that grows with the GPUs."""
    if first.weak is None or point.weak is None:
        return None
    return point.weak["tokens_per_gpu_second"] / first.weak["tokens_per_gpu_second"]


def _first(points: Iterable[Point], point: Point) -> Point:
    return next(other for other in points if other.series == point.series)


def table(points: Sequence[Point]) -> list[list[str]]:
    """A header, then one row per point."""
    header = [
        "",
        "parameters",
        "teacher",
        "GPUs",
        "s/iteration",
        *PHASES,
        "GiB",
        "tokens/s/GPU",
        "strong",
        "weak",
        "KDRL / GRPO",
    ]
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
                f"{plan['training_peak_bytes'] / GIB:.0f}",
                f"{plan['tokens_per_gpu_second']:.0f}",
                _percent(strong_efficiency(first, point)),
                _percent(weak_efficiency(first, point)),
                "-" if point.overhead is None else f"{point.overhead:.2f}",
            ]
        )
    return [header, *rows]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def page(points: Sequence[Point], runs: Sequence[StudyRun], study: Path, picture: str, table_text: str) -> str:
    """The study's page, in Markdown."""
    plan = points[0].strong
    named = study.stem if study.resolve().parent == (conf_dir() / "study").resolve() else study
    strong = [run for run in runs if _named(run).get("run", "strong") == "strong"]
    missing = [_series_and_nodes(run) for run in strong if (answer := read_answer(run)) is None or not answer["fits"]]
    left_out = ", ".join(f"{series}{f' on {nodes} nodes' if nodes else ''}" for series, nodes in missing) or "nothing"
    lines = [
        f"# {study.stem.replace('_', ' ').capitalize()}: a plan, not a measurement",
        "",
        f"**Nothing on this page was measured.** `kdrl-study {named}` computed it from the equations of",
        f"[planning.md](planning.md), which also compares them with published runs, for {plan['cluster']}.",
        "",
        f"The {plan['responses']} responses of a step (strong scaling) have {plan['response_tokens']} tokens on average, at "
        f"most {plan['longest_response']}, after prompts of {plan['prompt_tokens']} tokens.",
        "Data parallelism and rollout engines grow with the GPUs; an engine uses what training leaves of a GPU, in steps of",
        f"1 %. Left out because a GPU is too small or the layout is impossible: {left_out}.",
        "",
        f"![Planned]({picture})",
        "",
        table_text,
        "Efficiency is relative to the series' first row. Strong (a fixed batch): the first row's time x GPUs over this row's.",
        "Weak (the batch grows with the GPUs): this row's tokens/s/GPU over the first row's. It exceeds 100 % where the first",
        "row's GPUs are so full that their KV cache holds few responses at once. GiB: a GPU's peak outside generation, whose",
        "engine uses the rest. KDRL / GRPO: the time of an iteration with the teacher over that without, no mask.",
    ]
    return "\n".join(lines) + "\n"


def picture_of(points: Sequence[Point]) -> bytes:
    """A plot of time, phases, efficiencies and the teacher's overhead against cluster size; for a single size only phases."""
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
        lines(axes[1, 0], "Peak memory in training", lambda point: point.strong["training_peak_bytes"] / GIB, "GiB of a GPU")
        _stack(axes[1, 1].bar, series, smallest, "bottom", shares=True)
        axes[1, 1].set(title="Phases on the fewest GPUs", ylabel="share of the iteration")
        axes[1, 1].legend(fontsize=7)
        axes[1, 2].bar(series, [point.overhead or 0.0 for point in smallest])
        axes[1, 2].axhline(1.0, color="grey", lw=0.8)
        axes[1, 2].set(title="KDRL / GRPO on the fewest GPUs", ylabel="time of an iteration")
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
