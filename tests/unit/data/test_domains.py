"""Several training sets: how they mix, which verifier judges, what is counted, and what is reported about them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_mcore.config import RewardConfig, RewardTermConfig, load_config
from kdrl_mcore.data.sources import data_notes, read_domains
from kdrl_mcore.data.stream import Domain, PromptStream
from kdrl_mcore.data.tokenizers import Tokenizer, load_tokenizer
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.evaluation.benchmarks import load_benchmarks
from kdrl_mcore.monitoring.clock import Clock
from kdrl_mcore.reward import registry, rules
from kdrl_mcore.reward.golds import check_answers, check_golds
from kdrl_mcore.reward.registry import register_function
from kdrl_mcore.reward.verifier import Verifier
from kdrl_mcore.rollout.files import from_row, to_row
from kdrl_mcore.step_metrics import step_metrics
from kdrl_mcore.student.student import UpdateResult
from kdrl_mcore.types import Prompt, Rollout
from tests.support.tokenizers import byte_level, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("plain"), byte_level()))


def domain(name: str, count: int, weight: float) -> Domain:
    return Domain(name, [Prompt(f"{name}-{i}", "", np.array([i]), "", None, name) for i in range(count)], weight)


def names(batch: list[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in batch]


SETS = [domain("a", 5, 3.0), domain("b", 40, 1.0), domain("c", 3, 0.5)]


def stream(sets: list[Domain] = SETS, batch_size: int = 9, seed: int = 1) -> PromptStream:
    return PromptStream.of(sets, batch_size, seed, shuffle=True)


@given(batch_size=st.integers(1, 20), seed=st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_domains_take_turns_by_their_weights_and_give_each_prompt_once_an_epoch(batch_size: int, seed: int) -> None:
    mixed = stream(batch_size=batch_size, seed=seed)
    given: list[str] = []
    while len(given) < 90:
        given += names(mixed.next_batch())
        counts = Counter(name[0] for name in given)
        assert all(abs(counts[each.name] - len(given) * each.weight / 4.5) <= 1 for each in SETS)
    for each in SETS:
        own = [name for name in given if name.startswith(each.name)]
        size = len(each.prompts)
        for begin in range(0, len(own) - size + 1, size):
            assert len(set(own[begin : begin + size])) == size


def test_the_mix_is_a_function_of_the_seed() -> None:
    def first(seed: int) -> list[str]:
        mixed = stream(seed=seed)
        return [name for _ in range(3) for name in names(mixed.next_batch())]

    assert first(1) == first(1) != first(2)


def test_one_source_has_the_order_of_data_train() -> None:
    alone, before = stream(SETS[1:2]), PromptStream(SETS[1].prompts, 9, 1, True)
    assert [names(alone.next_batch()) for _ in range(12)] == [names(before.next_batch()) for _ in range(12)]


@given(steps=st.integers(0, 9), ahead=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_resumed_mix_goes_on_identically(steps: int, ahead: bool) -> None:
    whole = stream()
    for _ in range(steps):
        whole.next_batch()
    state = json.loads(json.dumps(whole.state_dict()))
    if ahead:  # a batch is drawn that is not in the checkpoint
        lost = names(whole.next_batch())
    resumed = stream(SETS[::-1])  # whatever their order in the list
    resumed.load_state_dict(state)
    batches = [names(resumed.next_batch()) for _ in range(5)]
    expected = ([lost] if ahead else []) + [names(whole.next_batch()) for _ in range(5)]
    assert [sorted(batch) for batch in batches] == [sorted(batch) for batch in expected[:5]]


def test_states_of_other_data_are_refused_and_old_ones_load() -> None:
    state = stream().state_dict()
    assert (state["given"], state["num_prompts"]) == (0, 48)
    with pytest.raises(DataError, match=r"trains on a, b, the checkpoint was made with a, b, c: resume with the same data"):
        stream(SETS[:2]).load_state_dict(state)
    with pytest.raises(DataError, match=r"data\.train has 4 prompts, the checkpoint was made with 3 \(of c\)"):
        stream([*SETS[:2], domain("c", 4, 0.5)]).load_state_dict(state)
    with pytest.raises(DataError, match="trains on a, b, c, the checkpoint was made with one data set"):
        stream().load_state_dict({"given": 3, "num_prompts": 48})
    old, alone = {"given": 12, "num_prompts": 40}, stream(SETS[1:2])
    alone.load_state_dict(old)
    assert alone.state_dict() == old


def test_weights_may_change_on_the_way() -> None:
    before, after = stream(SETS[:2]), stream([domain("a", 5, 1.0), domain("b", 40, 3.0)])
    for _ in range(4):
        before.next_batch()
    after.load_state_dict(before.state_dict())
    counts = Counter(name[0] for _ in range(4) for name in names(after.next_batch()))
    assert abs(counts["b"] - 27) <= 1  # of the 36 from here on, whatever was drawn before


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{path: a.jsonl}, {path: b/a.jsonl}]", "two of data.sources are called 'a'"),
        ("[{path: a.jsonl.gz}, {path: b/a.parquet}]", "two of data.sources are called 'a'"),
        ("[{path: a.jsonl, weight: 0}]", r"data.sources\[0\].weight=0 must be greater than 0"),
        ("[{path: a.jsonl, weight: -1}]", "must be greater than 0"),
        ("[{path: a.jsonl, weight: inf}]", "must be greater than 0"),
        ("[{path: a.jsonl, weight: nan}]", "must be greater than 0"),
        ("[{path: a.jsonl, name: x/y}]", "must be a word without a slash"),
        ("[{weight: 1}]", r"data.sources\[0\].path is not set"),
        ("[{path: a.jsonl, reward: math}]", r"data.sources\[0\].reward=math is not one of"),
        ("[{path: a.jsonl, reward: remote_model}]", "needs reward.remote.url"),
        ("[{path: a.jsonl, wieght: 1}]", "wieght"),
        ("[a.jsonl]", "data.sources|SourceConfig"),
    ],
)
def test_sources_that_cannot_be_are_refused(sources: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(["objective=grpo", f"data.sources={sources}"])
    assert "\n" not in str(caught.value)


def test_train_and_sources_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"data\.train and data\.sources are both set"):
        load_config(["objective=grpo", "data.train=a.jsonl", "data.sources=[{path: b.jsonl}]"])


def rollout(response: str, answer: str, domain: str = "", finish: Any = "stop", **columns: Any) -> Rollout:
    ids = np.arange(1 + len(response))
    return Rollout(
        "p", 0, ids, ids, np.zeros(len(ids), np.float32), finish, 0, response=response, answer=answer, domain=domain,
        columns=columns,
    )  # fmt: skip


def test_each_domain_has_its_verifier() -> None:
    some = [
        rollout(r"\boxed{0.5}", "1/2", "math"),
        rollout(r"\boxed{0.5}", "1/2", "text"),
        rollout(r"\boxed{B. because}", "B", "choice"),
        rollout(r"\boxed{1/2}", "1/2"),
    ]
    with Verifier(RewardConfig(kind="exact_match"), {"math": "math_verify", "choice": "multiple_choice"}) as verifier:
        verifier.score(some)
    assert [each.correct for each in some] == [True, False, True, True]


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes what a test registers."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def test_rewards_take_columns() -> None:
    @register_function("test_at_least")
    def at_least(rollout: Rollout, minimum: int, meta_unit: str = "m") -> float:
        return float(len(rollout.response) >= minimum and meta_unit == "m")

    some = [
        rollout("abc", "x", minimum=3),
        rollout("ab", "x", minimum=3),
        rollout("abc", "x", **{"minimum": 1, "meta.unit": "s"}),
    ]
    with Verifier(RewardConfig(kind="test_at_least")) as verifier:
        verifier.score(some)
    assert [each.reward for each in some] == [1.0, 0.0, 0.0]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_columns_reach_the_prompt_and_are_asked_for_at_loading(tokenizer: Tokenizer, tmp_path: Path) -> None:
    @register_function("test_needs_level")
    def needs_level(rollout: Rollout, info_level: int) -> float:
        return float(info_level)

    rows = [{"prompt": "q", "answer": "1", "info": {"level": 0.10, "tags": ["x"]}}, {"prompt": "r", "answer": "1", "extra": 2}]
    path = write(tmp_path / "a.jsonl", rows)
    base = ["objective=grpo", "data.template=plain", f"data.train={path}"]
    terms = "reward.terms=[{kind: 'tests.support.rewards:needs_column'}]"
    with pytest.raises(
        ConfigError, match=r"needs_column needs the column 'info_level' of .*a\.jsonl: list it in data\.columns"
    ):
        read_domains(load_config([*base, terms]), tokenizer)
    (table,) = read_domains(load_config([*base, terms, "data.columns=[info.level,info.tags,extra]"]), tokenizer)
    assert [prompt.columns for prompt in table] == [
        {"info.level": 0.1, "info.tags": ["x"], "extra": None},
        {"info.level": None, "info.tags": None, "extra": 2},
    ]
    with pytest.raises(DataError, match=r"has no column 'nowhere' \(it has: prompt, answer, extra\): set data\.columns"):
        read_domains(load_config([*base, "data.columns=[nowhere]"]), tokenizer)


@pytest.mark.parametrize(("accepted", "correct", "reward"), [(True, True, 1.0), (False, False, 0.0)])
def test_whether_a_response_that_was_cut_off_may_be_correct(accepted: bool, correct: bool, reward: float) -> None:
    cut, whole = rollout(r"\boxed{1}", "1", finish="length"), rollout(r"\boxed{1}", "1")
    with Verifier(RewardConfig(kind="exact_match", accept_truncated=accepted)) as verifier:
        verifier.score([cut, whole])
        verifier.classify([cut, whole])
    assert (cut.correct, cut.reward, whole.correct) == (correct, reward, True)
    assert cut.extra["answer_class"] == (0.0 if accepted else -1.0)


def test_time_outs_and_crashes_are_told_apart_from_wrong_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_or_dead.py").write_text(
        "import os, time\n"
        "def compare(reference, answer):\n"
        "    if answer == 'slow': time.sleep(600)\n"
        "    if answer == 'dead': os._exit(3)\n"
        "    return reference == answer or answer == 'right'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(rules, "MATH_VERIFY", "slow_or_dead:compare")
    some = [rollout(rf"\boxed{{{answer}}}", "a", "d") for answer in ("right", "wrong", "slow", "dead")]
    with Verifier(RewardConfig(timeout=3.0)) as verifier:
        verifier.score(some)
    assert [each.correct for each in some] == [True, False, False, False]
    marks = [{}, {}, {"verifier_timeout": 1.0}, {"verifier_crash": 1.0}]
    assert [each.extra for each in some] == marks
    assert [from_row(json.loads(json.dumps(to_row(each)))).extra.keys() - {"reward"} for each in some] == [
        mark.keys() for mark in marks
    ]
    update = UpdateResult({}, {}, 0.0, 0.0, None)
    clock = Clock(lambda phase: None)
    with clock("train"):
        pass
    metrics = step_metrics(some, torch.zeros(4).bool(), [update], 1.0, 0.0, clock)
    assert (metrics["verifier_timeouts"], metrics["verifier_crashes"], metrics["accuracy"]) == (1.0, 1.0, 0.25)
    assert (metrics["domain/d/accuracy"], metrics["domain/d/samples"]) == (0.25, 4.0)


def test_a_rollout_file_has_the_domain_of_each_response() -> None:
    assert from_row(to_row(rollout("x", "1", "gsm8k"))).domain == "gsm8k"
    assert "domain" not in to_row(rollout("x", "1"))


def test_prompts_over_the_limit_are_refused_or_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "q" * length, "answer": str(length)} for length in (3, 9, 4, 8)])
    base = ["objective=grpo", "data.template=plain", f"data.train={path}", "rollout.max_prompt_tokens=7"]
    with pytest.raises(DataError, match=r"row 2: the prompt has 9 tokens, but must have 1 to 7: .*data\.long_prompts=drop"):
        read_domains(load_config(base), tokenizer)
    (table,) = read_domains(load_config([*base, "data.long_prompts=drop"]), tokenizer)
    assert [prompt.prompt_id for prompt in table] == ["a-1", "a-3"]
    assert data_notes([Domain("", table)], []) == [f"{path}: dropped 2 of 4 prompts, longer than rollout.max_prompt_tokens"]
    with pytest.raises(DataError, match=r"all 4 prompts of .* have over 2 tokens"):
        read_domains(load_config([*base, "data.long_prompts=drop", "rollout.max_prompt_tokens=2"]), tokenizer)
    with pytest.raises(DataError, match=r"row 2: the prompt has 9 tokens.* or remove the row$"):  # held-out rows never are
        load_benchmarks(load_config([*base, f"data.eval={path}", "data.long_prompts=drop"]), tokenizer)


def test_what_is_trained_on_and_held_out_at_once_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(9)])
    more = write(tmp_path / "b.jsonl", [{"prompt": "x", "answer": "1"}, {"prompt": "X ", "answer": "1"}])
    held = write(
        tmp_path / "held.jsonl",
        [{"prompt": prompt, "answer": "1"} for prompt in ("new", "what is  3 + 1?\n", "What is 4 + 1?", "What is 4 - 1?")],
    )
    config = load_config(
        ["objective=grpo", "data.template=plain", "data.plain_template='{prompt} A:'", f"data.eval={held}",
         f"data.sources=[{{path: {train}}},{{path: {more}}}]"]
    )  # fmt: skip
    domains = [Domain(table.domain, table) for table in read_domains(config, tokenizer)]
    assert data_notes(domains, load_benchmarks(config, tokenizer)) == [
        f"{more}: 1 of its 2 prompts are distinct, the others repeat them",
        f"held: 2 of its 4 prompts are also trained on ({train}; the first is held-2): on these it measures memorisation",
    ]


def test_an_answer_that_its_own_verifier_does_not_accept_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules.ExactMatch, "equal", lambda self, pairs: [reference != "7" for reference, _ in pairs])
    with pytest.raises(DataError, match=r"x\.jsonl row 3: no response can match the answer '7' .*its own verifier"):
        check_answers(["5", "6", "7"], "x.jsonl", "exact_match")


def test_all_golds_are_checked_in_the_preflight_and_a_sample_of_large_sets_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Many:
        def __len__(self) -> int:
            return 100

        def answers(self) -> list[tuple[int, str]]:
            return [(row, "A" if row != 50 else "50") for row in range(1, 101)]

    monkeypatch.setattr("kdrl_mcore.reward.golds.MOST_CHECKED", 10)
    check_golds(Many(), "x.jsonl", "multiple_choice")
    with pytest.raises(DataError, match=r"x\.jsonl row 50"):
        check_golds(Many(), "x.jsonl", "multiple_choice", everything=True)


def test_the_preflight_reads_what_training_and_evaluation_will(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdrl_mcore.preflight.configuration import check_data

    model = save_tokenizer(tmp_path / "model", byte_level())
    sums = write(tmp_path / "sums.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(9)])
    quiz = write(tmp_path / "quiz.jsonl", [{"prompt": "q?", "options": ["x", "y"], "answer": 1}])
    held = write(tmp_path / "held.jsonl", [{"prompt": "3+1=", "answer": "4"}, {"prompt": "a much longer one", "answer": "4"}])
    sources = f"data.sources=[{{path: {sums}}}, {{path: {quiz}, reward: multiple_choice, choices_key: options}}]"
    base = ["objective=grpo", "data.template=plain", f"student.path={model}", sources, f"data.eval={held}"]
    assert check_data(load_config(base)) == (
        f"{sums} (9 prompts), {quiz} (1 prompts), held (2 held out). held: 1 of its 2 prompts are also trained on ({sums}; the "
        "first is held-1): on these it measures memorisation"
    )
    with pytest.raises(DataError, match=r"held\.jsonl row 2: the prompt has 17 tokens"):
        check_data(load_config([*base, "rollout.max_prompt_tokens=14"]))
    with pytest.raises(DataError, match=r"held row 1: no response can match the answer '4' with reward=multiple_choice"):
        check_data(load_config([*base, "reward=multiple_choice", sources.replace("}, {", ", reward: exact_match}, {")]))
    with pytest.raises(DataError, match=r"quiz\.jsonl row 1 has no column 'question'"):
        check_data(load_config([*base, sources.replace("options}", "options, prompt_key: question}")]))
    monkeypatch.setenv("LOCAL_RANK", "1")  # another rank of this node reads it
    assert check_data(load_config([*base, "rollout.max_prompt_tokens=14"])) == ""


def test_a_term_of_a_reward_is_named_with_its_columns() -> None:
    some = [rollout("a", "a", info_level=2.0)]
    config = RewardConfig(kind="exact_match", terms=[RewardTermConfig("tests.support.rewards:needs_column", 0.5)])
    with Verifier(config) as verifier:
        verifier.score(some)
    assert some[0].reward == 2.0
