r"""The verifier: sets the reward and the correctness of each response, with the rewards that the configuration names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from types import TracebackType

from kdrl_mcore.config import RewardConfig, RewardTermConfig
from kdrl_mcore.errors import RewardError
from kdrl_mcore.parallel.collect import gather_from_replicas
from kdrl_mcore.parallel.layout import ModelGroups
from kdrl_mcore.reward import models, python_code, rules  # noqa: F401 (they register the built-in rewards)
from kdrl_mcore.reward.registry import AnswerReward, build_reward, failures_of, reference_of
from kdrl_mcore.reward.verdicts import Unjudged
from kdrl_mcore.types import Rollout

NO_ANSWER, CORRECT_CLASS = -1.0, 0.0
"""The `answer_class` of a response without an answer, and of every correct one; those of wrong answers count from 1."""


class Verifier:
    """Sets `reward` and `correct` of rollouts, in place.

    Each of several domains can have its own kind of verifier; further rewards apply to all domains. A context manager; without
    `with`, the workers end with the process.
    """

    def __init__(self, config: RewardConfig, kinds: Mapping[str, str] | None = None) -> None:
        """Build the rewards. Processes that they need start with the first response.

        Args:
            kinds: the kind of verifier by domain; for other domains it is `config.kind`.

        Raises:
            ConfigError: there is no such reward.
        """
        self._config = config
        self._kinds = dict(kinds or {})
        names = sorted({config.kind, *self._kinds.values()})
        self._judges = {kind: build_reward(kind, replace(config, kind=kind)) for kind in names}
        self._judge = self._judges[config.kind]
        self._undecided: Set[tuple[str, str]] = frozenset()  # of the last `score`
        terms = [*config.terms, *([RewardTermConfig("format", config.format_bonus)] if config.format_bonus else [])]
        self._terms = [(term, build_reward(term.kind, config)) for term in terms]

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def timeouts(self) -> int:
        """The number of responses so far that count as incorrect because judging them took longer than `reward.timeout`."""
        return sum(judge.timeouts for judge in self._judges.values())

    @property
    def crashes(self) -> int:
        """The number of responses so far that count as incorrect because judging them ended the process (memory limit,
        interpreter crash)."""
        return sum(judge.crashes for judge in self._judges.values())

    def close(self) -> None:
        """End the processes of the rewards."""
        for reward in [*self._judges.values(), *(reward for _, reward in self._terms)]:
            reward.close()

    def score(self, rollouts: Sequence[Rollout]) -> None:
        """Set `reward` and `correct` of each rollout, and `extra["reward_KIND"]`, the score of each further reward. If the
        verifier could not judge a response, also set `extra["verifier_timeout"]` or `extra["verifier_crash"]` to 1.

        With the verifier's score s: reward = `reward.correct` * s + `reward.incorrect` * (1 - s) + sum of weight * score over
        the further rewards. A response is correct if s reaches `reward.threshold`, regardless of its reward. With
        `reward.accept_truncated=false`, s is 0 for a response that was cut off at its limit.

        Raises:
            RewardError: a rollout has no reference answer, or a reward failed.
        """
        config = self._config
        scores = self._scores(rollouts)
        self._undecided = frozenset().union(*(judge.undecided for judge in self._judges.values()))
        for rollout, score in zip(rollouts, scores, strict=True):
            if isinstance(score, Unjudged):
                rollout.extra[f"verifier_{score.cause}"] = 1.0
            accepted = config.accept_truncated or rollout.finish_reason != "length"
            rollout.correct = accepted and score >= config.threshold
            rollout.reward = config.correct * score + config.incorrect * (1 - score)
        for term, reward in self._terms:
            with failures_of(term.kind):
                found = reward.score(rollouts)
            for rollout, score in zip(rollouts, found, strict=True):
                rollout.reward += term.weight * score
                rollout.extra[f"reward_{term.kind}"] = score

    def _scores(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Each rollout's score by the verifier of its domain; 0 if it was cut off at its limit and that is not accepted."""
        indices: dict[str, list[int]] = {}
        for index, rollout in enumerate(rollouts):
            if self._config.accept_truncated or rollout.finish_reason != "length":
                indices.setdefault(self._kinds.get(rollout.domain, self._config.kind), []).append(index)
        scores = [0.0] * len(rollouts)
        for kind, chosen in indices.items():
            with failures_of(kind):
                found = self._judges[kind].score([rollouts[index] for index in chosen])
            for index, score in zip(chosen, found, strict=True):
                scores[index] = score
        return scores

    def classify(self, rollouts: Sequence[Rollout]) -> None:
        """Set `extra["answer_class"]` of the rollouts that `score` verified last: within a group, equal answers have equal
        classes.

        Correct answers form one class, as each equals the reference. A wrong answer joins the first class whose first answer it
        equals, by the verifier's own comparison. Nothing is set if the verifier does not compare answers.

        An answer whose comparison with the reference failed (by a time-out, say) is compared with other answers only by its
        spelling, and one whose comparisons with two others failed is compared no further: each costs a few time-outs rather
        than one for every other answer.
        """
        if isinstance(self._judge, AnswerReward):
            with failures_of(self._config.kind):
                self._classify(self._judge, rollouts)

    def _classify(self, judge: AnswerReward, rollouts: Sequence[Rollout]) -> None:
        groups: dict[int, _Wrong] = {}
        for rollout in rollouts:
            answer = judge.answer(rollout)
            rollout.extra["answer_class"] = CORRECT_CLASS if rollout.correct else NO_ANSWER
            accepted = self._config.accept_truncated or rollout.finish_reason != "length"
            if answer and accepted and not rollout.correct:
                hard = (reference_of(rollout), answer) in self._undecided
                groups.setdefault(rollout.group_id, _Wrong()).add(rollout, judge.spelling(answer), answer, hard)
        while open_groups := [group for group in groups.values() if group.open_next()]:
            at_once = max(2, self._config.workers // len(open_groups))
            pairs = [pair for group in open_groups for pair in group.next_pairs(at_once)]
            distinct = list(dict.fromkeys(pairs))
            verdicts = dict(zip(distinct, judge.equal(distinct), strict=True))
            for group in open_groups:
                group.take(verdicts, judge.undecided)


class _Wrong:
    """Sorts the wrong answers to one problem into classes. The classes open one after another: each begins with the first
    answer that has no class yet, which is compared with each of the rest, a few at a time."""

    def __init__(self) -> None:
        self._rollouts: dict[str, list[Rollout]] = {}  # by spelling
        self._answers: dict[str, str] = {}  # the first answer of each spelling
        self._hard: set[str] = set()  # spellings that cannot be compared
        self._failures = Counter[str]()  # failed comparisons with an answer for which other comparisons worked
        self._number = CORRECT_CLASS  # of the open class
        self._opener: str | None = None  # the spelling that opened it
        self._left: list[str] = []  # spellings that the open class has yet to be compared with
        self._asked: list[str] = []  # those that are being compared
        self._comparable = False  # whether any comparison with the open class worked

    def add(self, rollout: Rollout, spelling: str, answer: str, hard: bool) -> None:
        """Add a wrong answer; `hard` if it could not be compared with the reference."""
        self._rollouts.setdefault(spelling, []).append(rollout)
        self._answers.setdefault(spelling, answer)
        if hard:
            self._hard.add(spelling)

    def open_next(self) -> bool:
        """Open the next class if the present one is complete; returns whether there is anything to compare."""
        while not self._left and self._rollouts:
            self._opener = next(iter(self._rollouts))
            self._number += 1
            self._comparable = False
            self._close(self._opener)
            if self._opener not in self._hard:
                self._left = [spelling for spelling in self._rollouts if spelling not in self._hard]
        return bool(self._left)

    def next_pairs(self, count: int) -> list[tuple[str, str]]:
        """The next comparisons of the open class."""
        assert self._opener is not None
        self._asked, self._left = self._left[:count], self._left[count:]
        return [self._pair(spelling) for spelling in self._asked]

    def take(self, equal: Mapping[tuple[str, str], bool | Unjudged], undecided: Set[tuple[str, str]]) -> None:
        """Take the verdicts on these pairs. A class is compared no further if all of its comparisons failed, and neither is an
        answer whose comparisons failed with two classes for which others worked."""
        failed = {spelling for spelling in self._asked if self._pair(spelling) in undecided}
        self._comparable |= len(failed) < len(self._asked)
        if not self._comparable:
            self._left = []
        else:
            self._failures.update(failed)
            self._hard |= {spelling for spelling in failed if self._failures[spelling] > 1}
        for spelling in self._asked:
            if equal[self._pair(spelling)]:
                self._close(spelling)

    def _pair(self, spelling: str) -> tuple[str, str]:
        assert self._opener is not None
        return self._answers[self._opener], self._answers[spelling]

    def _close(self, spelling: str) -> None:
        for rollout in self._rollouts.pop(spelling):
            rollout.extra["answer_class"] = self._number


def verify_together(
    groups: ModelGroups, verifier: Verifier | None, rollouts: Sequence[Rollout], *, classify: bool = False
) -> None:
    """Verify rollouts in place. The groups of responses are divided among the replicas' leaders, which have a verifier. With
    `classify`, wrong answers are also compared with each other. Collective over the world.

    Raises:
        RewardError: on every rank, if verifying failed on one, so that no rank waits for another that has stopped.
    """
    verdicts: list[tuple[int, float, bool, dict[str, float]]] = []
    failures: list[str] = []
    if verifier is not None:
        replicas = groups.replicas
        number = {group: index for index, group in enumerate(dict.fromkeys(rollout.group_id for rollout in rollouts))}
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
