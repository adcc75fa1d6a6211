"""Write Megatron's torch_dist format tensor by tensor: lay out all chunks first, then fill in their bytes from many threads;
no tensor is ever held whole.

`torch.save` under `skip_data` writes an archive without the tensor's bytes. It is called once per shape: all chunks of a
shape have the same frame around different bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import skip_data

from kdrl_mcore.convert.byte_ranges import StoredTensor, num_elements
from kdrl_mcore.convert.weight_map import GlobalTensor
from kdrl_mcore.model.families.base import Architecture, moe_layer_freq

FILES = 4
"""How many `.distcp` files chunks are distributed over at a time: threads that write to the same file wait for each other."""
FILE_BYTES = 4 * 10**9
"""New files start after this many bytes."""
_EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "pre_mlp_layernorm",
)
"""Modules of a layer that ask a checkpoint for `_extra_state` (scaling factors of FP8 training, which these weights do not
have) under one of Megatron's layer specs. Each gets an empty one; a spec ignores those that it does not ask for."""
_SHARED_EXPERTS = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
"""Further ones, where there are shared experts."""


class _Frame(io.RawIOBase):
    """Captures the output of `torch.save` under `skip_data`, which seeks over the tensor's bytes."""

    def __init__(self) -> None:
        self.before, self.after, self._seen, self._at = bytearray(), bytearray(), False, 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        written = bytes(data)
        (self.after if self._seen else self.before).extend(written)
        self._at += len(written)
        return len(written)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_CUR and not self._seen, "torch.save seeks once, over the tensor's bytes"
        self._seen = True
        self._at += offset
        return self._at

    def tell(self) -> int:
        return self._at


class TorchDistWriter:
    """A torch_dist folder being written."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._frames: dict[tuple[tuple[int, ...], torch.dtype], _Frame] = {}
        self._metadata: dict = {}
        self._results: list[WriteResult] = []
        self._number = 0
        self._open: list[io.BufferedWriter] = []

    def place(self, tensor: GlobalTensor, start: int, rows: int, dtype: torch.dtype) -> StoredTensor:
        """Lay out one chunk, which is some rows of a tensor. Returns where its bytes belong."""
        sizes = (*(1 for _ in tensor.grid), rows, *tensor.shape[1:])
        offsets = (*tensor.position, start, *(0 for _ in tensor.shape[1:]))
        if (sizes, dtype) not in self._frames:
            frame = _Frame()
            with skip_data():
                torch.save(torch.empty(sizes, dtype=dtype), cast(IO[bytes], frame))
            self._frames[sizes, dtype] = frame
        frame, file = self._frames[sizes, dtype], self._current()
        begin, num_bytes = file.tell(), num_elements(sizes) * dtype.itemsize
        file.write(frame.before)
        data = file.tell()
        file.seek(num_bytes, io.SEEK_CUR)  # a hole, filled in later
        file.write(frame.after)
        if tensor.key not in self._metadata:
            self._metadata[tensor.key] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size((*tensor.grid, *tensor.shape)), []
            )
        self._metadata[tensor.key].chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        self._add(MetadataIndex(tensor.key, torch.Size(offsets)), file, begin)
        return StoredTensor(Path(file.name), data, (rows, *tensor.shape[1:]), dtype)

    def place_extra_states(self, architecture: Architecture) -> None:
        """Add an empty `_extra_state` for every module that may ask for one; all share the same bytes."""
        file, blob = self._current(), io.BytesIO()
        torch.save([None], blob)
        begin = file.tell()
        file.write(blob.getvalue())
        layers, stacked = architecture.num_layers, not architecture.mixes_layers
        names = ["decoder.final_layernorm._extra_state/shard_0_1"]
        for layer in range(layers):
            prefix, place = ("decoder.layers.", f"{layer}_{layers}") if stacked else (f"decoder.layers.{layer}.", "0_1")
            shared = _SHARED_EXPERTS if architecture.experts and architecture.experts.shared_ffn_hidden_size else ()
            names += [f"{prefix}{each}._extra_state/shard_{place}" for each in (*_EXTRA_STATES, *shared)]
            if architecture.experts is not None and architecture.has_experts(layer):
                count = architecture.experts.count
                places = (f"{layer}.{{}}_{layers}.{count}" if stacked else f"{{}}_{count}").format
                names += [
                    f"{prefix}mlp.experts.experts.{linear}._extra_state/shard_{places(expert)}"
                    for linear in ("linear_fc1", "linear_fc2")
                    for expert in range(count)
                ]
        for name in names:
            self._metadata[name] = BytesStorageMetadata()
            self._add(MetadataIndex(name), file, begin)

    def end_layout(self) -> None:
        """Close the files once every chunk is placed; from now on bytes may be filled in."""
        for file in self._open:
            file.close()
        self._open = []

    def finish(self, architecture: Architecture, dtype: torch.dtype) -> None:
        """Write the metadata, which makes the folder a complete checkpoint."""
        self.end_layout()
        torch.save(
            {"args": _megatron_args(architecture, dtype), "checkpoint_version": 3.0, "iteration": 0}, self._folder / "common.pt"
        )
        backends = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (self._folder / "metadata.json").write_text(json.dumps(backends))
        FileSystemWriter(self._folder).finish(Metadata(state_dict_metadata=self._metadata), [self._results])

    def _current(self) -> io.BufferedWriter:
        """The open file with the fewest bytes so far."""
        if not self._open or min(file.tell() for file in self._open) > FILE_BYTES:
            self.end_layout()
            for number in range(self._number, self._number + FILES):
                self._open.append((self._folder / f"__0_{number}.distcp").open("wb"))
            self._number += FILES
        return min(self._open, key=lambda file: file.tell())

    def _add(self, index: MetadataIndex, file: io.BufferedWriter, begin: int) -> None:
        length = file.tell() - begin
        self._results.append(WriteResult(index, length, _StorageInfo(os.path.basename(file.name), begin, length)))


# Arguments that Megatron-Bridge reads without checking that they exist, and that do not apply here or are the reader's choice.
_NOT_USED: dict[str, Any] = {
    **dict.fromkeys(("apply_layernorm_1p", "squared_relu", "init_method_xavier_uniform", "multi_latent_attention"), False),
    **dict.fromkeys(("is_hybrid_model", "qk_l2_norm", "no_persist_layer_norm", "overlap_p2p_comm"), False),
    **dict.fromkeys(("fp8_param_gather", "bias_gelu_fusion", "fp16_lm_cross_entropy", "init_model_with_meta_device"), False),
    **dict.fromkeys(("heterogeneous_layers_config_path", "decoder_first_pipeline_num_layers", "mtp_num_layers", "spec")),
    **dict.fromkeys(("decoder_last_pipeline_num_layers", "moe_grouped_gemm", "moe_use_legacy_grouped_gemm")),
    "bias_swiglu_fusion": True,
    "config_logger_dir": "",
    "cp_comm_type": ["p2p"],
    "transformer_impl": "transformer_engine",
    "tokenizer_type": "NullTokenizer",  # only counts the vocabulary; the tokenizer's files are next to the weights
}


def _megatron_args(architecture: Architecture, dtype: torch.dtype) -> argparse.Namespace:
    """The model as Megatron-LM's arguments, which it and Megatron-Bridge read from a checkpoint."""
    rope, experts = architecture.rope, architecture.experts
    return argparse.Namespace(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        group_query_attention=True,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        max_position_embeddings=architecture.max_positions,
        seq_length=architecture.max_positions,
        norm_epsilon=architecture.norm_epsilon,
        layernorm_epsilon=architecture.norm_epsilon,
        normalization="RMSNorm",
        qk_layernorm=architecture.qk_norm,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        position_embedding_type="yarn" if rope.kind == "yarn" else "rope",
        rotary_base=int(rope.theta) if math.isclose(rope.theta, int(rope.theta)) else rope.theta,
        rotary_percent=rope.share,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=rope.factor if rope.kind == "linear" else None,
        use_rope_scaling=rope.kind == "llama3",
        rope_scaling_factor=rope.factor,
        untie_embeddings_and_output_weights=not architecture.tied_embeddings,
        vocab_size=architecture.vocab_size,
        padded_vocab_size=architecture.vocab_size,
        make_vocab_size_divisible_by=1,
        num_experts=experts.count if experts else None,
        moe_router_topk=experts.per_token if experts else 2,
        moe_ffn_hidden_size=experts.ffn_hidden_size if experts else None,
        moe_router_pre_softmax=bool(experts and not experts.normalized),
        moe_layer_freq=moe_layer_freq(architecture),
        moe_shared_expert_intermediate_size=(experts.shared_ffn_hidden_size or None) if experts else None,
        moe_router_score_function=experts.scoring if experts else "softmax",
        moe_router_enable_expert_bias=bool(experts and experts.corrected),
        moe_router_topk_scaling_factor=experts.scale if experts and experts.scale != 1 else None,
        moe_router_num_groups=experts.groups if experts and experts.groups > 1 else None,
        moe_router_group_topk=experts.groups_per_token if experts and experts.groups > 1 else None,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        **_NOT_USED,
    )
