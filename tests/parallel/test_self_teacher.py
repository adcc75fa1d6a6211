"""The student as its own teacher, and a teacher that reads another prompt, agree with the dense reference."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests.reference import dense
from tests.reference.tiny_models import read_hf_weights
from tests.support.agreement import JOINT, SETTINGS, Case, about, assert_gradients, check
from tests.support.ranks import RankPool
from tests.support.training import FAST, QUIET, metrics_of, objective_overrides, train_on_rank
from tests.support.zoo import Zoo

EXACT, OWN_PROMPT = replace(JOINT, estimator="exact"), "teacher.prompt.template=plain"
PROMPTED = {
    "k2, tp2": Case(2, f"{OWN_PROMPT} parallel.tensor=2", JOINT, rollouts="privileged"),
    "exact, cp2, teacher tp2": Case(
        2, f"{OWN_PROMPT} parallel.context=2 teacher.parallel.tensor=2", EXACT, rollouts="privileged"
    ),
    "exact, shared prompts, masked": Case(
        2,
        f"{OWN_PROMPT} batch.share_prompts=true batch.micro_tokens=60",
        replace(EXACT, mask="response"),
        rollouts="privileged",
    ),
}


@pytest.mark.parametrize("case", PROMPTED.values(), ids=list(PROMPTED))
def test_a_teacher_reads_a_prompt_of_its_own(case: Case, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    check(case, zoo, pools[case.ranks], tmp_path)


@dataclass(frozen=True)
class Own:
    """A run of some steps in which the student teaches itself."""

    ranks: int
    weights: str
    layout: str = ""
    estimator: str = "k2"
    adam: bool = False
    overrides: str = ""
    updates: int = 1


STEPS, DECAY, EVERY = 3, 0.75, 2
LR = {True: 0.02, False: 0.5}
RUNS = {
    "present, exact, tp2 cp2 sp": Own(
        4, "present", "parallel.tensor=2 parallel.context=2 parallel.sequence_parallel=true", "exact"
    ),
    "present, exact, two updates": Own(2, "present", "parallel.tensor=2", "exact", updates=2),
    "start, top-k, pp2": Own(2, "start", "parallel.pipeline=2", "top_k"),
    "average, k2, dp2": Own(2, "average", "", adam=True),
    "average, exact, cp2, not sharded": Own(
        2, "average", "parallel.context=2 parallel.distributed_optimizer=false", "exact", adam=True
    ),
    "average, exact, tp2 dp2, overlapped": Own(
        4,
        "average",
        "parallel.tensor=2 parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true",
        "exact",
        adam=True,
    ),
    "refreshed, exact, dp2": Own(2, "refreshed", "", "exact", overrides="batch.micro_tokens=4096"),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
def test_the_student_teaches_itself(run: Own, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    settings = replace(SETTINGS, estimator=run.estimator, top_k=5 if run.estimator == "top_k" else SETTINGS.top_k)
    expected, moved = dense_run(run, zoo, settings)
    outcomes = pools[run.ranks].run(train_on_rank, overrides_of(run, zoo, settings, tmp_path))
    assert [outcome.code for outcome in outcomes] == [0] * run.ranks, outcomes[0].stderr
    for row, losses in zip(metrics_of(tmp_path), expected, strict=True):
        assert (row["loss"], row["kd_loss"]) == tuple(map(about, losses))
    before, after = read_hf_weights(zoo.model("untied")), read_hf_weights(tmp_path / "hf")
    assert_gradients({name: before[name].double() - after[name].double() for name in before}, moved)


def dense_run(run: Own, zoo: Zoo, settings: dense.Settings) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """The loss and L_KD of each step, and how much each weight has changed."""
    student = dense.load_model(zoo.model("untied"))
    start, teacher, rows = copy.deepcopy(student), copy.deepcopy(student), zoo.rows("privileged")
    optimizer: torch.optim.Optimizer = torch.optim.SGD(student.parameters(), lr=LR[False])
    if run.adam:  # a large epsilon keeps Adam from amplifying the rounding of zero gradients
        optimizer = torch.optim.AdamW(student.parameters(), lr=LR[True], betas=(0.9, 0.95), eps=1e-3, weight_decay=0)
    losses = []
    for _ in range(STEPS):
        if run.weights == "present":
            teacher.load_state_dict(student.state_dict())
        old = dense.kdrl_of_models(student, None, rows, replace(settings, alpha=1.0, beta=0.0)).log_probs
        first = sum(row["group_id"] == 0 for row in rows)
        parts = [slice(None)] if run.updates == 1 else [slice(0, first), slice(first, None)]
        results = []
        for part in parts:
            log_old = None if run.updates == 1 else old[part]
            results.append(dense.kdrl_of_models(student, teacher, rows[part], settings, log_old=log_old))
            optimizer.step()
            if run.weights == "average":
                for mine, present in zip(teacher.parameters(), student.parameters(), strict=True):
                    mine.data.lerp_(present.data, 1 - DECAY)
        losses.append(tuple(sum(getattr(each, name) for each in results) / len(results) for name in ("loss", "kd_loss")))
        if run.weights == "refreshed" and len(losses) % EVERY == 0:
            teacher.load_state_dict(student.state_dict())
    after = dict(student.named_parameters())
    return losses, {name: (value - after[name]).detach() for name, value in start.named_parameters()}


def overrides_of(run: Own, zoo: Zoo, settings: dense.Settings, folder: Path) -> list[str]:
    extra = {"average": f"teacher.decay={DECAY}", "refreshed": f"teacher.refresh_every={EVERY}"}
    return [
        f"run.dir={folder}",
        f"student.path={zoo.model('untied')}",
        "rollout=replay",
        f"rollout.path={zoo.rollouts('privileged')}",
        *objective_overrides(settings),
        f"teacher.weights={run.weights}",
        OWN_PROMPT,
        *([extra[run.weights]] if run.weights in extra else []),
        f"trainer.steps={STEPS}",
        f"optimizer.name={'adam' if run.adam else 'sgd'}",
        f"optimizer.lr={LR[run.adam]}",
        *(["optimizer.adam_eps=1e-3"] if run.adam else []),
        "optimizer.clip_grad=0",
        "batch.micro_tokens=60",
        f"batch.updates_per_step={run.updates}",
        *FAST,
        *run.layout.split(),
        *run.overrides.split(),
    ]


def test_an_average_is_resumed_in_another_layout(zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    """Two steps, a checkpoint and the third step in another layout equal three steps."""
    run = Own(2, "average", "", "exact", adam=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = replace(SETTINGS, estimator="exact")
    always = [each for each in overrides_of(run, zoo, settings, whole) if each != "checkpoint.every=-1"]
    pools[2].run(train_on_rank, always)
    moved = [each.replace(str(whole), str(parts)) for each in always]
    for more in (["trainer.steps=2"], ["parallel.tensor=2", "parallel.distributed_optimizer=false"]):
        outcomes = pools[2].run(train_on_rank, [*moved, *more])
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert [row["loss"] for row in metrics_of(parts)] == [about(row["loss"]) for row in metrics_of(whole)]
    assert [row["kd_loss"] for row in metrics_of(parts)] == [about(row["kd_loss"]) for row in metrics_of(whole)]


def test_a_bfloat16_average_keeps_small_updates(zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    """With a decay of 0.999 an average in bfloat16 would not move at all."""
    found = pools[1].run(_averaged_on_rank)[0]
    assert found == pytest.approx(1e-3 * 0.25, rel=1e-3)


def _averaged_on_rank() -> float:
    """How far the average of a bfloat16 weight has moved after the weight went from 1 to 1.25."""
    import torch

    from kdrl_mcore.parallel.earlier_weights import EarlierWeights
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    main = torch.nn.Parameter(torch.ones(4))
    model = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    class Optimizer:
        float16_groups, fp32_from_float16_groups = [[model]], [[main]]
        param_groups = [{"params": [main]}]  # noqa: RUF012

        def _copy_main_params_to_model_params(self) -> None:
            model.data.copy_(main.data)

    earlier = EarlierWeights(Optimizer(), on_host=False)
    main.data.fill_(1.25)
    earlier.average(0.999)
    with earlier.in_model(lambda: None):
        moved = float(main.data[0] - 1)
    assert torch.equal(main.data, torch.full((4,), 1.25)) and torch.equal(model.data.float(), main.data)
    return moved


def test_prompts_are_in_the_rollout_file(zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    """What a step writes can be replayed with the same settings."""
    run = Own(1, "present")
    overrides = [each for each in overrides_of(run, zoo, SETTINGS, tmp_path) if each not in FAST]
    pools[1].run(train_on_rank, [*overrides, *QUIET, "trainer.steps=1"])
    rows = [json.loads(line) for line in (tmp_path / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    assert [row["teacher_prompts"] for row in rows] == [row["teacher_prompts"] for row in zoo.rows("privileged")]


def test_a_sampled_run_reads_the_answer(zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    """The teacher's prompt goes from the row through the rollouts to the teacher; the engine still samples with the current
    weights."""
    rows = [{"prompt": f"{a}+{a}=", "answer": str(2 * a), "why": "because"} for a in range(1, 5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcomes = pools[2].run(
        train_on_rank,
        [
            *(f"run.dir={tmp_path}/run", f"student.path={zoo.model('untied')}", f"data.train={tmp_path}/train.jsonl"),
            *("objective=kdrl", "objective.beta.init=1", "objective.kd.estimator=exact", "reward=exact_match"),
            *("data.template=plain", "data.columns=[why]", "rollout.prompts_per_step=4", "rollout.responses_per_prompt=2"),
            *("rollout.max_response_tokens=6", "trainer.steps=2", "optimizer.lr=0.01", "reward.workers=1"),
            *("teacher.weights=average", "teacher.decay=0.5", "teacher.prompt.template=plain"),
            "teacher.prompt.plain_template='{prompt} {answer} {why}: {prompt}'",
            *QUIET,
        ],
    )
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    first, second = metrics_of(tmp_path / "run")
    assert first["kl_full"] > 0 and second["drift_mean"] < 1e-5 and first["teacher_text_copied"] >= 0
    written = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_000002.jsonl").read_text().splitlines()]
    assert all(len(row["teacher_prompts"]["teacher"]) > 2 * len(row["prompt_token_ids"]) for row in written)


@pytest.mark.parametrize("layout", ["", "parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true"])
def test_earlier_weights_leave_no_trace(layout: str, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    """In bfloat16, with a coefficient too small to change a bit, the run equals one without a teacher."""
    exported = []
    for name, teacher in (("none", []), ("average", ["teacher.weights=average", "objective.beta.init=1e-38"])):
        overrides = [
            *(f"run.dir={tmp_path}/{name}", f"student.path={zoo.model('untied')}", "rollout=replay"),
            *(f"rollout.path={zoo.rollouts('uneven')}", "objective=grpo", "model.dtype=bfloat16", "trainer.steps=3"),
            *("optimizer.lr=0.01", *teacher, *FAST, *layout.split()),
        ]
        outcomes = pools[2].run(train_on_rank, overrides)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
        exported.append(read_hf_weights(tmp_path / name / "hf"))
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])
    assert metrics_of(tmp_path / "average")[-1]["teacher_tokens"] > 0
