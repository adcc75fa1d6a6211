r"""Registered rewards: what each kind judges, how they add up, and that a reward that fails is an error and never a score."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from examples.tiny.task import make_tokenizer
from kdrl_mcore.config import REWARD_KINDS, LocalRewardConfig, RemoteRewardConfig, RewardConfig, RewardTermConfig
from kdrl_mcore.errors import ConfigError, ModelError, RewardError
from kdrl_mcore.reward import models
from kdrl_mcore.reward.registry import AnswerReward, registered_kinds
from kdrl_mcore.reward.verifier import Verifier
from kdrl_mcore.types import Rollout


def rollout(response: str, answer: str = "x", prompt: str = "", group: int = 0) -> Rollout:
    ids = np.zeros(1, np.int64)
    return Rollout("p", group, ids, ids, np.zeros(1, np.float32), "stop", 0, prompt=prompt, response=response, answer=answer)


def rewards(config: RewardConfig, *rollouts: Rollout) -> list[float]:
    with Verifier(config) as verifier:
        verifier.score(rollouts)
    return [each.reward for each in rollouts]


def test_the_configuration_knows_what_is_registered() -> None:
    assert sorted(registered_kinds()) == sorted(REWARD_KINDS)


@pytest.mark.parametrize(
    ("response", "choice"),
    [
        (r"so \boxed{B}", "B"),
        (r"\boxed{A} no, \boxed{(b)}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\textbf{(B) } 12}", "B"),
        (r"\boxed{B. 12 apples}", "B"),
        ("The answer is (B).", "B"),
        ("Answer: B", "B"),
        ("the answer is A, or rather: the final answer is **B**", "B"),
        (r"\boxed{Because}", None),
        ("the answer is a number", None),
        (r"The answer is B, \boxed{", None),
    ],
)
def test_multiple_choice(response: str, choice: str | None) -> None:
    config = RewardConfig(kind="multiple_choice")
    assert rewards(config, rollout(response, "B"), rollout(response, "(C)")) == [float(choice == "B"), 0.0]


def test_rewards_add_up_with_weights_and_leave_correctness_alone() -> None:
    terms = [RewardTermConfig("format", 0.5), RewardTermConfig("multiple_choice", -0.25)]
    config = RewardConfig(kind="exact_match", incorrect=-1.0, terms=terms)
    some = [rollout(r"\boxed{B}", "B"), rollout(r"\boxed{b}", "B"), rollout("B", "B"), rollout("no", "B")]
    assert rewards(config, *some) == [1.25, -0.75, 0.75, -1.0]  # a response that is only a letter chooses it
    assert [each.correct for each in some] == [True, False, True, False]
    assert some[0].extra == {"reward_format": 1.0, "reward_multiple_choice": 1.0}


def test_a_score_between_is_a_reward_between_and_correct_from_the_threshold_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_rewards.py").write_text("def share(rollout):\n    return float(rollout.response)\nnone = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = RewardConfig(kind="own_rewards:share", incorrect=-1.0, threshold=0.5)
    some = [rollout("0"), rollout("0.25"), rollout("0.5"), rollout("1")]
    assert rewards(config, *some) == [-1.0, -0.5, 0.0, 1.0]
    assert [each.correct for each in some] == [False, False, True, True]
    for kind in ("own_rewards:gone", "no_such_module:f", "own_rewards:none"):
        with pytest.raises(ConfigError, match=kind):
            Verifier(RewardConfig(kind=kind))


def test_equal_answers_of_a_group_are_one_class() -> None:
    group = [rollout(rf"\boxed{{{answer}}}", "1/2") for answer in ("0.5", "3", r"\frac{2}{3}", "6/2", r"\frac{1}{2}", "2/3")]
    other = [rollout(r"\boxed{3}", "4", group=1), rollout("nothing", "4", group=1)]
    with Verifier(RewardConfig()) as verifier:
        verifier.score([*group, *other])
        verifier.classify([*group, *other])
    assert [each.extra["answer_class"] for each in group] == [0, 1, 2, 1, 0, 2]
    assert [each.extra["answer_class"] for each in other] == [1, -1]


class Counting(AnswerReward):
    """Answers are equal if their texts are, ignoring case. `hard` cannot be compared with anything; `hangs` can be compared
    with the reference only."""

    def __init__(self, config: RewardConfig) -> None:
        self.asked: list[tuple[str, str]] = []
        self.wasted: list[tuple[str, str]] = []

    def answer(self, rollout: Rollout) -> str | None:
        return rollout.response or None

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        self.asked += pairs
        self.undecided = {pair for pair in pairs if self._hangs(*pair)}
        self.wasted += self.undecided
        return [pair not in self.undecided and pair[0].lower() == pair[1].lower() for pair in pairs]

    @staticmethod
    def _hangs(reference: str, answer: str) -> bool:
        later = "hangs" in reference + answer and reference != "gold"
        return "hard" in reference + answer or later


@pytest.mark.parametrize("bad", ["hard", "hangs"])
@pytest.mark.parametrize("place", [0, 1, 40, 63])
def test_one_bad_answer_costs_a_few_time_outs_and_not_one_for_each_other(bad: str, place: int) -> None:
    """maj@64: a bad answer among 63, which come in pairs that differ only in case."""
    answers = [f"{'a' if number % 2 else 'A'}{number // 2}" for number in range(63)]
    answers.insert(place, bad)
    group = [rollout(answer, "gold") for answer in answers]
    verifier = Verifier(RewardConfig(kind=f"{__name__}:Counting"))
    judge: Any = verifier._judge
    verifier.score(group)
    verifier.classify(group)
    assert len(judge.wasted) <= 4
    assert len(judge.asked) < 64 * 64
    classes = {each.response.lower(): each.extra["answer_class"] for each in group}
    assert [each.extra["answer_class"] for each in group] == [classes[answer.lower()] for answer in answers]
    assert sorted(classes.values()) == list(range(1, 34))


def test_a_bad_answer_that_is_given_often_is_one_class() -> None:
    group = [rollout("hard", "gold") for _ in range(60)] + [rollout(text, "gold") for text in ("b", "B", "gold", "")]
    verifier = Verifier(RewardConfig(kind=f"{__name__}:Counting"))
    judge: Any = verifier._judge
    verifier.score(group)
    verifier.classify(group)
    assert [each.extra["answer_class"] for each in group] == [1] * 60 + [2, 2, 0, -1]
    assert judge.wasted == [("gold", "hard")]


def test_spellings_are_not_compared() -> None:
    group = [rollout(rf"\boxed{{{answer}}}", "1/2") for answer in (r"\dfrac{2}{3}", r"\frac{2}{3}", r"\tfrac23", r" \frac23 ")]
    with Verifier(RewardConfig()) as verifier:
        verifier.score(group)
        judge: Any = verifier._judge
        judge.equal = lambda pairs: pytest.fail(f"{pairs} were compared")
        verifier.classify(group)
    assert [each.extra["answer_class"] for each in group] == [1] * 4


class RewardServer(HTTPServer):
    """Answers as the test sets it, and records its requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[tuple[int, Any]] = []
        self.asked: list[tuple[str | None, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    server: RewardServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.headers["Authorization"], body))
        status, reply = self.server.replies.pop(0) if self.server.replies else (200, None)
        if reply is None:
            reply = {"scores": [len(row["response"]) / 10 for row in body["responses"]]}
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.server.url)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardServer]:
    monkeypatch.setattr(models, "FIRST_WAIT_SECONDS", 0.01)
    server = RewardServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def remote(server: RewardServer, **settings: Any) -> RewardConfig:
    defaults = {"url": server.url, "attempts": 3, "timeout": 5.0, "batch_size": 2}
    return RewardConfig(kind="remote_model", threshold=0.25, remote=RemoteRewardConfig(**{**defaults, **settings}))


def test_a_remote_model_scores_in_batches_with_its_token(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "secret")
    some = [rollout("a" * n, answer="z", prompt="q") for n in (1, 2, 3)]
    assert rewards(remote(server, token_variable="REWARD_TOKEN"), *some) == [0.1, 0.2, 0.3]
    assert [each.correct for each in some] == [False, False, True]
    assert [token for token, _ in server.asked] == ["Bearer secret"] * 2
    assert server.asked[1][1] == {"responses": [{"prompt": "q", "response": "aaa", "answer": "z"}]}


def test_a_busy_server_is_asked_again(server: RewardServer) -> None:
    server.replies = [(503, {}), (429, {})]
    assert rewards(remote(server), rollout("aaaa")) == [0.4]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([(503, {})] * 3, r"does not answer \(HTTP status 503; 3 attempts"),
        ([(401, {})], "rejects the request .HTTP status 401"),
        ([(302, {})], "rejects the request .HTTP status 302"),
        ([(200, {"scores": []})], "1 finite numbers"),
        ([(200, {"scores": [None]})], "1 finite numbers"),
        ([(200, {"scores": [float("nan")]})], "1 finite numbers"),
        ([(200, [1])], "1 finite numbers"),
    ],
)
def test_a_remote_model_that_fails_is_an_error(server: RewardServer, replies: list[tuple[int, Any]], message: str) -> None:
    server.replies = list(replies)
    with pytest.raises(RewardError, match=message):
        rewards(remote(server), rollout("aaaa"))


def test_a_remote_model_that_is_not_there_is_an_error(server: RewardServer) -> None:
    with pytest.raises(RewardError, match=r"does not answer .*2 attempts"):
        rewards(remote(server, url="http://127.0.0.1:9/", attempts=2), rollout("aaaa"))
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE is not set"):
        Verifier(remote(server, token_variable="NO_SUCH_VARIABLE"))


def make_reward_model(path: Path, **settings: Any) -> Qwen2ForSequenceClassification:
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "num_labels": 1}
    defaults = {"num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": tokenizer.pad_token_id, **sizes}
    torch.manual_seed(0)
    model = Qwen2ForSequenceClassification(Qwen2Config(vocab_size=len(tokenizer), **{**defaults, **settings}))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model.eval()


@pytest.mark.parametrize("pad", [True, False], ids=["batches", "one by one, without a padding token"])
def test_a_local_model_gives_its_logit_whatever_stands_beside_it(tmp_path: Path, pad: bool) -> None:
    model = make_reward_model(tmp_path, **({} if pad else {"pad_token_id": None}))
    some = [rollout(response, prompt="1+1=") for response in ("2", "3 or so", "22")]
    scores = rewards(RewardConfig(kind="local_model", local=LocalRewardConfig(path=str(tmp_path))), *some)
    for each, score in zip(some, scores, strict=True):
        ids = make_tokenizer()(each.prompt + each.response, return_tensors="pt")["input_ids"]
        assert score == pytest.approx(model(ids).logits.item(), abs=1e-5)
    assert len(set(scores)) == 3


def test_a_local_model_that_cannot_score_is_an_error(tmp_path: Path) -> None:
    make_reward_model(tmp_path / "good")
    make_reward_model(tmp_path / "two", num_labels=2)
    with pytest.raises(RewardError, match=r"have 40 tokens, the reward model's limit is 32"):
        rewards(RewardConfig(kind="local_model", local=LocalRewardConfig(path=str(tmp_path / "good"))), rollout("2" * 40))
    with pytest.raises(ModelError, match="2 labels"):
        rewards(RewardConfig(kind="local_model", local=LocalRewardConfig(path=str(tmp_path / "two"))), rollout("2"))
    with pytest.raises(ModelError, match="not an HF model directory with safetensors"):
        Verifier(RewardConfig(kind="local_model", local=LocalRewardConfig(path=str(tmp_path))))
