"""Build this rank's shard of a Megatron-Core GPT model from an architecture, with uninitialised parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn
from torch.nn import functional as F

from kdrl_mcore.config import LoraConfig, ModelConfig
from kdrl_mcore.config.derived import asks_for_transformer_engine
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.activations import KEEP_ALL, Activations
from kdrl_mcore.model.attention import PackedDotProductAttention, PackedSelfAttention, PackedSequences, pack_attention
from kdrl_mcore.model.families.base import Architecture
from kdrl_mcore.model.kv_cache import KVCache
from kdrl_mcore.model.layer import NormsAfterLayer, scaled_add
from kdrl_mcore.model.linear import ColumnParallel, RowParallel, product
from kdrl_mcore.model.lora import add_adapters
from kdrl_mcore.model.norm import RMSNorm
from kdrl_mcore.model.offload import ActivationOffload
from kdrl_mcore.model.rope import RotaryFrequencies, rotary_frequencies
from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.context import ContextShard
from kdrl_mcore.parallel.dtypes import DTYPES
from kdrl_mcore.parallel.layout import Layout, ModelGroups
from kdrl_mcore.parallel.packing import PackedBatch, SequenceRun
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.vocab_parallel import VocabShard


class LanguageModel(GPTModel):
    """Megatron-Core's GPT model, ending in hidden states, from which `vocab_parallel` computes log-probs and losses.

    The last stage returns the normalised hidden states [S (/tp under sequence parallelism), 1, H], other stages the input of
    the next one.

    Attributes:
        packed_head: while it generates, the output head from `linear.pack`.
    """

    architecture: Architecture
    shard: VocabShard
    context_group: dist.ProcessGroup | None
    frequencies: tuple[RotaryFrequencies, ...]
    packed_head: Tensor | None = None
    _head_pre_hook: Callable[[], None] | None = None

    def run(self, tokens_S: Tensor, positions_S: Tensor, packed: PackedSequences) -> Tensor:
        """One packed micro-batch through this chunk's layers."""
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
        module, so no hook of that module runs except the one from `register_head_pre_hook`."""
        if self._head_pre_hook is not None:
            self._head_pre_hook()
        return (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        )

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, H] -> this rank's columns of the logits [N, V/tp], without gradients."""
        return product(hidden_NH, self.head_weight() if self.packed_head is None else self.packed_head)

    def register_head_pre_hook(self, hook: Callable[[], None]) -> None:
        """Register a function that is called each time before the weight of the output head is read."""
        self._head_pre_hook = hook

    def _postprocess(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        """Hidden states take the scale of the logits, so that whoever multiplies them with the head has the model's logits."""
        scale = self.architecture.logit_scale
        return hidden_states * scale if self.post_process and scale != 1 else hidden_states


@dataclass(frozen=True)
class ModelParts:
    """This rank's share of a model: one chunk per virtual pipeline stage.

    Attributes:
        share_prompts: in its micro-batches, responses to equal prompts share the prompt's rows.
    """

    chunks: list[LanguageModel]
    config: TransformerConfig
    architecture: Architecture
    groups: ModelGroups
    share_prompts: bool = False

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of this rank."""
        for chunk in self.chunks:
            yield from chunk.parameters()


def expert_parameters(chunk: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of this rank's experts in a model chunk."""
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            yield parameter


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
    trainable: bool,
) -> ModelParts:
    """Build this rank's chunks with uninitialised parameters.

    Args:
        vocab_size: the number of real tokens; no softmax includes the columns beyond it.
        activations: what the backward pass recomputes and what waits for it in host memory.
        share_prompts: see `ModelParts`; it takes our attention instead of Transformer Engine's.
        lora: the adapters, of which alone the gradients are computed; None for a model without.
        trainable: False builds a model without gradients, which only scores.

    Raises:
        ConfigError: the layout does not fit the architecture, or an activation to recompute or off-load does not exist in it.
    """
    check_layout(architecture, groups.layout, trainable=trainable)
    activations.check(architecture, transformer_engine=uses_transformer_engine(model))
    config = transformer_config(architecture, model, groups, activations)
    layout = groups.layout
    chunks = []
    for stage in range(layout.virtual_pipeline or 1):
        vp_stage = stage if layout.virtual_pipeline else None
        first = groups.pipeline.rank() == 0 and stage == 0
        last = groups.is_last_stage and stage == (layout.virtual_pipeline or 1) - 1
        chunk = LanguageModel(
            config=config,
            transformer_layer_spec=_block_spec(
                model, architecture, config, groups, vp_stage, share_prompts=share_prompts, separate_norms=lora is not None
            ),
            vocab_size=padded_vocab_size(architecture.vocab_size, layout.tensor),
            max_sequence_length=architecture.max_positions,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="none",
            pg_collection=groups.groups,
            vp_stage=vp_stage,
        )
        chunk.architecture = architecture
        chunk.shard = vocab_shard(architecture, groups, vocab_size)
        chunk.context_group = groups.context if layout.context > 1 else None
        chunk.frequencies = tuple(
            rotary_frequencies(rope, architecture.head_dim, device()) for rope in architecture.rotary_embeddings
        )
        if first and architecture.embedding_scale != 1:
            _scale_output(chunk.embedding, architecture.embedding_scale)
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
    return ModelParts(chunks, config, architecture, groups, share_prompts)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": _gelu_tanh}


def _scale_output(embedding: nn.Module, scale: float) -> None:
    """Have the embeddings multiplied by `scale`, rounded to their dtype as in `transformers`."""
    embedding.register_forward_hook(lambda module, inputs, output: output * torch.tensor(scale, dtype=output.dtype).item())


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Whether the layers consist of Transformer Engine's modules.

    Raises:
        ConfigError: the configuration asks for Transformer Engine, which cannot be used in this process.
    """
    asked = asks_for_transformer_engine(model)
    if asked is False:
        return False
    reason = mcore.why_no_transformer_engine()
    if asked and reason is not None:
        raise ConfigError(f"model.spec=transformer_engine, but {reason}: fix that, or use model.spec=auto")
    return reason is None


def vocab_shard(architecture: Architecture, groups: ModelGroups, vocab_size: int) -> VocabShard:
    """The columns of the vocabulary that this tensor-parallel rank holds."""
    share = padded_vocab_size(architecture.vocab_size, groups.layout.tensor) // groups.layout.tensor
    start = groups.tensor.rank() * share
    return VocabShard(group=groups.tensor, start=start, stop=start + share, size=vocab_size)


def transformer_config(
    architecture: Architecture, model: ModelConfig, groups: ModelGroups, activations: Activations
) -> TransformerConfig:
    """Megatron-Core's configuration of the model."""
    layout, dtype = groups.layout, DTYPES[model.dtype]
    mixture: dict[str, Any] = {}
    if architecture.experts is not None:
        mixture = {
            "num_moe_experts": architecture.experts.count,
            "moe_router_topk": architecture.experts.per_token,
            "moe_ffn_hidden_size": architecture.experts.ffn_hidden_size,
            # A softmax over the chosen experts only equals scaling their probabilities to sum to one.
            "moe_router_pre_softmax": not architecture.experts.normalized,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_grouped_gemm": uses_transformer_engine(model),
            "expert_model_parallel_size": layout.expert,
            "expert_tensor_parallel_size": 1,
        }
    return TransformerConfig(
        **mixture,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        layernorm_zero_centered_gamma=architecture.zero_centered_norms,
        qk_layernorm=architecture.qk_norm,  # whose gradients Megatron sums over tensor-parallel ranks
        softmax_scale=architecture.attention_scale,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        gated_linear_unit=True,
        activation_func=_ACTIVATIONS[architecture.activation],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=torch.cuda.is_available() and architecture.activation == "silu",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=True,  # micro-batches differ in length
        # With two interleaved stages the next rank is also the previous one: only separate sends keep their messages apart.
        overlap_p2p_comm=layout.virtual_pipeline is not None,
        batch_p2p_comm=layout.virtual_pipeline is None,
        moe_token_dispatcher_type="alltoall",  # the dispatcher that supports variable lengths
        calculate_per_token_loss=True,  # the loss arrives normalised: Megatron sums it without dividing
        recompute_granularity=None if activations.recompute == "none" else activations.recompute,
        recompute_method="uniform" if activations.recompute == "full" else None,
        recompute_num_layers=1 if activations.recompute == "full" else None,
        recompute_modules=list(activations.modules),
    )


def _block_spec(
    model: ModelConfig,
    architecture: Architecture,
    config: TransformerConfig,
    groups: ModelGroups,
    vp_stage: int | None,
    *,
    share_prompts: bool,
    separate_norms: bool,
) -> TransformerBlockSubmodules:
    """This chunk's layers: Megatron's with our packed attention and, without Transformer Engine, our norm, core attention
    and linear layers.

    Args:
        separate_norms: Transformer Engine's linear layers do not contain the norms before them, whose outputs adapters need.
    """
    use_te = uses_transformer_engine(model)
    layer: ModuleSpec = mcore.layer_submodules(
        use_te, architecture.qk_norm, None if architecture.experts is None else architecture.experts.count
    )
    attention = layer.submodules.self_attention
    attention.module = PackedSelfAttention
    final_norm = None
    if use_te:
        from megatron.core.extensions.transformer_engine import TENorm

        final_norm = TENorm
        if separate_norms:
            mcore.separate_norms(layer, architecture.experts is not None)
    else:
        final_norm = RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        feed_forward = mcore.feed_forward_submodules(layer, architecture.experts is not None)
        attention.submodules.linear_qkv = feed_forward.linear_fc1 = ColumnParallel
        attention.submodules.linear_proj = feed_forward.linear_fc2 = RowParallel
        if architecture.qk_norm:
            attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    if architecture.residual_scale != 1:
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = scaled_add(architecture.residual_scale)
    if architecture.norms != "before":
        layer.module = NormsAfterLayer
    if architecture.norms == "after":
        mcore.drop_norms_before(layer, use_transformer_engine=use_te)
    # Transformer Engine's context parallelism needs every sequence padded; ours cuts the packed sequence. In float32 its
    # attention would also hold the scores of every sequence, padded to the longest. Megatron's wrapper of it has no causal mask
    # for fewer queries than keys, which responses to a shared prompt have.
    float32 = config.params_dtype == torch.float32
    if not use_te or groups.layout.context > 1 or float32 or share_prompts or architecture.has_windows:
        attention.submodules.core_attention = PackedDotProductAttention
    pp_rank = groups.pipeline.rank()
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    layers = [_with_attention(layer, architecture, number) for number in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)


def _with_attention(layer: ModuleSpec, architecture: Architecture, number: int) -> ModuleSpec:
    """A layer's spec with the window and the rotary embedding of layer `number` of the whole model."""
    sees = architecture.attention(number)
    rotary = None if sees.rope is None else architecture.rotary_embeddings.index(sees.rope)
    attention = layer.submodules.self_attention
    submodules = attention.submodules
    if sees.window is not None:
        windowed = ModuleSpec(module=submodules.core_attention, params={"window": sees.window})
        submodules = replace(submodules, core_attention=windowed)
    params = {"rotary": rotary, "window": sees.window, "norm_of_all_heads": architecture.qk_norm_of_all_heads}
    attention = replace(attention, submodules=submodules, params={**attention.params, **params})
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))


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
        ("MLP width", 0 if experts else architecture.ffn_hidden_size, layout.tensor),
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
