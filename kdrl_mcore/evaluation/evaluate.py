"""Evaluation with a rollout engine, the same in the training loop and in `kdrl-evaluate`: sample, verify, keep, count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kdrl_mcore.config import Config, EvalConfig, RewardConfig, RolloutConfig, domain_name, load_benchmark
from kdrl_mcore.config.derived import evaluated_limit
from kdrl_mcore.data.files import name_of
from kdrl_mcore.data.limits import Limits, check_prompts
from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.evaluation import metrics
from kdrl_mcore.evaluation.benchmarks import Benchmark, check_benchmark, load_benchmarks
from kdrl_mcore.evaluation.generations import Generations
from kdrl_mcore.parallel.collect import from_first_rank
from kdrl_mcore.parallel.layout import ModelGroups
from kdrl_mcore.reward.registry import AnswerReward, needed_columns, reward_class
from kdrl_mcore.reward.verifier import Verifier, verify_together
from kdrl_mcore.rollout.engine import RolloutEngine, Sampling
from kdrl_mcore.types import Rollout

SAMPLED, GREEDY = "sampled", "greedy"
Advance = Callable[[str, int], None]
"""A callback after each block, with the benchmark's name and the number of responses in the block."""


@dataclass(frozen=True)
class Result:
    """The verified responses to a benchmark's prompts, in the order of the prompts; `greedy` is empty unless `eval.greedy`."""

    name: str
    num_prompts: int
    sampled: list[Rollout]
    greedy: list[Rollout]


class Evaluation:
    """Benchmarks with their verifiers, which live on the replicas' leaders."""

    def __init__(self, config: Config, tokenizer: Tokenizer, groups: ModelGroups, limits: Limits) -> None:
        """Load the benchmarks.

        Args:
            limits: the limits of the evaluated model.

        Raises:
            ConfigError, DataError: a benchmark or its reward cannot be used, or a prompt exceeds the limits.
        """
        self.benchmarks = load_benchmarks(config, tokenizer)
        for benchmark in self.benchmarks:
            check_prompts(benchmark.prompts, benchmark.name, limits, *evaluated_limit(config))
        self._groups = groups
        self._eval, self._rollout, self._seed = config.eval, config.rollout, config.trainer.seed
        self._verifiers: dict[str, Verifier] = {}
        if groups.is_replica_leader:
            kinds = {self._kind(benchmark, config.reward) for benchmark in self.benchmarks}
            # Further rewards do not decide what is correct; those that need columns of the training rows are left out.
            terms = [term for term in config.reward.terms if not needed_columns(term.kind)]
            self._verifiers = {kind: Verifier(replace(config.reward, kind=kind, terms=terms)) for kind in sorted(kinds)}
        self._kinds = {benchmark.name: self._kind(benchmark, config.reward) for benchmark in self.benchmarks}
        for benchmark in self.benchmarks:
            check_benchmark(benchmark, self._kinds[benchmark.name], config.reward)

    @staticmethod
    def _kind(benchmark: Benchmark, reward: RewardConfig) -> str:
        return benchmark.reward or reward.kind

    def close(self) -> None:
        """End the verifiers' processes."""
        for verifier in self._verifiers.values():
            verifier.close()

    @property
    def num_responses(self) -> int:
        """The number of responses in one evaluation."""
        return sum(len(benchmark.prompts) for benchmark in self.benchmarks) * (self._eval.samples + self._eval.greedy)

    def run(
        self, engine: RolloutEngine, generations: Generations | None = None, advance: Advance = lambda name, count: None
    ) -> list[Result]:
        """Sample and verify the responses to every prompt of every benchmark, with the same random draws at every call, so that
        two evaluations differ only by the weights. Collective over the world.

        Args:
            generations: on rank 0, stores the responses and finds finished blocks; None on the other ranks, and if the
                responses are not kept.
            advance: called after each block.
        """
        return [
            Result(
                benchmark.name,
                len(benchmark.prompts),
                self._answer(engine, benchmark, SAMPLED, generations, advance),
                self._answer(engine, benchmark, GREEDY, generations, advance) if self._eval.greedy else [],
            )
            for benchmark in self.benchmarks
        ]

    def _answer(
        self, engine: RolloutEngine, benchmark: Benchmark, mode: str, generations: Generations | None, advance: Advance
    ) -> list[Rollout]:
        rollouts: list[Rollout] = []
        size = self._eval.block or len(benchmark.prompts)
        for block, begin in enumerate(range(0, len(benchmark.prompts), size)):
            prompts = benchmark.prompts[begin : begin + size]
            sampling = sampling_of(mode, block, self._eval, self._rollout, self._seed)
            key = (benchmark.name, mode, block)
            done = from_first_rank(
                generations.read(*key, prompts, sampling.responses_per_prompt) if generations is not None else None
            )
            if done is None:
                done = engine.generate(prompts, sampling)
                for rollout in done:
                    rollout.group_id += begin
                verifier = self._verifiers.get(self._kinds[benchmark.name])
                verify_together(self._groups, verifier, done, classify=mode == SAMPLED)
                if generations is not None:
                    generations.write(*key, done)
            rollouts += done
            advance(benchmark.name, len(done))
        return rollouts


def sampling_of(mode: str, block: int, settings: EvalConfig, rollout: RolloutConfig, seed: int) -> Sampling:
    """The sampling settings for a block of prompts: those of `eval`, and where it has none those of `rollout`."""
    limit = rollout.max_response_tokens if settings.max_response_tokens is None else settings.max_response_tokens
    stop = tuple(rollout.stop if settings.stop is None else settings.stop)
    if mode == GREEDY:
        return Sampling(0.0, 1.0, limit, 1, (seed, 1, block), stop=stop)
    return Sampling(
        settings.temperature,
        rollout.top_p if settings.top_p is None else settings.top_p,
        limit,
        settings.samples,
        (seed, 1, block),
        top_k=rollout.top_k if settings.top_k is None else settings.top_k,
        min_p=rollout.min_p if settings.min_p is None else settings.min_p,
        stop=stop,
    )


def summarize(results: Sequence[Result]) -> dict[str, float]:
    """The metrics of an evaluation: `eval/BENCHMARK/...` for each benchmark, and `eval/...` over all of them.

    For a benchmark with K samples: `avg@K` with `_stderr` and the ends of its interval, `_low` and `_high`; `pass@k`; `maj@K`
    if the verifier compares answers; `greedy` with `eval.greedy`; `response_length` in tokens and `truncated`, the share of
    responses that hit the limit; `verifier_timeouts`, the share whose verification took too long, if there are any. Over all
    benchmarks, the means; there avg@K is called `eval/accuracy`, and greedy `eval/greedy_accuracy`, both with standard error
    and interval. `evaluation.metrics` defines each.
    """
    if not results:
        return {}
    by_name = {result.name: _scores(result) for result in results}
    samples = len(results[0].sampled) // results[0].num_prompts
    summary: dict[str, float] = {}
    for name, scores in by_name.items():
        for measure, values in scores.items():
            summary[f"eval/{name}/{measure}"] = float(values.mean())
        summary |= _uncertainty(f"eval/{name}/avg@{samples}", [scores[f"avg@{samples}"]])
    overall = {f"avg@{samples}": "accuracy", "greedy": "greedy_accuracy"}
    for measure in set.intersection(*(set(scores) for scores in by_name.values())):
        means = [scores[measure].mean() for scores in by_name.values()]
        summary[f"eval/{overall.get(measure, measure)}"] = float(np.mean(means))
    for measure, name in overall.items():
        if all(measure in scores for scores in by_name.values()):
            summary |= _uncertainty(f"eval/{name}", [scores[measure] for scores in by_name.values()])
    return summary


def metric_names(config: Config) -> list[str]:
    """The names that `summarize` will give the metrics of the run's evaluations, before there are any responses."""
    kinds = {name_of(config.data.eval): config.reward.kind} if config.data.eval else {}
    kinds |= {domain_name(source): source.reward or config.reward.kind for source in config.data.sources if source.eval}
    kinds |= {name: load_benchmark(name).reward or config.reward.kind for name in config.eval.benchmarks}
    results = []
    for name, kind in kinds.items():
        verifier = reward_class(kind)
        compares = verifier is not None and issubclass(verifier, AnswerReward)
        token = np.zeros(1, dtype=np.int64)
        extra = {"answer_class": 0.0} if compares else {}
        response = Rollout("", 0, token, token, np.zeros(1, dtype=np.float32), "stop", 0, extra=extra)
        results.append(Result(name, 1, [response] * config.eval.samples, [response] * config.eval.greedy))
    return sorted(summarize(results))


def _scores(result: Result) -> dict[str, metrics.Scores]:
    """Each metric of a benchmark, per prompt [P]."""
    shape = (result.num_prompts, -1)
    correct_PK = np.array([rollout.correct for rollout in result.sampled], dtype=float).reshape(shape)
    samples = correct_PK.shape[1]
    scores = {f"avg@{samples}": metrics.average(correct_PK)}
    scores |= {f"pass@{k}": metrics.pass_at(k, correct_PK) for k in metrics.ks_of_pass(samples)}
    if samples > 1 and all("answer_class" in rollout.extra for rollout in result.sampled):
        class_PK = np.array([int(rollout.extra["answer_class"]) for rollout in result.sampled]).reshape(shape)
        scores[f"maj@{samples}"] = metrics.majority(class_PK)
    if result.greedy:
        scores["greedy"] = np.array([rollout.correct for rollout in result.greedy], dtype=float)
    lengths_PK = np.array([len(rollout.response_token_ids) for rollout in result.sampled], dtype=float).reshape(shape)
    truncated_PK = np.array([rollout.finish_reason == "length" for rollout in result.sampled], dtype=float).reshape(shape)
    scores |= {"response_length": lengths_PK.mean(axis=1), "truncated": truncated_PK.mean(axis=1)}
    timeouts = [rollout.extra.get("verifier_timeout", 0.0) for rollout in result.sampled]
    return scores | ({"verifier_timeouts": np.array(timeouts).reshape(shape).mean(axis=1)} if any(timeouts) else {})


def _uncertainty(name: str, benchmarks: Sequence[metrics.Scores]) -> dict[str, float]:
    low, high = metrics.interval(benchmarks)
    return {f"{name}_stderr": metrics.standard_error(benchmarks), f"{name}_low": low, f"{name}_high": high}
