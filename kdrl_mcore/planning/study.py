"""A scaling study made of plans: every student on every number of nodes, as a page with tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdrl_mcore.config import load_config
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.planning.memory import GIB
from kdrl_mcore.planning.plan import Plan, make_plan
from kdrl_mcore.planning.setup import Choices, make_setup, shard_requests
from kdrl_mcore.planning.shards import try_shards
from kdrl_mcore.planning.workload import workload_of

KEYS = {"overrides", "kdrl", "grpo", "nodes", "strong_prompts", "weak_prompts_per_node", "students"}


@dataclass(frozen=True)
class Point:
    """One student on one number of GPUs.

    Attributes:
        strong, weak: KDRL on the fixed batch, and on the one that grows with the nodes.
        grpo: on the fixed batch.
    """

    student: str
    gpus: int
    strong: Plan
    weak: Plan
    grpo: Plan

    @property
    def overhead(self) -> float:
        """Time of an iteration of KDRL over GRPO."""
        return self.strong.seconds / self.grpo.seconds


def run_study(path: Path, output: Path) -> list[Path]:
    """Plan the study and write `scaling.md` and `images/scaling.png` under `output`; returns both paths.

    Raises:
        ConfigError: the file is missing or wrong, or a run of it is.
    """
    points = plan_study(path)
    page, picture = output / f"{path.stem}.md", output / "images" / f"{path.stem}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(points, picture)
    aside = page.with_name(page.name + ".part")
    aside.write_text(markdown(points, path, picture.relative_to(output)))
    aside.replace(page)
    return [page, picture]


def plan_study(path: Path) -> list[Point]:
    """Every point whose layout divides the GPUs and whose every rank fits.

    Raises:
        ConfigError: the file is missing or wrong, or nothing in it can run.
    """
    study = _read(path)
    _build_at_once(study)
    points, refused = [], ""
    for name, student in study["students"].items():
        for nodes in study["nodes"]:
            strong, weak = study["strong_prompts"], study["weak_prompts_per_node"] * nodes
            common = [*study["overrides"], *student["overrides"], f"cluster.nodes={nodes}"]
            choices = Choices(rollout_tensor=student["rollout_tensor"])

            def plan(method: str, prompts: int, common: list[str] = common, choices: Choices = choices) -> Plan:
                config = load_config([*study[method], *common, f"rollout.prompts_per_step={prompts}"])
                return make_plan(make_setup(config, workload_of(config), choices))

            try:
                point = Point(name, nodes * 8, plan("kdrl", strong), plan("kdrl", weak), plan("grpo", strong))
            except ConfigError as error:
                refused = str(error)
                continue
            if point.strong.fits and point.weak.fits:
                points.append(point)
    if not points:
        raise ConfigError(f"{path}: no run of the study fits{': ' if refused else ''}{refused}")
    return points


def _build_at_once(study: dict[str, Any]) -> None:
    """One faked world for all layouts: the plans then find their shards there."""
    requests: list[Any] = []
    for student in study["students"].values():
        config = load_config([*study["kdrl"], *study["overrides"], *student["overrides"]])
        world = max(study["nodes"]) * config.cluster.gpus_per_node
        requests += shard_requests(config, world, Choices(rollout_tensor=student["rollout_tensor"])).values()
    try_shards(requests)


def _read(path: Path) -> dict[str, Any]:
    try:
        study: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is not a study: {error}") from error
    if not isinstance(study, dict) or set(study) != KEYS:
        raise ConfigError(f"{path}: a scaling study has the keys {', '.join(sorted(KEYS))}")
    return study


def markdown(points: list[Point], study: Path, picture: Path) -> str:
    """The page."""
    workload, cluster = points[0].strong.setup.workload, points[0].strong.setup.cluster
    lines = [
        "# Scaling: a plan, not a measurement",
        "",
        f"**Nothing on this page was measured.** `python tools/plan.py --study {study}` computed it from the equations of",
        f"[planning.md](planning.md), which also tells how far they were off published runs, for {cluster.name}.",
        "",
        f"Strong scaling: {workload.responses} responses a step. Lengths: {workload.response_tokens} tokens on average,",
        f"{workload.longest} at most, after prompts of {workload.prompt_tokens}. Each student keeps its layout; data",
        "parallelism and rollout engines grow with the GPUs. Points that do not fit are left out. An efficiency above 100 %",
        "means that the first row's GPUs are so full that its engines' KV cache holds few responses at once.",
        "",
        f"![Planned scaling]({picture})",
        "",
    ]
    phases = ["rollout", "teacher", "training"]
    columns = ["student", "GPUs", "s/iteration", *phases, "peak GiB", "tokens/s/GPU", "strong", "weak", "KDRL / GRPO"]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for point in points:
        first = _first(points, point)
        plan = point.strong
        lines.append(
            f"| {point.student} | {point.gpus} | {plan.seconds:.0f} | {plan.phase('rollout').total:.0f} | "
            f"{plan.phase('teacher').total:.1f} | {plan.phase('training').total:.0f} | {plan.peak / GIB:.0f} | "
            f"{plan.tokens_per_gpu_second:.0f} | {strong_efficiency(first, point):.0%} | {weak_efficiency(first, point):.0%} | "
            f"{point.overhead:.2f} |"
        )
    lines += [
        "",
        "Efficiency is relative to the student's first row: strong, its time x GPUs over this row's; weak (the batch grows",
        "with the GPUs), this row's tokens/s/GPU over its. KDRL / GRPO: time of an iteration with and without the teacher, no",
        "mask.",
        "",
    ]
    return "\n".join(lines)


def strong_efficiency(first: Point, point: Point) -> float:
    """Speed-up on a fixed batch over the growth in GPUs."""
    return first.strong.seconds * first.gpus / (point.strong.seconds * point.gpus)


def weak_efficiency(first: Point, point: Point) -> float:
    """Throughput of one GPU on a batch that grows with the GPUs."""
    return point.weak.tokens_per_gpu_second / first.weak.tokens_per_gpu_second


def _first(points: Iterable[Point], point: Point) -> Point:
    return next(other for other in points if other.student == point.student)


def draw(points: list[Point], picture: Path) -> None:
    """Time, phases, efficiencies and the teacher's overhead."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    students = list(dict.fromkeys(point.student for point in points))
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")

    def lines(axis: Any, title: str, value: Callable[[Point], float], unit: str) -> None:
        for student in students:
            mine = [point for point in points if point.student == student]
            axis.plot([point.gpus for point in mine], [value(point) for point in mine], marker="o", ms=3, label=student)
        axis.set(title=title, xlabel="GPUs", ylabel=unit, xscale="log")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")

    lines(axes[0, 0], "Iteration, fixed batch", lambda point: point.strong.seconds, "seconds")
    axes[0, 0].set_yscale("log")
    axes[0, 0].legend(fontsize=7)
    lines(axes[0, 1], "Strong scaling", lambda point: strong_efficiency(_first(points, point), point), "efficiency")
    lines(axes[0, 2], "Weak scaling", lambda point: weak_efficiency(_first(points, point), point), "efficiency")
    lines(axes[1, 0], "Peak memory of a GPU", lambda point: point.strong.peak / GIB, "GiB")
    largest = [max((point for point in points if point.student == student), key=lambda p: -p.gpus) for student in students]
    below = [0.0] * len(students)
    for phase in ("rollout", "teacher", "training"):
        shares = [point.strong.phase(phase).total / point.strong.seconds for point in largest]
        axes[1, 1].bar(students, shares, bottom=below, label=phase)
        below = [low + share for low, share in zip(below, shares, strict=True)]
    axes[1, 1].set(title="Phases on the fewest GPUs", ylabel="share of the iteration", xlabel="student")
    axes[1, 1].legend(fontsize=7)
    axes[1, 2].bar(students, [point.overhead for point in largest])
    axes[1, 2].axhline(1.0, color="grey", lw=0.8)
    axes[1, 2].set(title="KDRL / GRPO on the fewest GPUs", ylabel="time of an iteration", xlabel="student")
    figure.suptitle("Planned, not measured")
    aside = picture.with_name("." + picture.name)
    figure.savefig(aside, dpi=70, format="png")
    plt.close(figure)
    aside.replace(picture)
