r"""The verifier: reward and correctness of each response, from the registered rewards that the configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from kdrl_mcore.config import RewardConfig, RewardTermConfig
from kdrl_mcore.errors import RewardError
from kdrl_mcore.parallel.collect import gather_from_replicas
from kdrl_mcore.parallel.layout import ModelGroups
from kdrl_mcore.reward import models, python_code, rules  # noqa: F401 (they register the built-in rewards)
from kdrl_mcore.reward.registry import AnswerReward, build_reward
from kdrl_mcore.types import Rollout

NO_ANSWER, CORRECT_CLASS = -1.0, 0.0
"""`answer_class` of a response without an answer, and of every correct one; wrong answers are counted from 1."""


class Verifier:
    """Gives rollouts their `reward` and `correct`, in place.

    A context manager; without `with`, the workers end with the process.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Starts nothing: what a reward needs starts with the first response.

        Raises:
            ConfigError: there is no such reward.
        """
        self._config = config
        self._judge = build_reward(config.kind, config)
        terms = [*config.terms, *([RewardTermConfig("format", config.format_bonus)] if config.format_bonus else [])]
        self._terms = [(term, build_reward(term.kind, config)) for term in terms]

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def timeouts(self) -> int:
        """Responses judged incorrect so far because that took longer than `reward.timeout`."""
        return self._judge.timeouts

    @property
    def crashes(self) -> int:
        """Responses judged incorrect so far because that ended its process (memory limit, interpreter crash)."""
        return self._judge.crashes

    def close(self) -> None:
        """End what the rewards started."""
        for reward in [self._judge, *(reward for _, reward in self._terms)]:
            reward.close()

    def score(self, rollouts: Sequence[Rollout]) -> None:
        """Set `reward` and `correct` of each rollout, and `extra["reward_KIND"]`, the score of each further reward.

        With the verifier's score s: reward = `reward.correct` * s + `reward.incorrect` * (1 - s) + sum of weight * score over
        the further rewards. A response is correct where s reaches `reward.threshold`, whatever its reward.

        Raises:
            RewardError: a rollout has no reference answer, or a reward does not work.
        """
        config = self._config
        for rollout, score in zip(rollouts, self._judge.score(rollouts), strict=True):
            rollout.correct = score >= config.threshold
            rollout.reward = config.correct * score + config.incorrect * (1 - score)
        for term, reward in self._terms:
            for rollout, score in zip(rollouts, reward.score(rollouts), strict=True):
                rollout.reward += term.weight * score
                rollout.extra[f"reward_{term.kind}"] = score

    def classify(self, rollouts: Sequence[Rollout]) -> None:
        """Set `extra["answer_class"]` of verified rollouts: within a group, equal answers have equal classes.

        Correct answers are one class, as each equals the reference. A wrong answer joins the first class whose first answer it
        equals, by the verifier's own comparison. Nothing is set where the verifier compares no answers.
        """
        if not isinstance(self._judge, AnswerReward):
            return
        waiting: dict[int, list[tuple[Rollout, str]]] = {}  # by group: wrong answers without a class
        for rollout in rollouts:
            answer = self._judge.answer(rollout)
            rollout.extra["answer_class"] = CORRECT_CLASS if rollout.correct else NO_ANSWER
            if answer and not rollout.correct:
                waiting.setdefault(rollout.group_id, []).append((rollout, answer))
        number = CORRECT_CLASS
        while waiting := {group: answers for group, answers in waiting.items() if answers}:
            number += 1  # each group opens one class, and all groups are compared together
            firsts = {group: answers[0][1] for group, answers in waiting.items()}
            pairs = [(firsts[group], answer) for group, answers in waiting.items() for _, answer in answers]
            distinct = [pair for pair in dict.fromkeys(pairs) if pair[0] != pair[1]]
            equal = dict(zip(distinct, self._judge.equal(distinct), strict=True))
            for group, answers in waiting.items():
                rest = []
                for rollout, answer in answers:
                    if answer == firsts[group] or equal[firsts[group], answer]:
                        rollout.extra["answer_class"] = number
                    else:
                        rest.append((rollout, answer))
                waiting[group] = rest


def verify_together(
    groups: ModelGroups, verifier: Verifier | None, rollouts: Sequence[Rollout], *, classify: bool = False
) -> None:
    """Verify rollouts in place; the replicas' leaders, which have a verifier, share the groups of responses. With `classify`,
    also compare wrong answers with each other. Collective over the world.

    Raises:
        RewardError: on every rank, where it failed on one: a rank must not wait for another that has stopped.
    """
    verdicts: list[tuple[int, float, bool, dict[str, float]]] = []
    failures: list[str] = []
    if verifier is not None:
        replicas = groups.replicas
        number = {group: place for place, group in enumerate(dict.fromkeys(rollout.group_id for rollout in rollouts))}
        mine = [(i, r) for i, r in enumerate(rollouts) if number[r.group_id] % replicas.size() == replicas.rank()]
        try:
            verifier.score([rollout for _, rollout in mine])
            if classify:
                verifier.classify([rollout for _, rollout in mine])
        except RewardError as error:
            failures.append(str(error))
        verdicts = [(index, rollout.reward, rollout.correct, rollout.extra) for index, rollout in mine]
    gathered = gather_from_replicas(groups, [(verdicts, failures)])
    for _, messages in gathered:
        if messages:
            raise RewardError(messages[0])
    for part, _ in gathered:
        for index, reward, correct, extra in part:
            rollouts[index].reward, rollouts[index].correct, rollouts[index].extra = reward, correct, extra
