"""Every form of the objective, tensor and context parallel, agrees with the dense reference: estimators, placements, masks,
denominators, aggregations, temperature, sampler corrections, several updates on one batch, and supervised fine-tuning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.reference import dense
from tests.reference.dense import Settings
from tests.reference.tiny_models import CHARACTERS, read_hf_weights
from tests.support.agreement import JOINT, Case, about, assert_gradients, check, check_two_updates
from tests.support.ranks import RankPool
from tests.support.training import FAST, PROBE, PROBE_LR, metrics_of, train_on_rank
from tests.support.zoo import TOKENS, Zoo

TP2 = "parallel.tensor=2 "
SP = TP2 + "parallel.sequence_parallel=true batch.micro_tokens=60 "

OBJECTIVES = {
    "GRPO alone": Case(2, TP2, Settings(), teacher=None),
    "distillation alone": Case(2, TP2, Settings(alpha=0.0, beta=1.0)),
    "k1": Case(2, TP2, replace(JOINT, estimator="k1")),
    "k3": Case(2, TP2, replace(JOINT, estimator="k3")),
    "k3, dp2": Case(2, "", replace(JOINT, estimator="k3")),
    "exact": Case(2, SP, replace(JOINT, estimator="exact")),
    "top-k unbiased": Case(
        2,
        SP,
        replace(JOINT, estimator="top_k_unbiased", top_k=7),
    ),
    "placement advantage": Case(2, TP2, replace(JOINT, placement="advantage")),
    "placement reward": Case(2, TP2, replace(JOINT, placement="reward"), rollouts="exact_mu"),
    "placement reward, masked": Case(
        2,
        TP2,
        replace(JOINT, placement="reward", mask="response"),
        rollouts="exact_mu",
    ),
    "mask response": Case(2, TP2, replace(JOINT, mask="response")),
    "mask group": Case(2, TP2, replace(JOINT, mask="group")),
    "mask group, dp2": Case(2, "", replace(JOINT, mask="group")),
    "mask response, own denominator": Case(
        2,
        TP2,
        replace(JOINT, mask="response", denominator="unmasked"),
    ),
    "sequence mean": Case(2, TP2, replace(JOINT, aggregation="sequence_mean")),
    "sequence mean, masked, own denominator, dp2": Case(
        2,
        "",
        replace(JOINT, aggregation="sequence_mean", mask="group", denominator="unmasked"),
    ),
    "sequence sum": Case(
        2,
        TP2,
        replace(JOINT, aggregation="sequence_sum_norm", max_response_tokens=40),
    ),
    "rewards not divided by their deviation": Case(2, TP2, replace(JOINT, normalize_by_std=False)),
    "temperature": Case(2, SP, replace(JOINT, temperature=0.7)),
    "temperature, advantage": Case(2, TP2, replace(JOINT, temperature=1.3, placement="advantage")),
    "truncated importance sampling": Case(
        2,
        TP2,
        replace(JOINT, correction="truncate", correction_bound=1.1),
    ),
    "tokens far from the sampler dropped": Case(
        2,
        TP2,
        replace(JOINT, correction="mask", correction_bound=1.1),
    ),
    "many at once, pp2": Case(
        2,
        "parallel.pipeline=2 batch.micro_tokens=40",
        replace(
            JOINT,
            estimator="k1",
            mask="response",
            aggregation="sequence_mean",
            correction="truncate",
            normalize_by_std=False,
            temperature=0.8,
        ),
    ),
}
OVER_CONTEXT_RANKS = (
    "GRPO alone",
    "distillation alone",
    "k1",
    "k3",
    "placement advantage",
    "placement reward, masked",
    "mask response, own denominator",
    "sequence mean",
    "sequence sum",
    "temperature",
    "truncated importance sampling",
    "tokens far from the sampler dropped",
)
OBJECTIVES |= {
    f"{name}, cp2": replace(OBJECTIVES[name], overrides="parallel.context=2 batch.micro_tokens=60")
    for name in OVER_CONTEXT_RANKS
}


@pytest.mark.parametrize("case", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_every_objective_is_that_of_the_dense_reference(
    case: Case, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    check(case, zoo, pools[case.ranks], tmp_path)


@pytest.mark.parametrize(
    ("layout", "estimator", "of_reference"),
    [
        ("parallel.tensor=2", "k2", "k2"),
        ("parallel.pipeline=2", "k2", "k3"),
        ("parallel.context=2", "exact", "k3"),
        ("parallel.pipeline=2 parallel.virtual_pipeline=2", "top_k_unbiased", "k2"),
    ],
)
def test_two_updates_on_one_batch_clip_against_its_first_policy(
    layout: str, estimator: str, of_reference: str, zoo: Zoo, ranks2: RankPool, tmp_path: Path
) -> None:
    """The second update is off-policy: rho = pi / pi_old, and the KL to the initial student is no longer zero."""
    settings = replace(
        JOINT,
        vocab_size=TOKENS,
        estimator=estimator,
        top_k=7 if estimator == "top_k_unbiased" else JOINT.top_k,
        reference=0.5,
        reference_estimator=of_reference,
        clip_low=0.05,
        clip_high=0.1,
    )
    metrics, results = check_two_updates(settings, layout, zoo, ranks2, tmp_path, "untied")
    assert metrics["clip_share"] > 0.02
    assert results[1].reference_loss > 1e-3


@pytest.mark.parametrize(
    "layout", ["parallel.tensor=2", "parallel.pipeline=2 batch.micro_tokens=30", "parallel.context=2 batch.micro_tokens=30"]
)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_supervised_fine_tuning_is_the_cross_entropy_of_the_responses(
    layout: str, aggregation: str, zoo: Zoo, ranks2: RankPool, tmp_path: Path
) -> None:
    pairs = [("1+2=", "1+2=3"), ("what is x", "x"), ("9*9=", "80+1= 81"), ("a", "b c d"), ("zz top ", "12345678901234567890")]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "response": r, "answer": "-"}) + "\n" for p, r in pairs))
    spelling = {"\u0120": " ", "\u010a": "\n"}
    ids = {spelling.get(character, character): index for index, character in enumerate(CHARACTERS, start=1)}
    rows = [
        {"prompt_token_ids": [ids[c] for c in prompt], "response_token_ids": [*(ids[c] for c in response), 0]}
        for prompt, response in pairs
    ]
    loss, gradients = dense.sft(zoo.model("untied"), rows, aggregation=aggregation, vocab_size=TOKENS)
    overrides = [
        f"run.dir={tmp_path / 'run'}",
        f"student.path={zoo.model('untied')}",
        "objective=sft",
        f"objective.aggregation={aggregation}",
        f"data.train={data}",
        "data.template=plain",
        f"rollout.prompts_per_step={len(pairs)}",
        "rollout.temperature=0.5",  # it applies to sampling, and the targets are not sampled
        *PROBE,
        *FAST,
        *layout.split(),
    ]
    outcomes = ranks2.run(train_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert metrics_of(tmp_path / "run")[0]["loss"] == about(loss)
    before, after = read_hf_weights(zoo.model("untied")), read_hf_weights(tmp_path / "run" / "hf")
    assert_gradients({name: (before[name].double() - after[name].double()) / PROBE_LR for name in before}, gradients)
