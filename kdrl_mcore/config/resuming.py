"""Which keys may change when a run resumes from a checkpoint.

A resumed run is the same experiment. How fast it learns, how its losses are weighted, and where and how often it runs and
writes may change; the new values are used. What it learns from must not change: another student, teacher, data set, task or
seed makes it another experiment, which needs its own run directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from kdrl_mcore.config.checks import flatten
from kdrl_mcore.config.derived import uses_teacher
from kdrl_mcore.config.keys import general_name, key_types
from kdrl_mcore.config.schema import Config, ObjectiveConfig, ScheduleConfig, TeacherConfig

KEY_TYPES = key_types()

Effect = Literal["wins", "fixed", "content", "start"]
"""wins: the new value is used, and a log line shows old -> new. fixed: another value is refused. content: another path is
accepted if its content is the same, otherwise refused. start: concerns a single start of the run, so it is not compared."""


@dataclass(frozen=True)
class Rule:
    """How a key that differs from the checkpoint's is treated, and why.

    Attributes:
        shows_in_steps: whether a new value affects the following steps, so that it has no effect if none is left.
    """

    effect: Effect
    why: str
    shows_in_steps: bool = True


RULES: dict[str, Rule] = {
    "run": Rule("start", "the run directory may move"),
    "trainer": Rule("wins", "length, checks and time-outs", False),
    "trainer.seed": Rule("fixed", "data order and sampling are functions of it"),
    "model.dtype": Rule("fixed", "the optimizer's state is of this type of weights"),
    "model.router_bias_update": Rule("wins", "how far each update moves the biases"),
    "model.spec": Rule("wins", "the same weights in other kernels", False),
    "student.path": Rule("content", "the model from which training started"),
    "student.lora": Rule("fixed", "the adapters are what is trained, and what their checkpoints hold"),
    "teacher": Rule("wins", "its layout and off-load", False),
    "teacher.path": Rule("content", "the model that teaches, if there was a teacher before and is one now"),
    "teacher.weights": Rule("fixed", "the student's earlier weights are in the checkpoint, or are not"),
    "teacher.decay": Rule("wins", "the average continues with it"),
    "teacher.refresh_every": Rule("wins", "counted in updates from the first"),
    "teacher.min_ess": Rule("wins", "a bound"),
    "teacher.prompt": Rule("wins", "what the teacher reads from here on"),
    "teacher.server": Rule("wins", "where the teacher is", False),
    "teachers": Rule("wins", "as of `teacher`; a schedule of `share` restarts when one of its keys changes"),
    "teachers.NAME.path": Rule("content", "the models that teach, if they taught before"),
    "teachers.NAME.parallel": Rule("wins", "its layout", False),
    "teachers.NAME.server": Rule("wins", "where it is", False),
    "teachers.NAME.offload": Rule("wins", "its off-load", False),
    "parallel": Rule("wins", "checkpoints load in any layout", False),
    "objective": Rule(
        "wins", "coefficients, and how the loss is formed; an adaptive schedule restarts when one of its keys changes"
    ),
    "objective.kind": Rule("fixed", "KDRL and supervised fine-tuning are two experiments"),
    "rollout": Rule("wins", "sampling; responses that were sampled ahead with other settings are sampled again"),
    "rollout.engine": Rule("wins", "megatron or vllm; from or to replay is refused", False),
    "rollout.max_sequences": Rule("wins", "how many responses are decoded at once", False),
    "rollout.vllm": Rule("wins", "vLLM's engines", False),
    "rollout.path": Rule("content", "the rollouts that are replayed are the data"),
    "rollout.given.share": Rule("wins", "how many given responses are added to the sampled ones"),
    "rollout.given.path": Rule("content", "the given responses are data"),
    "reward": Rule("wins", "rewards, bonuses and limits"),
    "reward.kind": Rule("fixed", "it decides which responses are correct"),
    "data": Rule("fixed", "columns and templates determine the prompts"),
    "data.train": Rule("content", "the prompts that are trained on"),
    "data.sources": Rule("fixed", "the prompts that are trained on, and the content of their files"),
    "data.eval": Rule("wins", "nothing is learned from it"),
    "eval": Rule("wins", "the same"),
    "batch.micro_tokens": Rule("wins", "the size of a micro-batch", False),
    "batch.share_prompts": Rule("wins", "how a micro-batch is packed", False),
    "batch.updates_per_step": Rule("wins", "updates of later steps"),
    "optimizer": Rule("wins", "rates, their schedule, decay and clipping"),
    "optimizer.offload": Rule("wins", "where its state is kept", False),
    "optimizer.name": Rule("fixed", "optimizers have different states"),
    "checkpoint": Rule("wins", "how often checkpoints are written, how many are kept, and how", False),
    "checkpoint.resume": Rule("start", "the checkpoint from which this start resumes"),
    "logging": Rule("wins", "what is displayed and logged", False),
    "fault": Rule("start", "a rehearsal"),
    "cluster": Rule("wins", "the machine", False),
}
"""The rule of each key or section; the longest match counts."""

EVALUATED = frozenset(
    {
        "data.eval",
        *(
            f"eval.{name}"
            for name in (
                "benchmarks",
                "samples",
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "stop",
                "max_response_tokens",
                "max_prompts",
            )
        ),
    }
)
"""The keys that determine what an evaluation measures: its results from before and after a change are not compared."""


@dataclass(frozen=True)
class Change:
    """A key whose value differs from the checkpoint's."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_text(self.old)} -> {_text(self.new)}"


def rule_of(key: str) -> Rule:
    """The rule of a key.

    Raises:
        KeyError: no rule matches.
    """
    parts = general_name(key).split(".")
    for length in range(len(parts), 0, -1):
        if (rule := RULES.get(".".join(parts[:length]))) is not None:
            return rule
    raise KeyError(key)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every key that differs, except those of a single start. Both configurations are flat. A key that is missing in one of
    them (it was saved by another version) has its default there."""
    defaults = _defaults(old, new)
    old, new = (_without_held_out(flat) for flat in (old, new))
    return [
        Change(key, old.get(key, default), new.get(key, default))
        for key, default in defaults.items()
        if rule_of(key).effect != "start" and old.get(key, default) != new.get(key, default)
    ]


def _without_held_out(flat: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the held-out prompts of the domains, from which nothing is learned."""
    sources = [{key: value for key, value in source.items() if key != "eval"} for source in flat.get("data.sources") or ()]
    return {**flat, "data.sources": sources}


def _defaults(*flats: Mapping[str, Any]) -> dict[str, Any]:
    """Every key and its default, with those of the items of mappings that one of the configurations has; an item that only one
    of them has counts as None in the other."""
    defaults = flatten(asdict(Config()))
    return defaults | {key: None for flat in flats for key in flat if key not in defaults and general_name(key) != key}


def refused(
    old: Mapping[str, Any], new: Mapping[str, Any], same_content: Callable[[str, str | None, str | None], bool]
) -> list[str]:
    """The differences that make `new` another experiment than `old`, each with the reason.

    Args:
        same_content: (key, old path, new path) -> whether both have the same content. Called for every key whose content
            counts, whether the path has changed or not.
    """
    differences = {change.key: change for change in changes(old, new)}
    found = []
    for key, default in _defaults(old, new).items():
        rule, before, now = rule_of(key), old.get(key, default), new.get(key, default)
        change = differences.get(key)
        replays = key == "rollout.engine" and "replay" in (before, now)
        if change is not None and (rule.effect == "fixed" or replays):
            found.append(f"{change} ({RULES['rollout.path'].why if replays else rule.why})")
        elif (
            (rule.effect == "content" or key == "data.sources")
            and _is_used(key, old)
            and _is_used(key, new)
            and not same_content(key, before, now)
        ):
            found.append(f"{change} ({rule.why})" if change else f"{key}={now}, whose content has changed ({rule.why})")
    return found


def restarted(old: Mapping[str, Any], new: Mapping[str, Any]) -> set[str]:
    """The names of what restarts because one of its keys differs: the schedules `alpha`, `beta` and `teachers.NAME.share`,
    `accuracy` (the record of eval/accuracy, if the evaluation differs) and `best` (the record of `checkpoint.best`,
    likewise)."""
    differ = [change.key for change in changes(old, new)]
    schedules = {key.split(".")[1] for key in differ if key.startswith(("objective.alpha.", "objective.beta."))}
    schedules |= {key.rpartition(".")[0] for key in differ if general_name(key).startswith("teachers.NAME.share.")}
    held_out = [[source.get("eval") for source in flat.get("data.sources") or ()] for flat in (old, new)]
    measures_anew = EVALUATED.intersection(differ) or [*filter(None, held_out[0])] != [*filter(None, held_out[1])]
    records = {"accuracy", "best"} if measures_anew else {"best"} if "checkpoint.best" in differ else set()
    return schedules | records


def markdown() -> str:
    """The rules as a Markdown table."""
    effects = {
        "wins": "the new value is used",
        "fixed": "refused",
        "content": "another path with the same content is accepted, other content is refused",
        "start": "not compared",
    }
    rows = [f"| `{key}{'' if _is_key(key) else '.*'}` | {effects[rule.effect]} | {rule.why} |" for key, rule in RULES.items()]
    return "\n".join(["| keys | when they differ from the checkpoint's | |", "|---|---|---|", *rows]) + "\n"


def _is_key(name: str) -> bool:
    return name in flatten(asdict(Config())) or name in KEY_TYPES


def _is_used(key: str, flat: Mapping[str, Any]) -> bool:
    """Whether a run with this configuration reads the file."""
    if general_name(key) == "teachers.NAME.path":
        return flat.get(key) is not None  # a teacher may be added or left out
    if key == "teacher.path":
        kind = flat.get("objective.kind", ObjectiveConfig.kind)
        own = flat.get("teacher.weights", TeacherConfig.weights) in ("path", "recorded", "adapters")
        elsewhere = flat.get(key) is None and flat.get("teacher.server.kind", "none") != "none"
        return own and not elsewhere and uses_teacher(ObjectiveConfig(kind=kind, beta=_schedule("objective.beta", flat)))
    if key == "rollout.path":
        return flat.get("rollout.engine") == "replay"
    if key == "rollout.given.path":
        return flat.get("rollout.given.share", 0) > 0
    return True


def _schedule(prefix: str, flat: Mapping[str, Any]) -> ScheduleConfig:
    known = {field.name: flat[f"{prefix}.{field.name}"] for field in fields(ScheduleConfig) if f"{prefix}.{field.name}" in flat}
    return ScheduleConfig(**known)


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
