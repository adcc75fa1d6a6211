r"""The rule-based verifier: reward and correctness of each response, from its final answer and the reference answer."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from kdrl_mcore.config import RewardConfig
from kdrl_mcore.errors import RewardError
from kdrl_mcore.reward.answers import compare_plainly, count_boxes, last_boxed, reference_answer
from kdrl_mcore.reward.pool import WorkerPool
from kdrl_mcore.types import Rollout

MATH_VERIFY = "kdrl_mcore.reward.equivalence:equivalent"
"""What the workers run for `reward.kind=math_verify`."""


class Verifier:
    r"""Gives rollouts their `reward` and `correct`, in place.

    `math_verify`: correct if the content of the response's last `\boxed{}` equals the reference as mathematics. Plain
    integers and identical strings are compared at once (`compare_plainly`); everything else goes to worker processes
    that are killed when they take too long, and such an answer is incorrect and counted.
    `exact_match`: correct if the content of the last `\boxed{}`, or the whole response where it opens no box, is the
    reference character for character (runs of white space count as one space).

    A context manager; without `with`, the workers end with the process.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Starts nothing: workers start with the first answer that needs one."""
        self._config = config
        self._pool = WorkerPool(MATH_VERIFY, config.workers, config.timeout)

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def timeouts(self) -> int:
        """Answers judged incorrect so far because their comparison exceeded `reward.timeout`."""
        return self._pool.timeouts

    @property
    def crashes(self) -> int:
        """Answers judged incorrect so far because their comparison ended its process (memory limit, interpreter crash)."""
        return self._pool.crashes

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def score(self, rollouts: Sequence[Rollout]) -> None:
        r"""Set `reward` and `correct` of each rollout.

        reward = (`reward.correct` or `reward.incorrect`) + `reward.format_bonus` if the response ended by itself and
        holds exactly one `\boxed{}`. `correct` comes from the comparison alone, never from the reward's value.

        Raises:
            RewardError: a rollout has no reference answer, or the worker processes do not work.
        """
        references = [_reference(rollout) for rollout in rollouts]
        if self._config.kind == "exact_match":
            correct = [
                _collapse(_whole_answer(r.response)) == _collapse(ref) for r, ref in zip(rollouts, references, strict=True)
            ]
        else:
            answers = [last_boxed(rollout.response) for rollout in rollouts]
            correct = self._equal(list(zip(references, answers, strict=True)))
        for rollout, is_correct in zip(rollouts, correct, strict=True):
            bonus = self._config.format_bonus if _well_formed(rollout) else 0.0
            rollout.correct = is_correct
            rollout.reward = (self._config.correct if is_correct else self._config.incorrect) + bonus

    def _equal(self, pairs: list[tuple[str, str | None]]) -> list[bool]:
        """Whether each answer equals its reference. Each distinct pair is compared once."""
        verdicts: dict[tuple[str, str | None], bool] = {}
        hard: list[tuple[str, str]] = []
        for reference, answer in dict.fromkeys(pairs):
            plain = compare_plainly(reference, answer) if answer else False
            if plain is not None:
                verdicts[reference, answer] = plain
            elif answer:
                hard.append((reference, answer))
        verdicts.update(zip(hard, self._pool.compare(hard), strict=True))
        return [verdicts[pair] for pair in pairs]


def _reference(rollout: Rollout) -> str:
    reference = reference_answer(rollout.answer)
    if not reference:
        raise RewardError(f"prompt {rollout.prompt_id} has no reference answer: give every row of the data an answer")
    return reference


def _whole_answer(response: str) -> str:
    """What `exact_match` compares; a box that is not closed holds nothing."""
    return (last_boxed(response) or "") if count_boxes(response) else response


def _well_formed(rollout: Rollout) -> bool:
    return rollout.finish_reason == "stop" and count_boxes(rollout.response) == 1 and last_boxed(rollout.response) is not None


def _collapse(text: str) -> str:
    return " ".join(text.split())
