"""The embedded engine: samples with the student itself, over its own tensor x pipeline layout. No second copy of the
weights, no refit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.model.gpt import LanguageModel, ModelParts
from kdrl_mcore.model.kv_cache import KVCache
from kdrl_mcore.parallel.collect import gather_from_replicas
from kdrl_mcore.parallel.collectives import all_gather_single
from kdrl_mcore.parallel.packing import Run, pack, partition
from kdrl_mcore.parallel.platform import device, to_device
from kdrl_mcore.rollout.engine import OnPart, Sampling, Weights
from kdrl_mcore.rollout.sampling import sample, uniforms
from kdrl_mcore.types import Prompt, Rollout

_NO_IDS = np.empty(0, dtype=np.int64)
_NO_TOKEN = -1
_COMPACT_BELOW = 0.75  # share of the batch still running
_STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 16}
"""Decoding steps from one look at what has finished to the next, by kind of device. On CUDA the host waits for the device at
each, and what is decoded in vain meanwhile costs less: at most 15 tokens behind the longest response."""


class MegatronEngine:
    """Batched generation with a KV cache on the student's own shards.

    Each replica (context-parallel ranks are replicas here) takes its share of the prompts, balanced by prompt length, and
    decodes up to `max_sequences` responses at once; a prompt's responses share one forward pass over it. Every few steps it
    looks at what has finished, which leaves the batch; in between the host waits for nothing. Replicas decode on their own, but
    where experts are spread over several of them: then all take as many steps as the longest, so that none waits for another's
    experts.
    """

    verifies = False

    def __init__(self, parts: ModelParts, tokenizer: Tokenizer, max_sequences: int, weight_version: Callable[[], int]) -> None:
        """Args:
        weight_version: tells how many updates the student's weights have seen.
        """
        self._parts = parts
        self._tokenizer = tokenizer
        stop_ids = torch.tensor(sorted(tokenizer.eos_ids))
        self._is_stop = torch.isin(torch.arange(parts.chunks[-1].shard.size), stop_ids).to(device())
        self._max_sequences = max_sequences
        self._weight_version = weight_version

    def refit(self, student: Weights) -> None:
        """Nothing to do: it samples with the student itself."""

    def sleep(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    @torch.no_grad()  # not inference_mode: Megatron-Core keeps buffers for all its passes, and training cannot use such tensors
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_part: OnPart | None = None) -> list[Rollout]:
        """See `RolloutEngine`; it does not verify. Collective over the world."""
        groups = self._parts.groups
        for chunk in self._parts.chunks:
            chunk.eval()
        mine = partition([len(prompt.token_ids) for prompt in prompts], groups.replicas.size())[groups.replicas.rank()]
        wave = max(1, self._max_sequences // sampling.copies)
        rollouts: list[tuple[int, Rollout]] = []
        for number in range(self._most(math.ceil(len(mine) / wave))):
            indices = mine[number * wave : (number + 1) * wave]
            if indices:
                rollouts += self._generate_wave([prompts[i] for i in indices], indices, sampling)
            else:  # only so that this replica's experts serve the others
                self._generate_wave(list(prompts[:1]), [0], replace(sampling, copies=1))
        for chunk in self._parts.chunks:
            chunk.train()
        gathered = sorted(gather_from_replicas(groups, rollouts), key=lambda item: item[0])
        return [rollout for _, rollout in gathered]

    def _most(self, count: int) -> int:
        """The largest count of the replicas that share experts with this one; `count` itself where none does. Collective over
        the replicas then."""
        return self._own_and_most(torch.tensor(count))[1]

    def _own_and_most(self, count: Tensor) -> tuple[int, int]:
        """A number, on any device, and its `_most`: the host waits for it."""
        groups, counts = self._parts.groups, count.repeat(2)
        if groups.layout.tensor % groups.layout.expert:
            counts = counts.to(device())
            dist.all_reduce(counts[1:], dist.ReduceOp.MAX, group=groups.replicas)
        own, most = counts.tolist()
        return own, most

    def _generate_wave(self, prompts: list[Prompt], indices: list[int], sampling: Sampling) -> list[tuple[int, Rollout]]:
        """(place in the global batch, rollout) of each response of these prompts."""
        copies, limit = sampling.copies, sampling.max_response_tokens
        alignment, where = self._parts.groups.layout.replica_alignment, device()
        packed = pack([(i, prompt.token_ids, _NO_IDS) for i, prompt in enumerate(prompts)], alignment).on_device()
        order = packed.order
        lengths = torch.tensor([len(prompts[i].token_ids) for i in order])
        places = [indices[i] * copies + copy for i in order for copy in range(copies)]
        random = to_device(uniforms(sampling.key, places, limit))
        cache = KVCache(lengths.tolist(), copies, limit, few_shapes=where.type == "cuda")
        hidden = self._forward(packed.tokens_S, packed.positions_S, packed.runs, cache)
        ends = to_device((lengths.cumsum(0) - 1).repeat_interleave(copies))
        last_hidden = None if hidden is None else hidden[ends]
        cache.begin_decoding()

        slots = torch.arange(len(places), device=where)  # which response each cache slot belongs to
        positions = to_device(lengths.repeat_interleave(copies))
        tokens = torch.full((len(places), limit), _NO_TOKEN, device=where)
        log_probs = torch.zeros(len(places), limit, device=where)
        running = torch.ones(len(places), dtype=torch.bool, device=where)  # by slot
        for step in range(limit):
            token, log_prob = self._sample(last_hidden, random[slots, step], sampling)
            tokens[slots, step], log_probs[slots, step] = token, log_prob
            running &= ~self._is_stop[token]
            if step == limit - 1:
                break
            if (step + 1) % _STEPS_BETWEEN_LOOKS[where.type] == 0:
                num_running, most = self._own_and_most(running.sum())
                if most == 0:
                    break
                # Dropping finished sequences copies the cache, which costs about as much as a step; until then they go on, and
                # what follows their end is not counted.
                if 0 < num_running <= _COMPACT_BELOW * len(slots):
                    kept = (~running).byte().sort(stable=True).indices[:num_running]
                    slots, positions, token, running = slots[kept], positions[kept], token[kept], running[kept]
                    cache.keep(kept)
            last_hidden = self._decode(token, positions, cache)
            cache.advance()
            positions = positions + 1
        return self._rollouts([prompts[i] for i in order], places, copies, tokens.cpu().numpy(), log_probs.cpu().numpy())

    def _sample(self, hidden: Tensor | None, uniform_N: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """The next token and its log-prob for every slot: sampled on the last stage, sent to the others."""
        groups, chunk = self._parts.groups, self._parts.chunks[-1]
        sampled: tuple[Tensor, Tensor] | None = None
        if hidden is not None:
            logits = F.linear(hidden, chunk.head_weight()).float()
            sampled = sample(logits, uniform_N, chunk.shard, sampling.temperature, sampling.top_p)
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
        """Hidden states [N, H] of one new token per slot (last stage only)."""
        count = len(token_N)
        filler = -count % self._parts.groups.layout.replica_alignment
        if filler:
            token_N, position_N = F.pad(token_N, (0, filler)), F.pad(position_N, (0, filler))
        hidden = self._forward(token_N, position_N, (Run.whole(0, count + filler, 1),), cache)
        return None if hidden is None else hidden[:count]

    def _forward(self, tokens_S: Tensor, positions_S: Tensor, runs: tuple[Run, ...], cache: KVCache) -> Tensor | None:
        """All layers over packed tokens: the final hidden states [S, H], whole, on the last stage, None on the others.

        Collectives: send and receive along the pipeline, and under sequence parallelism an all-gather of the result.
        """
        groups, parts = self._parts.groups, self._parts
        stages, stage = groups.pipeline.size(), groups.pipeline.rank()
        rows = len(tokens_S) // groups.layout.replica_alignment
        hidden: Tensor | None = None
        for number, chunk in enumerate(parts.chunks):
            if not chunk.pre_process:
                hidden = torch.empty(rows, 1, parts.config.hidden_size, dtype=parts.config.params_dtype, device=device())
                dist.recv(hidden, dist.get_global_rank(groups.pipeline, (stage - 1) % stages), group=groups.pipeline)
            hidden = self._run(chunk, tokens_S, positions_S, runs, cache, hidden)
            if not (stage == stages - 1 and number == len(parts.chunks) - 1):
                dist.send(hidden, dist.get_global_rank(groups.pipeline, (stage + 1) % stages), group=groups.pipeline)
        if not groups.is_last_stage:
            return None
        assert hidden is not None
        hidden = hidden.squeeze(1)
        if groups.layout.sequence_parallel:
            whole = hidden.new_empty(len(tokens_S), hidden.size(1))
            all_gather_single(whole, hidden.contiguous(), group=groups.tensor)
            return whole
        return hidden

    def _run(
        self,
        chunk: LanguageModel,
        tokens_S: Tensor,
        positions_S: Tensor,
        runs: tuple[Run, ...],
        cache: KVCache,
        hidden: Tensor | None,
    ) -> Tensor:
        chunk.set_input_tensor(hidden)
        return chunk.run(tokens_S, positions_S, chunk.pack(runs, positions_S, cache))

    def _rollouts(
        self,
        prompts: list[Prompt],
        places: list[int],
        copies: int,
        tokens: NDArray[np.int64],
        log_probs: NDArray[np.float32],
    ) -> list[tuple[int, Rollout]]:
        """Cut each row of sampled tokens [responses, limit] behind its first stop token."""
        is_end = np.isin(tokens, sorted(self._tokenizer.eos_ids))
        stopped = np.asarray(is_end.any(axis=1))
        counts = np.where(stopped, is_end.argmax(axis=1) + 1, tokens.shape[1])
        version = self._weight_version()
        result = []
        for slot, (place, count, stop) in enumerate(zip(places, counts, stopped, strict=True)):
            prompt = prompts[slot // copies]
            ids = tokens[slot, :count].copy()
            rollout = Rollout(
                prompt_id=prompt.prompt_id,
                group_id=place // copies,
                prompt_token_ids=prompt.token_ids,
                response_token_ids=ids,
                sampler_log_probs=log_probs[slot, :count].copy(),
                finish_reason="stop" if stop else "length",
                weight_version=version,
                prompt=prompt.text,
                response=self._tokenizer.decode_response(ids),
                answer=prompt.answer,
            )
            result.append((place, rollout))
        return result
