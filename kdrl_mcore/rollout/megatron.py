"""The embedded engine: samples with the student itself, over its tensor x pipeline layout, without a second copy of the weights
or a refit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.model.decoding import can_decode, decode, pack_weights, unpack_weights
from kdrl_mcore.model.gpt import ModelParts
from kdrl_mcore.model.kv_cache import KVCache
from kdrl_mcore.parallel.collect import gather_from_replicas
from kdrl_mcore.parallel.collectives import all_gather_single
from kdrl_mcore.parallel.micro_batches import partition
from kdrl_mcore.parallel.packing import SequenceRun, pack
from kdrl_mcore.parallel.platform import device, to_device
from kdrl_mcore.rollout.engine import OnPart, Request, Sampling, Weights, with_beginning
from kdrl_mcore.rollout.experts import compact
from kdrl_mcore.rollout.sampling import sample, uniforms
from kdrl_mcore.rollout.stops import StopsOfBatch, StopStrings
from kdrl_mcore.types import Prompt, Rollout
from kdrl_mcore.vocab_parallel import Support

_NO_IDS = np.empty(0, dtype=np.int64)
_NO_TOKEN = -1
_COMPACT_BELOW = 0.75  # share of the batch that is still running
_MANY_SEQUENCES = 8
_WORTH_PACKING = 128
"""Decoding steps, times sequences up to `_MANY_SEQUENCES`, from which copies of the weights (`pack_weights`) save more time
than they cost: 16 steps of many sequences, but more of a single one, for which a weight's memory order matters less."""
_STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 16}
"""Decoding steps between two checks for finished responses, by kind of device. On CUDA the host waits for the device at each
check; the superfluous decoding in between, of at most 15 tokens after the longest response, costs less."""


class MegatronEngine:
    """Batched generation with a KV cache on the student's own shards.

    Each replica (context-parallel ranks are replicas here) takes its share of the prompts, balanced by prompt length, and
    decodes up to `max_sequences` responses at once; a prompt's responses share one forward pass over it. Every few steps
    finished responses leave the batch; in between the host does not wait for the device. Replicas decode independently, unless
    experts are distributed over several of them: then all run as many steps as the one with the most, because each needs the
    others' experts. On CPUs large weights have a second copy while a batch is sampled (`model/linear.py`).
    """

    verifies = False

    def __init__(self, parts: ModelParts, tokenizer: Tokenizer, max_sequences: int, weight_version: Callable[[], int]) -> None:
        """Args:
        weight_version: returns the number of updates that the student's weights have received.
        """
        self._parts = parts
        self._tokenizer = tokenizer
        stop_ids = torch.tensor(sorted(tokenizer.eos_ids))
        self._is_stop = torch.isin(torch.arange(parts.chunks[-1].shard.size), stop_ids).to(device())
        self._max_sequences = max_sequences
        self._weight_version = weight_version
        self._directly = all(can_decode(chunk) for chunk in parts.chunks)

    def refit(self, student: Weights) -> None:
        """Nothing to do, because the engine samples with the student itself."""

    def sleep(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_part: OnPart | None = None) -> list[Rollout]:
        """See `RolloutEngine`; this engine does not verify. Collective over the world."""
        count, limit = sampling.responses_per_prompt, sampling.max_response_tokens
        requests = [Request(prompt, sampling.key, i * count, count, limit) for i, prompt in enumerate(prompts)]
        return self.sample(requests, sampling)

    @torch.no_grad()  # not inference_mode, whose tensors training cannot use: Megatron-Core keeps buffers for all its passes
    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """See `RolloutEngine`. Collective over the world."""
        groups = self._parts.groups
        for chunk in self._parts.chunks:
            chunk.eval()
        loads = [request.count * len(request.token_ids) for request in requests]
        mine = partition(loads, groups.replicas.size())[groups.replicas.rank()]
        waves = self._waves([requests[i].count for i in mine])
        rollouts: list[tuple[tuple[int, int], Rollout]] = []
        replay = self._parts.replay
        try:
            with replay.recording() if replay is not None and sampling.experts else nullcontext():
                for number in range(self._most(len(waves))):
                    if number < len(waves):
                        wave = {mine[index]: requests[mine[index]] for index in waves[number]}
                        rollouts += self._sample_wave(wave, sampling)
                    else:  # so that the other replicas can use this one's experts
                        self._sample_wave({0: replace(requests[0], count=1)}, sampling)
        finally:
            unpack_weights(self._parts.chunks)
        for chunk in self._parts.chunks:
            chunk.train()
        gathered = sorted(gather_from_replicas(groups, rollouts), key=lambda item: item[0])
        return [rollout for _, rollout in gathered]

    def _waves(self, counts: Sequence[int]) -> list[list[int]]:
        """The indices of the requests that are decoded together, given the number of responses of each."""
        waves: list[list[int]] = []
        room = 0
        for index, count in enumerate(counts):
            if count > room:
                waves.append([])
                room = max(count, self._max_sequences)
            waves[-1].append(index)
            room -= count
        return waves

    def _most(self, count: int) -> int:
        """The largest count among the replicas that share experts with this one; `count` itself if there are none. Collective
        over these replicas."""
        return self._own_and_most(torch.tensor(count))[1]

    def _own_and_most(self, count: Tensor) -> tuple[int, int]:
        """A count, on any device, and its `_most`. The host waits for both."""
        groups, counts = self._parts.groups, count.repeat(2)
        if groups.layout.tensor % groups.layout.expert:
            counts = counts.to(device())
            dist.all_reduce(counts[1:], dist.ReduceOp.MAX, group=groups.replicas)
        own, most = counts.tolist()
        return own, most

    def _sample_wave(self, wave: Mapping[int, Request], sampling: Sampling) -> list[tuple[tuple[int, int], Rollout]]:
        """((index of its request, its number there), rollout) of each response to these requests, which are given by index."""
        alignment, where = self._parts.groups.layout.replica_alignment, device()
        packed = pack([(index, each.token_ids, _NO_IDS) for index, each in wave.items()], alignment).on_device()
        requests = [wave[index] for index in packed.order]
        counts = torch.tensor([request.count for request in requests])
        lengths = torch.tensor([len(request.token_ids) for request in requests])
        limits = torch.tensor([request.tokens for request in requests]).repeat_interleave(counts)
        limit = int(limits.max())
        random = to_device(torch.cat([_draws(request, limit) for request in requests]))
        cache = KVCache(lengths.tolist(), counts.tolist(), limit, few_shapes=where.type == "cuda")
        replay = self._parts.replay if sampling.experts else None
        hidden = self._forward(packed.tokens_S, packed.positions_S, packed.runs, cache)
        read_first = None if replay is None else replay.take(len(packed.tokens_S))
        ends = to_device((lengths.cumsum(0) - 1).repeat_interleave(counts))
        last_hidden = None if hidden is None else hidden[ends]
        cache.begin_decoding()
        # After a forward pass: before it, weights may still be on their way from other replicas.
        if limit * min(len(limits), _MANY_SEQUENCES) >= _WORTH_PACKING:
            pack_weights(self._parts.chunks)

        count = len(limits)
        slots = torch.arange(count, device=where)  # the response of each cache slot
        positions = to_device(lengths.repeat_interleave(counts))
        tokens = torch.full((count, limit), _NO_TOKEN, device=where)
        log_probs = torch.zeros(count, limit, device=where)
        running = torch.ones(count, dtype=torch.bool, device=where)  # by slot
        chosen = None if read_first is None else read_first.new_zeros(count, limit, *read_first.shape[1:])
        stops, read = self._stops(requests, limits.tolist(), sampling), 0
        ends_before = to_device(limits) if limits.min() < limit else None  # some responses have a lower limit
        for step in range(limit):
            token, log_prob = self._sample(last_hidden, random[slots, step], sampling)
            tokens[slots, step], log_probs[slots, step] = token, log_prob
            running &= ~self._is_stop[token]
            if ends_before is not None:
                running &= ends_before[slots] > step + 1
            if step == limit - 1:
                break
            if (step + 1) % _STEPS_BETWEEN_LOOKS[where.type] == 0:
                if stops is not None:
                    have_stopped = stops.read(slots.tolist(), tokens[slots, read : step + 1].cpu().numpy())
                    running &= ~to_device(torch.tensor(have_stopped))
                    read = step + 1
                num_running, most = self._own_and_most(running.sum())
                if most == 0:
                    break
                # Dropping finished sequences copies the cache, which costs about as much as a step. Until then decoding
                # continues for them, and the tokens after their end are ignored.
                if 0 < num_running <= _COMPACT_BELOW * len(slots):
                    kept = (~running).byte().sort(stable=True).indices[:num_running]
                    slots, positions, token, running = slots[kept], positions[kept], token[kept], running[kept]
                    cache.keep(kept)
            last_hidden = self._decode(token, positions, cache)
            if replay is not None and chosen is not None:
                filled = len(token) + -len(token) % alignment
                chosen[slots, step] = replay.take(filled)[: len(token)]
            cache.advance()
            positions = positions + 1
        if stops is not None:
            stops.read(slots.tolist(), tokens[slots, read : step + 1].cpu().numpy())
        indices = [
            (index, number) for index, request in zip(packed.order, requests, strict=True) for number in range(request.count)
        ]
        stop_ends = {} if stops is None else stops.ends
        parts = self._rollouts(requests, limits.numpy(), tokens.cpu().numpy(), log_probs.cpu().numpy(), stop_ends)
        if replay is not None and read_first is not None and chosen is not None:
            of_prompts, of_tokens = (replay.of_all_layers(each).cpu().numpy() for each in (read_first, chosen))
            rows = [
                slice(stop - length, stop) for length, stop in zip(lengths.tolist(), lengths.cumsum(0).tolist(), strict=True)
            ]
            rows_of = [own for own, each in zip(rows, requests, strict=True) for _ in range(each.count)]
            for slot, part in enumerate(parts):
                before = of_prompts[rows_of[slot]]
                after = of_tokens[slot, : len(part.response_token_ids) - 1]
                part.experts = compact(np.concatenate((before, after)), replay.num_experts)
        to_text, most = self._tokenizer.decode_response, sampling.max_response_tokens
        return [
            (index, with_beginning(wave[index[0]], replace(part, group_id=index[0]), most, to_text))
            for index, part in zip(indices, parts, strict=True)
        ]

    def _stops(self, requests: Sequence[Request], limits: Sequence[int], sampling: Sampling) -> StopsOfBatch | None:
        """The stop strings of all responses to these requests; None without any. Every rank finds them for itself."""
        if not sampling.stop:
            return None
        strings = StopStrings(self._tokenizer.fast, sampling.stop)
        begun = [_NO_IDS if each.begun is None else each.begun.response_token_ids for each in requests]
        texts = [strings.begin(ids) for ids, each in zip(begun, requests, strict=True) for _ in range(each.count)]
        return StopsOfBatch(texts, limits, self._tokenizer.eos_ids)

    def _sample(self, hidden: Tensor | None, uniform_N: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """The next token and its log-prob for every slot, sampled on the last stage and broadcast over the pipeline group."""
        groups, chunk = self._parts.groups, self._parts.chunks[-1]
        sampled: tuple[Tensor, Tensor] | None = None
        if hidden is not None:
            logits = chunk.logits(hidden).float()
            support = Support(sampling.top_p, sampling.top_k, sampling.min_p)
            sampled = sample(logits, uniform_N, chunk.shard, sampling.temperature, support)
        if groups.pipeline.size() > 1:
            shape = (2, len(uniform_N))
            answer = (
                torch.empty(shape, dtype=torch.float64, device=device()) if sampled is None else torch.stack(sampled).double()
            )
            dist.broadcast(answer, dist.get_global_rank(groups.pipeline, groups.pipeline.size() - 1), group=groups.pipeline)
            return answer[0].long(), answer[1].float()
        assert sampled is not None
        return sampled

    def _decode(self, token_N: Tensor, position_N: Tensor, cache: KVCache) -> Tensor | None:
        """Hidden states [N, H] of one new token per slot, on the last stage; None on the others."""
        count = len(token_N)
        filler = -count % self._parts.groups.layout.replica_alignment
        if filler:
            token_N, position_N = F.pad(token_N, (0, filler)), F.pad(position_N, (0, filler))
        hidden = self._forward(token_N, position_N, (SequenceRun.whole(0, count + filler, 1),), cache)
        return None if hidden is None else hidden[:count]

    def _forward(self, tokens_S: Tensor, positions_S: Tensor, runs: tuple[SequenceRun, ...], cache: KVCache) -> Tensor | None:
        """Run all layers over packed tokens: the whole final hidden states [S, H] on the last stage, None on the others.

        Collectives: send and receive along the pipeline, and under sequence parallelism an all-gather of the result.
        """
        groups, parts = self._parts.groups, self._parts
        stages, stage = groups.pipeline.size(), groups.pipeline.rank()
        whole = cache.decoding and self._directly  # whether this rank has all rows under sequence parallelism, too
        rows = len(tokens_S) if whole else len(tokens_S) // groups.layout.replica_alignment
        hidden: Tensor | None = None
        for number, chunk in enumerate(parts.chunks):
            if not chunk.pre_process:
                hidden = torch.empty(rows, parts.config.hidden_size, dtype=parts.config.params_dtype, device=device())
                dist.recv(hidden, dist.get_global_rank(groups.pipeline, (stage - 1) % stages), group=groups.pipeline)
            packed = chunk.pack(runs, positions_S, cache)
            if whole:
                hidden = decode(chunk, groups, tokens_S, hidden, packed)
            else:
                chunk.set_input_tensor(None if hidden is None else hidden[:, None])
                hidden = chunk.run(tokens_S, positions_S, packed).squeeze(1)
            if not (stage == stages - 1 and number == len(parts.chunks) - 1):
                dist.send(hidden, dist.get_global_rank(groups.pipeline, (stage + 1) % stages), group=groups.pipeline)
        if not groups.is_last_stage:
            return None
        assert hidden is not None
        if groups.layout.sequence_parallel and not whole:
            gathered = hidden.new_empty(len(tokens_S), hidden.size(1))
            all_gather_single(gathered, hidden.contiguous(), group=groups.tensor)
            return gathered
        return hidden

    def _rollouts(
        self,
        requests: list[Request],
        limits: NDArray[np.int64],
        tokens: NDArray[np.int64],
        log_probs: NDArray[np.float32],
        ends: Mapping[int, int],
    ) -> list[Rollout]:
        """Cut each row of sampled tokens [responses, most tokens] after its first stop token, at its limit, or, for some rows,
        after the number of tokens in `ends`, with which they complete a stop string."""
        is_end = np.isin(tokens, sorted(self._tokenizer.eos_ids)) & (np.arange(tokens.shape[1]) < limits[:, None])
        stopped = np.asarray(is_end.any(axis=1))
        counts = np.where(stopped, is_end.argmax(axis=1) + 1, limits)
        for slot, count in ends.items():
            counts[slot], stopped[slot] = count, True
        version = self._weight_version()
        prompts = [request.prompt for request in requests for _ in range(request.count)]
        result = []
        for slot, (prompt, count, stop) in enumerate(zip(prompts, counts, stopped, strict=True)):
            ids = tokens[slot, :count].copy()
            result.append(
                Rollout(
                    prompt_id=prompt.prompt_id,
                    group_id=0,  # the caller's
                    prompt_token_ids=prompt.token_ids,
                    response_token_ids=ids,
                    sampler_log_probs=log_probs[slot, :count].copy(),
                    finish_reason="stop" if stop else "length",
                    weight_version=version,
                    prompt=prompt.text,
                    response=self._tokenizer.decode_response(ids),
                    answer=prompt.answer,
                    domain=prompt.domain,
                    columns=prompt.columns,
                    teacher_prompts=prompt.teacher_prompts,
                )
            )
        return result


def _draws(request: Request, tokens: int) -> Tensor:
    """The uniform numbers of a request's responses [responses, tokens], from the first token that is sampled now."""
    numbers = list(range(request.first, request.first + request.count))
    return uniforms(request.key, numbers, request.position + tokens)[:, request.position :]
