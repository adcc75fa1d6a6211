"""Seconds of forward and backward passes, and of generation. docs/planning.md has the equations and their sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from kdrl_mcore.planning.memory import engine_cache_bytes
from kdrl_mcore.planning.rates import CACHE_SHARE, CPU, FLOP, HOST, LATENCY, LAUNCH, MEMORY, MESSAGE, NETWORK, Rates, Seconds
from kdrl_mcore.planning.setup import Placed, Setup
from kdrl_mcore.planning.workload import Packing

LAYER_KERNELS = 40
"""Kernels in one layer's forward pass, counted in a decoding step of the embedded engine in bfloat16 (without views): 4 matrix
products, attention, 2 norms, 12 for the rotary embedding, biases, SwiGLU, residuals, casts, the cache. Twice that backward."""
EAGER_LAUNCH = 15e-6
"""Seconds from one kernel to the next in a decoding step of the embedded engine, where Python modules launch them one by one.
On a small cloud CPU 22 us were measured (40 kernels, 0.9 ms per layer); servers' CPUs are assumed to be faster."""
EAGER_STEP = 2e-3
"""Seconds of one decoding step of the embedded engine outside the layers: 57 kernels for positions, head and sampling (1 ms on
the same CPU), and a wait for the GPU, which is then idle until the next layer is launched."""
ENGINE_STEP = 8e-3
"""Seconds of one decoding step of vLLM outside the model: scheduling, sampling with log-probs, detokenisation of a few hundred
sequences."""
FUSED_HEAD = {False: 2, True: 6}
"""Bytes read and written per logit in bfloat16, besides the matrix products, in scoring (False) and in training (True): the
kernels read it for the statistics, and in training read it again and write the derivative."""
MATERIALISED_HEAD = {False: 46, True: 68}
"""The same if log-softmax runs one float32 kernel per operation: convert, maximum, subtract, exponential, sum, subtract,
exponential; in training also negate, scale, convert (counted in NeMo-RL's `DistributedLogprob`)."""
GRID = 64
"""The number of points at which the progress of a decode is evaluated."""


def layer_forward(model: Placed, rates: Rates, attended: float, *, overlap_tensor: bool = False) -> Seconds:
    """The seconds of one token's forward pass through one layer on one rank.

    Args:
        attended: the mean number of tokens that a token attends to.
        overlap_tensor: whether tensor-parallel communication is hidden behind matrix products.
    """
    a, layout, bytes_ = model.architecture, model.layout, model.element
    held = model.shard.stages[0]
    width = fmean(a.active_ffn_size(layer) for layer in range(a.num_layers))
    heads = (a.num_attention_heads + a.num_key_value_heads) * a.head_dim
    split = layout.tensor if layout.sequence_parallel else 1
    touched = 10 * a.hidden_size / split + (2 * heads + 3 * width) / layout.tensor
    if rates.fp8:  # each product's input is read once more and written twice (plain and transposed), at a byte per element
        touched += (2 * a.hidden_size + heads + width) / layout.tensor * (bytes_ + 2) / bytes_
    seconds = Seconds()
    seconds[FLOP] = rates.matmul(2 * held.layer_matrices)
    seconds[FLOP] += rates.attention(4 * a.num_attention_heads * a.head_dim / layout.tensor * attended)
    seconds[MEMORY] = rates.memory(touched * bytes_)
    if not overlap_tensor:
        seconds[NETWORK] = 4 * rates.ring(a.hidden_size * bytes_, layout.tensor, 1)
    keys = 2 * max(1, a.num_key_value_heads // layout.tensor) * a.head_dim * bytes_
    seconds[NETWORK] += rates.ring(keys * layout.context, layout.context, layout.tensor)
    seconds[NETWORK] += _dispatch(model, rates)
    return seconds


def _dispatch(model: Placed, rates: Rates) -> float:
    """The seconds in which a token goes to its experts and back, over the expert-parallel ranks: the mean of all layers."""
    a, layout = model.architecture, model.layout
    if a.experts is None or layout.expert == 1:
        return 0.0
    sent = 2 * a.experts.per_token * a.hidden_size * model.element / layout.tensor * (layout.expert - 1) / layout.expert
    return rates.link(sent, layout.expert, 1) * fmean(a.has_experts(layer) for layer in range(a.num_layers))


def layer_backward(model: Placed, rates: Rates, attended: float, *, overlap_tensor: bool = False) -> Seconds:
    """The seconds of the backward pass: two products for each one in the forward pass (one, with a frozen weight), in flash
    attention five for two. Under sequence parallelism the inputs are gathered again for the weight gradients."""
    forward = layer_forward(model, rates, attended, overlap_tensor=overlap_tensor)
    a = model.architecture
    attention = rates.attention(4 * a.num_attention_heads * a.head_dim / model.layout.tensor * attended)
    backward = 2 * forward
    backward[FLOP] += 0.5 * attention
    held = model.shard.stages[0]
    if held.adapters:
        backward[FLOP] -= rates.matmul(2 * (held.layer_matrices - (held.adapters - held.expert_adapters) // held.layers))
    gathers_again = model.layout.sequence_parallel and not held.adapters
    backward[NETWORK] = forward[NETWORK] * (1.5 if gathers_again else 1.0)
    return backward


def recomputed_forward(model: Placed, rates: Rates, attended: float, modules: Sequence[str]) -> Seconds:
    """The seconds of one token through those parts of a layer that selective recompute runs again."""
    a, layout, bytes_ = model.architecture, model.layout, model.element
    split = layout.tensor if layout.sequence_parallel else 1
    seconds, touched = Seconds(), 0.0
    if "core_attn" in modules:
        seconds[FLOP] += rates.attention(4 * a.num_attention_heads * a.head_dim / layout.tensor * attended)
        keys = 2 * max(1, a.num_key_value_heads // layout.tensor) * a.head_dim * bytes_
        seconds[NETWORK] += rates.ring(keys * layout.context, layout.context, layout.tensor)
        touched += 2 * (a.num_attention_heads + a.num_key_value_heads) * a.head_dim / layout.tensor
    if "layernorm" in modules:
        touched += 4 * a.hidden_size / split
    if "moe_act" in modules:
        touched += 3 * fmean(a.active_ffn_size(layer) * a.has_experts(layer) for layer in range(a.num_layers)) / layout.tensor
    again = [layer for layer in range(a.num_layers) if ("moe" if a.has_experts(layer) else "mlp") in modules]
    width = sum(a.active_ffn_size(layer) for layer in again) / a.num_layers
    seconds[FLOP] += rates.matmul(2 * 3 * a.hidden_size * width / layout.tensor)
    touched += 2 * a.hidden_size / split * len(again) / a.num_layers + 3 * width / layout.tensor
    if "moe" in modules:  # experts lie whole on their ranks
        seconds[NETWORK] += _dispatch(model, rates)
    dense = sum(not a.has_experts(layer) for layer in again)
    seconds[NETWORK] += 2 * rates.ring(a.hidden_size * bytes_, layout.tensor, 1) * dense / a.num_layers
    seconds[MEMORY] += rates.memory(touched * bytes_)
    return seconds


def pipeline_pass(setup: Setup, model: Placed, packed: Packing, loss_tokens: float, *, train: bool) -> Seconds:
    """The seconds of all micro-batches through all stages, forward and, in training, backward.

    The slowest stage works through all of them; filling and draining the pipeline takes pipeline - 1 micro-batches of an
    average stage, divided by the number of chunks if it is interleaved (arXiv 2104.04473).

    Args:
        loss_tokens: rows of the output head on the most loaded rank.
    """
    rates, overlap = Rates(setup.cluster, setup.choices.fp8), setup.choices.overlap_tensor
    attended, layout = setup.workload.attended(setup.sharing), model.layout
    forward = layer_forward(model, rates, attended, overlap_tensor=overlap)
    layer, kernels = forward, LAYER_KERNELS
    if train:
        parallel = setup.config.parallel
        backward = layer_backward(model, rates, attended, overlap_tensor=overlap)
        kernels *= 3
        if parallel.recompute == "full":
            backward, kernels = backward + forward, kernels + LAYER_KERNELS
        elif parallel.recompute == "selective":
            again = recomputed_forward(model, rates, attended, parallel.recompute_modules)
            backward, kernels = backward + again, kernels + LAYER_KERNELS // 2
        layer = forward + backward
        if model.shard.layer.host:  # each way during one layer's work
            copy = rates.host(model.shard.layer.host)
            layer[HOST] += max(0.0, copy - forward.total) + max(0.0, copy - backward.total)
    stages = []
    for stage in model.shard.stages:
        seconds = layer * (stage.layers * packed.tokens)
        seconds[LATENCY] += (packed.stall - 1) * seconds.total
        launch = stage.layers * kernels * LAUNCH * packed.micro_batches
        seconds[LATENCY] = max(seconds[LATENCY], launch - seconds.total + seconds[LATENCY])
        # The head keeps the parameters' type, also with FP8.
        products = 1 if not train else 2 if stage.adapters else 3
        seconds[FLOP] += Rates(setup.cluster).matmul(2 * products * stage.head * loss_tokens)
        if stage.head:
            traffic = (FUSED_HEAD if setup.choices.fused_head else MATERIALISED_HEAD)[train]
            seconds[MEMORY] += rates.memory(traffic * model.shard.columns * loss_tokens)
        stages.append(seconds)
    slowest = max(stages, key=lambda seconds: seconds.total)
    mean = sum(seconds.total for seconds in stages) / len(stages) / packed.micro_batches
    slowest[LATENCY] += (layout.pipeline - 1) / (layout.virtual_pipeline or 1) * mean
    if layout.pipeline > 1 and layout.virtual_pipeline is None:  # an interleaved schedule hides them
        sent = model.architecture.hidden_size * model.element / (layout.tensor if layout.sequence_parallel else 1)
        stride = layout.world_size // layout.pipeline
        slowest[NETWORK] += (2 if train else 1) * packed.tokens * rates.link(sent, 2, stride)
    return slowest


@dataclass(frozen=True)
class Generation:
    """The time of generation on the most loaded replica.

    Attributes:
        at_once: the share of the responses that run from the start.
        waiting: the time in which responses wait to be started.
        last: the time of the prompts' forward pass, and of the last responses that run together.
    """

    at_once: float
    waiting: Seconds
    last: Seconds

    @property
    def seconds(self) -> Seconds:
        """The whole time."""
        return self.waiting + self.last


def generation(setup: Setup) -> Generation:
    """The time of the most loaded replica's prompts and responses."""
    return _engine_generation(setup) if setup.engine is not None else Generation(1.0, Seconds(), _embedded_generation(setup))


def _embedded_generation(setup: Setup) -> Seconds:
    """Waves of `max_sequences`, each as long as its longest response; pipeline stages work one after another."""
    model, rollout = setup.student, setup.config.rollout
    lengths = setup.workload.share(model.layout.data * model.layout.context)
    responses = rollout.responses_per_prompt
    wave = max(1, rollout.max_sequences // responses) * responses
    seconds = Seconds()
    count = -(-len(lengths) // wave)
    for first in range(count):
        seconds += _decode(setup, model, lengths[first::count], embedded=True)
    return seconds + _prefill(setup, model, len(lengths) / responses)


def _engine_generation(setup: Setup) -> Generation:
    """As many sequences run at once as fit into the KV cache. While others wait, their number is constant; then the last ones
    run to their ends."""
    assert setup.engine is not None
    model = setup.engine
    lengths = setup.workload.share(model.layout.data)
    per_token = model.shard.stages[0].layers * model.shard.kv_bytes
    # A running response is half done on average.
    held = setup.workload.prompt_tokens + float(lengths.mean()) / 2
    capacity = engine_cache_bytes(setup) / per_token / held
    at_once = int(max(1, min(len(lengths), setup.config.rollout.max_sequences, capacity)))
    last = lengths[:: max(1, round(len(lengths) / at_once))][:at_once]
    steps = (float(lengths.sum()) - float(last.sum())) / at_once
    waiting = _step(setup, model, at_once, held, embedded=False) * max(0.0, steps)
    prompts = _prefill(setup, model, len(lengths) / setup.config.rollout.responses_per_prompt)
    return Generation(at_once / len(lengths), waiting, prompts + _decode(setup, model, last, embedded=False))


def _decode(setup: Setup, model: Placed, lengths: NDArray[np.int64], *, embedded: bool) -> Seconds:
    """The time in which these sequences, started together, are all completed."""
    seconds, longest = Seconds(), int(lengths.max())
    for point in range(GRID):
        done = (point + 0.5) / GRID * longest
        running = int((lengths > done).sum())
        step = _step(setup, model, running, setup.workload.prompt_tokens + done, embedded=embedded)
        seconds += step * (longest / GRID)
    return seconds


def _step(setup: Setup, model: Placed, running: float, context: float, *, embedded: bool) -> Seconds:
    """The time for one token of each running sequence: weights and cache are read once; for few sequences, reading the weights
    hides the matrix products."""
    rates, layout, a = Rates(setup.cluster), model.layout, model.architecture
    layers = sum(stage.layers for stage in model.shard.stages)
    weights = sum(
        stage.parameters - stage.embedding - idle_experts(model, stage.experts, running) for stage in model.shard.stages
    )
    weights *= model.element
    matrices = sum(stage.layers * stage.layer_matrices + stage.head for stage in model.shard.stages)
    flop, read = rates.matmul(2 * matrices * running), rates.memory(weights)
    seconds = Seconds()
    seconds[FLOP if flop > read else MEMORY] += max(flop, read)
    seconds[MEMORY] += rates.memory(running * context * layers * model.shard.kv_bytes, CACHE_SHARE)
    if layout.tensor > 1:
        seconds[LATENCY] += 2 * layers * MESSAGE
        seconds[NETWORK] += 4 * layers * rates.ring(running * a.hidden_size * model.element, layout.tensor, 1)
    seconds[LATENCY] += 2 * MESSAGE * (layout.pipeline - 1) * (layout.virtual_pipeline or 1)
    if embedded:
        seconds[LATENCY] += max(0.0, layers * LAYER_KERNELS * EAGER_LAUNCH - seconds.total)
    seconds[CPU] += EAGER_STEP if embedded else ENGINE_STEP
    return seconds


def idle_experts(model: Placed, experts: int, running: float) -> float:
    """The number of weights in a stage's experts to which no running sequence is routed, assuming uniform routing."""
    mixture = model.architecture.experts
    return 0.0 if mixture is None else experts * (1 - mixture.per_token / mixture.count) ** running


def _prefill(setup: Setup, model: Placed, prompts: float) -> Seconds:
    """The time of the prompts' forward pass, once for all responses of a group."""
    layers = sum(stage.layers for stage in model.shard.stages)
    tokens = prompts * setup.workload.prompt_tokens
    return layer_forward(model, Rates(setup.cluster), setup.workload.prompt_tokens / 2) * (layers * tokens)
