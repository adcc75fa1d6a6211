"""Where a start of a run begins: which checkpoint, what has changed since it was made, and whether anything is left to do.

All of this is decided before a model is built, so that a run that cannot continue ends within seconds, with one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from kdrl_mcore.checkpointing.checkpoint import candidates_in, find_checkpoint
from kdrl_mcore.checkpointing.lineage import Lineage, from_json, new_lineage
from kdrl_mcore.config import Config, flatten
from kdrl_mcore.config.resuming import changes, refused, restarted, rule_of
from kdrl_mcore.convert.folders import STATE_FILE
from kdrl_mcore.errors import CheckpointError, ConfigError
from kdrl_mcore.monitoring.metrics import METRICS_FILE
from kdrl_mcore.parallel.collect import on_first_rank
from kdrl_mcore.run_directory.branches import BY_STEP, WHOLE
from kdrl_mcore.run_directory.content import fingerprints, is_same, other_shape
from kdrl_mcore.run_directory.record import RECORD_FILE, Record, read_record

CONFIG_FILE = "config.yaml"
PARTS = ("checkpoints", *BY_STEP, *WHOLE)
"""Folders of a run directory whose content comes and goes with its steps and branches."""


@dataclass(frozen=True)
class Start:
    """Where a run begins; the same on every rank.

    Attributes:
        checkpoint: the checkpoint to resume from; None begins with the first step.
        step: the step after which the checkpoint was made; 0 without one.
        lineage: the run's lineage from here on.
        source: the checkpoint's lineage; None if the checkpoint is in another run directory.
        changes: a line for each key that differs from the checkpoint's, old -> new.
        restarted: the names of what restarts because its settings have changed (`config.resuming.restarted`).
        resamples: whether responses that were sampled ahead must be sampled again.
        fingerprints: fingerprints of the student, the teacher and the data.
        is_complete: whether no step is left.
        exports: whether the student is still to be exported at the end.
    """

    checkpoint: Path | None
    step: int
    lineage: Lineage
    source: Lineage | None = None
    changes: list[str] = field(default_factory=list)
    restarted: frozenset[str] = frozenset()
    resamples: bool = False
    fingerprints: dict[str, str] = field(default_factory=dict)
    is_complete: bool = False
    exports: bool = False


def choose_start(config: Config) -> Start:
    """Decide where the run begins. Collective over the world: checksums are verified by all ranks, the rest by rank 0.

    Raises:
        ConfigError: the run would overwrite the model that it begins with.
        CheckpointError: the checkpoint belongs to another experiment (the message names each difference) or is damaged, or no
            step is left although keys have changed that would affect further steps.
    """
    run_dir = Path(config.run.dir)
    teachers = {f"teachers.{name}.path": teacher.path for name, teacher in config.teachers.items()}
    for key, model in {"student.path": config.student.path, "teacher.path": config.teacher.path, **teachers}.items():
        if model and Path(model).resolve().is_relative_to((run_dir / "hf").resolve()):
            raise ConfigError(f"{key}={model} is where this run exports its student: set another run.dir")
    on_first_rank(partial(_check_location, run_dir))
    record = on_first_rank(partial(read_record, run_dir))
    path = find_checkpoint(run_dir / "checkpoints", config.checkpoint.resume, record.lineage, record.origin)
    return on_first_rank(partial(_begin if path is None else partial(_resume, path), config, record))


def _check_location(run_dir: Path) -> None:
    path = run_dir.resolve()
    for above in path.parents:
        part = path.relative_to(above).parts[0]
        if part in PARTS and (above / RECORD_FILE).is_file():
            raise ConfigError(
                f"run.dir={run_dir} lies in {above / part}, which the run in {above} replaces: set another run.dir"
            )


def _begin(config: Config, record: Record) -> Start:
    """Begin with the first step. If an earlier start wrote here without reaching a checkpoint, the branch is new, unless that
    start was of this same run."""
    run_dir, flat = Path(config.run.dir), flatten(asdict(config))
    before = _read_config(run_dir) if (run_dir / METRICS_FILE).is_file() else None
    is_same_run = record.lineage is not None and config.checkpoint.resume == "auto" and not (before and changes(before, flat))
    lineage = record.lineage if is_same_run and record.lineage is not None else new_lineage()
    return Start(None, 0, lineage, fingerprints=fingerprints(flat))


def _resume(path: Path, config: Config, record: Record) -> Start:
    run_dir, new = Path(config.run.dir), flatten(asdict(config))
    state = _read_state(path)
    old = flatten(state["config"]) if "config" in state else _read_config(path.parent.parent)
    old = old or new | {"trainer.seed": state["seed"]}
    prints = fingerprints(new)
    differences = refused(old, new, partial(is_same, saved=state.get("fingerprints", {}), present=prints))
    assert config.student.path is not None
    shape = other_shape(path, config.student.path)
    if shape is not None:
        differences = [shape, *(each for each in differences if not each.startswith("student.path"))]
    if differences:
        raise CheckpointError(
            f"{path} belongs to another experiment: {'; '.join(differences)}: use the settings it was made with, set another "
            "run.dir, or start over with checkpoint.resume=never"
        )
    changed, step, steps = changes(old, new), int(state["step"]), config.trainer.steps
    too_late = [str(each) for each in changed if rule_of(each.key).shows_in_steps]
    if step > steps or (step == steps and too_late):
        raise CheckpointError(
            f"nothing is left to train: {path} was made after step {step}, trainer.steps={steps}"
            f"{', and ' + ', '.join(too_late) + ' would come too late' if too_late else ''}: raise trainer.steps, go back with "
            "checkpoint.resume=PATH, or set another run.dir"
        )
    own = path.resolve().parent == (run_dir / "checkpoints").resolve()
    source = from_json(state.get("lineage"))
    tips = [each.resolve() for each in candidates_in(run_dir / "checkpoints", record.lineage)[:1]]
    continues = config.checkpoint.resume == "auto" or (own and path.resolve() in tips)
    lineage = (record.lineage or source) if continues else source.branched_off(step)
    is_exported = record.exported == (lineage.branch, step) and (run_dir / "hf").is_dir()
    sampling = [each for each in changed if each.key.startswith("rollout.") and rule_of(each.key).shows_in_steps]
    return Start(
        checkpoint=path,
        step=step,
        lineage=lineage,
        source=source if own else None,
        changes=[str(each) for each in changed],
        restarted=frozenset(restarted(old, new)),
        resamples=bool(sampling),
        fingerprints=prints,
        is_complete=step == steps,
        exports=config.checkpoint.export_hf and not is_exported,
    )


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / STATE_FILE} cannot be read: {' '.join(str(error).split())}") from error


def _read_config(run_dir: Path) -> Mapping[str, Any] | None:
    """The flat configuration that a run directory was last started with, which checkpoints of earlier versions do not hold."""
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(run_dir / CONFIG_FILE))
    except (OSError, YAMLError, UnicodeDecodeError):
        return None
    return flatten(loaded) if isinstance(loaded, dict) else None
