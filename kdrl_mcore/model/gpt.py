"""Build this rank's shard of a Megatron-Core GPT model from an architecture, with uninitialised parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from kdrl_mcore.config import LoraConfig, ModelConfig
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.activations import KEEP_ALL, Activations
from kdrl_mcore.model.attention import PackedSequences, pack_attention
from kdrl_mcore.model.expert_replay import ExpertReplay
from kdrl_mcore.model.families.base import Architecture
from kdrl_mcore.model.kv_cache import KVCache
from kdrl_mcore.model.layer_spec import block_spec, transformer_config, uses_transformer_engine
from kdrl_mcore.model.linear import pack, product
from kdrl_mcore.model.lora import ADAPTER, Adapter, add_adapters
from kdrl_mcore.model.offload import ActivationOffload
from kdrl_mcore.model.rope import RotaryFrequencies, rotary_frequencies
from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.context import ContextShard
from kdrl_mcore.parallel.layout import Layout, ModelGroups
from kdrl_mcore.parallel.packing import PackedBatch, SequenceRun
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.vocab_parallel import VocabShard


class LanguageModel(GPTModel):
    """Megatron-Core's GPT model, ending in hidden states, from which `vocab_parallel` computes log-probs and losses.

    The last stage returns the normalised hidden states [S (/tp under sequence parallelism), 1, H], other stages the input of
    the next one.

    Attributes:
        packed_head: while the model generates, the output head from `linear.pack`.
    """

    def __init__(
        self,
        architecture: Architecture,
        groups: ModelGroups,
        config: TransformerConfig,
        layers: TransformerBlockSubmodules,
        frequencies: tuple[RotaryFrequencies, ...],
        *,
        vocab_size: int,
        vp_stage: int | None,
    ) -> None:
        """One chunk of the model with uninitialised parameters.

        Args:
            config: what Megatron-Core reads of the architecture and the layout.
            layers: the modules of this chunk's layers.
            frequencies: those of each of the architecture's rotary embeddings.
            vocab_size: the number of real tokens.
            vp_stage: which of this rank's virtual pipeline stages it is; None without them.
        """
        layout, stage = groups.layout, vp_stage or 0
        super().__init__(
            config=config,
            transformer_layer_spec=layers,
            vocab_size=padded_vocab_size(architecture.vocab_size, layout.tensor),
            max_sequence_length=architecture.max_positions,
            pre_process=groups.pipeline.rank() == 0 and stage == 0,
            post_process=groups.is_last_stage and stage == (layout.virtual_pipeline or 1) - 1,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="none",
            pg_collection=groups.groups,
            vp_stage=vp_stage,
        )
        self.architecture, self.frequencies = architecture, frequencies
        self.shard = vocab_shard(architecture, groups, vocab_size)
        self.context_group = groups.context if layout.context > 1 else None
        self.packed_head: Tensor | None = None
        self._head_pre_hook: Callable[[], None] | None = None
        if self.pre_process and architecture.embedding_scale != 1:
            _scale_output(self.embedding, architecture.embedding_scale)

    def run(self, tokens_S: Tensor, positions_S: Tensor, packed: PackedSequences) -> Tensor:
        """Run one packed micro-batch through this chunk's layers."""
        return self(input_ids=tokens_S[None], position_ids=positions_S[None], attention_mask=None, packed_seq_params=packed)

    def pack(self, runs: tuple[SequenceRun, ...], positions_S: Tensor, cache: KVCache) -> PackedSequences:
        """Describe packed sequences, each held whole by this rank, to this model's attention for generation."""
        return self._describe(runs, positions_S, cache=cache)

    def pack_batch(self, batch: PackedBatch) -> PackedSequences:
        """Describe a micro-batch, or this context-parallel rank's part of it, to this model's attention."""
        context = None
        if batch.context_rows is not None:
            assert self.context_group is not None
            context = ContextShard(self.context_group, batch.context_rows)
        return self._describe(batch.runs, batch.positions_S, context=context, key_rows=batch.key_rows)

    def _describe(
        self,
        runs: tuple[SequenceRun, ...],
        positions_S: Tensor,
        *,
        context: ContextShard | None = None,
        key_rows: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> PackedSequences:
        head_dim, dtype = self.architecture.head_dim, self.config.params_dtype
        return pack_attention(runs, positions_S, self.frequencies, dtype, head_dim, context, key_rows, cache)

    def run_batch(self, batch: PackedBatch) -> Tensor:
        """`run` on a micro-batch."""
        return self.run(batch.tokens_S, batch.positions_S, self.pack_batch(batch))

    def head_weight(self) -> Tensor:
        """The output head [V/tp, H] of the last stage (the embedding's weight where they are tied). It is read outside its
        module, so none of that module's hooks run except the one from `register_head_pre_hook`."""
        if self._head_pre_hook is not None:
            self._head_pre_hook()
        return (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        )

    def head_inputs(self, hidden_SH: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `vocab_parallel`'s heads take: the hidden states, the head's weight, and B of its adapter; with an adapter that
        is on, the hidden states [S, H + R] end in their products with its A. No communication."""
        weight_VH, adapter = self.head_weight(), self._head_adapter()
        if adapter is None:
            return hidden_SH, weight_VH, None
        return torch.cat((hidden_SH, adapter.low(hidden_SH)), dim=-1), weight_VH, adapter.factors[0].b

    def _head_adapter(self) -> Adapter | None:
        adapter: Adapter | None = getattr(self.output_layer, ADAPTER, None)
        return adapter if adapter is not None and adapter.enabled else None

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, H] -> this rank's columns of the logits [N, V/tp], without gradients."""
        logits = product(hidden_NH, self.head_weight() if self.packed_head is None else self.packed_head)
        adapter = self._head_adapter()
        return logits if adapter is None else logits + adapter.low(hidden_NH) @ adapter.factors[0].b.T

    def pack_head(self) -> None:
        """Make `packed_head`, unless it exists or another stage has the output head."""
        if self.post_process and self.packed_head is None:
            self.packed_head = pack(self.head_weight())

    def unpack_head(self) -> None:
        """Drop `packed_head`."""
        self.packed_head = None

    def register_head_pre_hook(self, hook: Callable[[], None]) -> None:
        """Register a function that is called each time before the weight of the output head is read."""
        self._head_pre_hook = hook

    def _postprocess(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        """Multiply the hidden states by the scale of the logits, so that their product with the head is the model's logits."""
        scale = self.architecture.logit_scale
        return hidden_states * scale if self.post_process and scale != 1 else hidden_states


@dataclass(frozen=True)
class ModelParts:
    """This rank's share of a model: one chunk per virtual pipeline stage.

    Attributes:
        share_prompts: whether responses to equal prompts share the prompt's rows in a micro-batch.
        replay: records and replays the experts of its tokens; None unless it was asked for.
    """

    chunks: list[LanguageModel]
    config: TransformerConfig
    architecture: Architecture
    groups: ModelGroups
    share_prompts: bool = False
    replay: ExpertReplay | None = None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of this rank."""
        for chunk in self.chunks:
            yield from chunk.parameters()


def expert_parameters(chunk: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of this rank's experts in a model chunk."""
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            yield parameter


CORRECTION_BIAS = "expert_bias"
"""Megatron-Core's name for the correction bias of a router, which is a buffer."""


def correction_biases(chunk: nn.Module) -> Iterator[Tensor]:
    """The correction biases of the routers in a model chunk."""
    for name, buffer in chunk.named_buffers():
        if name.endswith(f".{CORRECTION_BIAS}"):
            yield buffer


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """The vocabulary size rounded up to a multiple of the tensor-parallel size."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel


def build_model(
    architecture: Architecture,
    model: ModelConfig,
    groups: ModelGroups,
    *,
    vocab_size: int,
    activations: Activations = KEEP_ALL,
    share_prompts: bool = False,
    lora: LoraConfig | None = None,
    replay_experts: bool = False,
    trainable: bool,
) -> ModelParts:
    """Build this rank's chunks with uninitialised parameters.

    Args:
        vocab_size: the number of real tokens; no softmax includes the columns beyond it.
        activations: which activations the backward pass recomputes, and which wait for it in host memory.
        share_prompts: see `ModelParts`; attention is then ours instead of Transformer Engine's.
        lora: the adapters, the only parameters that then have gradients; None for a model without adapters.
        replay_experts: whether its routers can take the experts that a sampler chose.
        trainable: False builds a model without gradients, which only scores.

    Raises:
        ConfigError: the layout does not fit the architecture, or the architecture lacks an activation to recompute or off-load.
    """
    check_layout(architecture, groups.layout, trainable=trainable)
    if replay_experts and architecture.experts is None:
        raise ConfigError(f"rollout.replay_experts=true, but {architecture.family} has no experts: set it to false")
    activations.check(architecture, transformer_engine=uses_transformer_engine(model))
    config = transformer_config(architecture, model, groups, activations)
    frequencies = tuple(rotary_frequencies(rope, architecture.head_dim, device()) for rope in architecture.rotary_embeddings)
    virtual = groups.layout.virtual_pipeline
    vp_stages: Sequence[int | None] = range(virtual) if virtual else (None,)
    chunks = []
    for vp_stage in vp_stages:
        layers = block_spec(
            model, architecture, config, groups, vp_stage, share_prompts=share_prompts, separate_norms=lora is not None
        )
        chunk = LanguageModel(architecture, groups, config, layers, frequencies, vocab_size=vocab_size, vp_stage=vp_stage)
        chunk.requires_grad_(trainable).train(trainable)
        mcore.mark_tensor_parallel(chunk)
        for parameter in expert_parameters(chunk):
            # Megatron sets this only where expert-parallel size > 1. Here the ranks of a tensor-parallel group hold whole
            # experts too, so experts' gradients are always summed over the expert-data-parallel group.
            parameter.allreduce = False  # type: ignore[attr-defined]
        if lora is not None:
            add_adapters(chunk, lora, groups)
        chunks.append(chunk.to(device()))
    if activations.offload and torch.cuda.is_available():
        offload = ActivationOffload(activations.min_elements)
        for chunk in chunks:
            offload.attach(chunk.decoder.layers, activations.offload)
    replay = ExpertReplay(chunks, architecture, groups) if replay_experts else None
    return ModelParts(chunks, config, architecture, groups, share_prompts, replay)


def _scale_output(embedding: nn.Module, scale: float) -> None:
    """Have the embeddings multiplied by `scale`, rounded to their dtype as in `transformers`."""
    embedding.register_forward_hook(lambda module, inputs, output: output * torch.tensor(scale, dtype=output.dtype).item())


def vocab_shard(architecture: Architecture, groups: ModelGroups, vocab_size: int) -> VocabShard:
    """The columns of the vocabulary that this tensor-parallel rank holds."""
    share = padded_vocab_size(architecture.vocab_size, groups.layout.tensor) // groups.layout.tensor
    start = groups.tensor.rank() * share
    return VocabShard(group=groups.tensor, start=start, stop=start + share, size=vocab_size)


def check_layout(architecture: Architecture, layout: Layout, *, trainable: bool) -> None:
    """Raise ConfigError if the architecture cannot be split over this layout."""
    chunks = layout.pipeline * (layout.virtual_pipeline or 1)
    experts = architecture.experts
    if experts is None and layout.expert > 1:
        raise ConfigError(f"parallel.expert={layout.expert}, but {architecture.family} has no experts: set it to 1")
    if experts is not None and trainable and layout.tensor > 1 and not layout.sequence_parallel:
        raise ConfigError("a mixture of experts with parallel.tensor > 1 trains only with parallel.sequence_parallel=true")
    for name, size, by in (
        ("attention heads", architecture.num_attention_heads, layout.tensor),
        ("MLP width", architecture.ffn_hidden_size if architecture.has_mlps else 0, layout.tensor),
        ("shared experts' width", experts.shared_ffn_hidden_size if experts else 0, layout.tensor),
        ("experts", experts.count if experts else 0, layout.expert),
        ("layers", architecture.num_layers, chunks),
    ):
        if size % by:
            raise ConfigError(
                f"the model's {name} ({size}) cannot be divided by {by}: change the tensor, expert or pipeline parallel size"
            )
    kv, tensor = architecture.num_key_value_heads, layout.tensor
    if architecture.qk_norm_of_all_heads and tensor > kv:
        raise ConfigError(
            f"{architecture.family} normalises keys over all heads, so tensor parallel size {tensor} may be at most its {kv} "
            "key/value heads"
        )
    if kv % tensor and tensor % kv:
        raise ConfigError(f"{kv} key/value heads do not fit tensor parallel size {tensor}: one must divide the other")
