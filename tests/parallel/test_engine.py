"""The embedded engine samples from exactly the distribution that the trainer scores, and the same tokens in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdrl_mcore.data.tokenizers import load_tokenizer
from tests.reference import dense
from tests.support.ranks import RankPool
from tests.support.sampling import (
    LIMIT,
    PROMPTS,
    RESPONSES,
    SAMPLINGS,
    assert_close,
    generate_on_rank,
    generate_with_packed_weights,
    tokens_of,
)
from tests.support.training import FAST
from tests.support.zoo import FAMILIES, MIXTURES, TOKENS, Zoo

LAYOUTS = {
    "tp2": (2, "parallel.tensor=2"),
    "pp2": (2, "parallel.pipeline=2"),
    "dp2": (2, ""),
    "tp2 sp": (2, "parallel.tensor=2 parallel.sequence_parallel=true"),
    "pp2 interleaved": (2, "parallel.pipeline=2 parallel.virtual_pipeline=2"),
    "tp2 pp2": (4, "parallel.tensor=2 parallel.pipeline=2"),
    "tp4": (4, "parallel.tensor=4"),
    "small waves, tp1": (1, "rollout.max_sequences=4"),
}


def overrides_of(zoo: Zoo, layout: str, model: str = "untied") -> list[str]:
    return [
        f"student.path={zoo.model(model)}",
        "rollout=replay",
        f"rollout.path={zoo.rollouts('one')}",
        "objective=grpo",
        *FAST,
        *layout.split(),
    ]


def generate(pool: RankPool, zoo: Zoo, layout: str, parts: tuple[int, int] | None = None) -> dict[str, list[dict[str, Any]]]:
    results = pool.run(generate_on_rank, overrides_of(zoo, layout), PROMPTS, SAMPLINGS, parts)
    for other in results[1:]:  # every rank holds all responses
        assert tokens_of(other) == tokens_of(results[0])
    return results[0]


@pytest.fixture(scope="module")
def alone(zoo: Zoo, ranks1: RankPool) -> dict[str, list[dict[str, Any]]]:
    """What one rank samples."""
    return generate(ranks1, zoo, "")


@pytest.fixture(scope="module")
def model(zoo: Zoo) -> Any:
    return dense.load_model(zoo.model("untied"))


@pytest.mark.parametrize("sampling", ["plain", "cool"])
def test_sampler_log_probs_are_those_of_the_dense_model(
    sampling: str, alone: dict[str, list[dict[str, Any]]], model: Any
) -> None:
    for row in alone[sampling]:
        assert_close(row["sampler_log_probs"], dense_log_probs(model, row, SAMPLINGS[sampling]["temperature"]))


def test_nucleus_log_probs_are_those_of_the_truncated_distribution(alone: dict[str, list[dict[str, Any]]], model: Any) -> None:
    """The smallest set of tokens whose probability reaches top_p, renormalised; nothing outside it is ever sampled."""
    how = SAMPLINGS["nucleus"]
    for row in alone["nucleus"]:
        with torch.no_grad():
            log_p = dense.response_logits(model, row, TOKENS, how["temperature"]).log_softmax(-1)
        for t, token in enumerate(row["response_token_ids"]):
            order = log_p[t].argsort(descending=True).tolist()
            mass, inside = 0.0, []
            for candidate in order:
                if mass >= how["top_p"]:
                    break
                inside.append(candidate)
                mass += float(log_p[t, candidate].exp())
            assert token in inside
            assert float(row["sampler_log_probs"][t]) == pytest.approx(float(log_p[t, token]) - np.log(mass), abs=2e-5)


def test_greedy_is_what_transformers_generates(alone: dict[str, list[dict[str, Any]]], zoo: Zoo) -> None:
    assert_greedy(alone["greedy"], zoo.model("untied"))


def assert_greedy(rows: list[dict[str, Any]], path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    beyond = list(range(TOKENS, model.config.vocab_size))  # columns without a token
    for row in rows:
        ids = torch.tensor([row["prompt_token_ids"]])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=LIMIT,
            eos_token_id=0,
            pad_token_id=0,
            suppress_tokens=beyond,
        )
        assert row["response_token_ids"] == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_samples_from_its_distribution(family: str, zoo: Zoo, ranks2: RankPool) -> None:
    """Sliding windows, layers without rotary embedding and scales also apply while decoding."""
    layout = "parallel.tensor=2" if FAMILIES.index(family) % 2 else "parallel.pipeline=2"
    (found, _) = ranks2.run(generate_on_rank, overrides_of(zoo, layout, family), PROMPTS, {"plain": SAMPLINGS["plain"]}, None)
    model = dense.load_model(zoo.model(family))
    for row in found["plain"]:
        assert_close(row["sampler_log_probs"], dense_log_probs(model, row, SAMPLINGS["plain"]["temperature"]))


@pytest.mark.parametrize("family", MIXTURES)
def test_every_mixture_samples_from_its_distribution(family: str, zoo: Zoo, ranks2: RankPool) -> None:
    """Also greedily: shared experts, the routers' correction biases and layers without experts also apply while decoding."""
    layout = "parallel.tensor=2 parallel.sequence_parallel=true parallel.expert=2"
    samplings = {name: SAMPLINGS[name] for name in ("plain", "greedy")}
    (found, _) = ranks2.run(generate_on_rank, overrides_of(zoo, layout, family), PROMPTS, samplings, None)
    model = dense.load_model(zoo.model(family))
    for row in found["plain"]:
        assert_close(row["sampler_log_probs"], dense_log_probs(model, row, SAMPLINGS["plain"]["temperature"]))
    assert_greedy(found["greedy"], zoo.model(family))


def test_a_response_ends_with_the_end_of_sequence_or_at_the_limit(alone: dict[str, list[dict[str, Any]]]) -> None:
    for name, rows in alone.items():
        assert [row["prompt_token_ids"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(RESPONSES)]
        assert [row["group_id"] for row in rows] == [group for group in range(len(PROMPTS)) for _ in range(RESPONSES)]
        for row in rows:
            ids = row["response_token_ids"]
            assert 0 not in ids[:-1] and max(ids) < TOKENS
            if row["finish_reason"] == "stop":
                assert ids[-1] == 0
            else:
                assert ids[-1] != 0 and len(ids) == LIMIT
        if name == "plain":
            assert {row["finish_reason"] for row in rows} == {"stop", "length"}
            responses = {tuple(row["response_token_ids"]) for row in rows}
            assert len(responses) == len(rows)  # responses to the same prompt are different draws


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_layout_samples_the_same_tokens_and_scores_them_as_the_trainer_does(
    ranks: int, layout: str, zoo: Zoo, pools: dict[int, RankPool], alone: dict[str, list[dict[str, Any]]]
) -> None:
    result = generate(pools[ranks], zoo, layout)
    assert tokens_of(result) == tokens_of(alone)
    for sampling in SAMPLINGS:
        for row, single in zip(result[sampling], alone[sampling], strict=True):
            assert row["finish_reason"] == single["finish_reason"]
            assert_close(row["sampler_log_probs"], single["sampler_log_probs"])
            assert_close(row["sampler_log_probs"], row["trainer_log_probs"])


@pytest.mark.parametrize("name", ["tp1", "tp2", "tp2 sp", "tp2 pp2"])
def test_products_with_packed_weights_sample_the_same_tokens(
    name: str, zoo: Zoo, pools: dict[int, RankPool], alone: dict[str, list[dict[str, Any]]]
) -> None:
    """The model's small weights are treated as large ones. The copies do not outlive the generation."""
    ranks, layout = LAYOUTS.get(name, (1, ""))
    overrides = overrides_of(zoo, layout)
    for result, packed, left in pools[ranks].run(generate_with_packed_weights, overrides, PROMPTS, SAMPLINGS):
        assert packed >= 4  # of each layer
        assert left == 0
        assert tokens_of(result) == tokens_of(alone)
        for row, single in zip(result["plain"], alone["plain"], strict=True):
            assert_close(row["sampler_log_probs"], single["sampler_log_probs"])


def dense_log_probs(model: Any, row: dict[str, Any], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        return dense.log_prob_of(dense.response_logits(model, row, TOKENS, temperature).log_softmax(-1), row)


@pytest.mark.parametrize(("parts", "layout"), [(None, "tp2 pp2"), ((1, 30), "tp2"), ((7, 1), "small waves, tp1")])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(
    parts: tuple[int, int] | None, layout: str, zoo: Zoo, pools: dict[int, RankPool], alone: dict[str, list[dict[str, Any]]]
) -> None:
    """A token is a character here. In parts of one token, every stop string of two tokens begins in the part before."""
    ranks, overrides = LAYOUTS[layout]
    fast = load_tokenizer(zoo.model("untied")).fast
    texts = [fast.decode(row["response_token_ids"], skip_special_tokens=False) for row in alone["plain"]]
    stops = (texts[0][4:6], texts[3][8:10], texts[10][6])
    samplings = {"plain": {**SAMPLINGS["plain"], "stop": stops}}
    (result, *_) = pools[ranks].run(generate_on_rank, overrides_of(zoo, overrides), PROMPTS, samplings, parts)
    ended = 0
    for row, whole, text in zip(result["plain"], alone["plain"], texts, strict=True):
        ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
        count = min([len(whole["response_token_ids"]), *ends])
        assert row["response_token_ids"] == whole["response_token_ids"][:count]
        assert len(row["sampler_log_probs"]) == count
        assert row["finish_reason"] == ("stop" if ends else whole["finish_reason"])
        ended += bool(ends)
    assert 3 <= ended < len(texts)


@pytest.mark.parametrize(("parts", "layout"), [((6, 9), "dp2"), ((1, 3), "tp2 sp"), ((7, 1), "small waves, tp1")])
def test_under_constant_weights_a_response_in_parts_is_the_whole_one(
    parts: tuple[int, int], layout: str, zoo: Zoo, pools: dict[int, RankPool], alone: dict[str, list[dict[str, Any]]]
) -> None:
    """Responses that were begun at different times, with different lengths so far, share a batch with new ones."""
    (tokens, most), (ranks, layout) = parts, LAYOUTS[layout]
    result = generate(pools[ranks], zoo, layout, parts)
    assert tokens_of(result) == tokens_of(alone)
    for name in SAMPLINGS:
        for row, whole in zip(result[name], alone[name], strict=True):
            assert {key: row[key] for key in ("group_id", "prompt_token_ids", "finish_reason")} == {
                key: whole[key] for key in ("group_id", "prompt_token_ids", "finish_reason")
            }
            assert_close(row["sampler_log_probs"], whole["sampler_log_probs"])
            assert row["continuations"] == min(most, (len(row["response_token_ids"]) - 1) // tokens)
