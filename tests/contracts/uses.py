"""What our code uses of Megatron-Core, vLLM and Transformer Engine, read from its syntax: every name it imports, every
attribute of these that it uses, and every argument it passes.

The class of an object is known if the object is an imported name, an instance of a class with an imported base (`self`), or one
of `RECEIVERS`. Attributes that are written count like those that are read. A dataclass of ours with an imported base is built
like its base, except for the fields that it adds.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from dataclasses import dataclass, field

from tests.support import ROOT

PACKAGES = ("megatron", "vllm", "transformer_engine")

_ENGINE = "vllm.v1.engine.async_llm.AsyncLLM"
_WORKER = "vllm.v1.worker.gpu_worker.Worker"
_GROUPS = "megatron.core.process_groups_config.ProcessGroupCollection"
_CONFIG = "megatron.core.transformer.transformer_config.TransformerConfig"
_ATTENTION = "megatron.core.transformer.attention.SelfAttention"
_TE = "transformer_engine.pytorch"
_OPTIMIZERS = "megatron.core.optimizer"
_DISTRIBUTED_OPTIMIZER = f"{_OPTIMIZERS}.distrib_optimizer.DistributedOptimizer"
_EVERY_OPTIMIZER = (
    _DISTRIBUTED_OPTIMIZER,
    *(f"{_OPTIMIZERS}.optimizer.{name}" for name in ("ChainedOptimizer", "Float16OptimizerWithFloat16Params", "FP32Optimizer")),
)
_DDP = "megatron.core.distributed.DistributedDataParallel"
_SCHEDULES = tuple(
    f"megatron.core.pipeline_parallel.schedules.forward_backward_{kind}"
    for kind in ("no_pipelining", "pipelining_without_interleaving", "pipelining_with_interleaving")
)
_SHARDED = "megatron.core.dist_checkpointing.ShardedTensor"
_QUEUE = "megatron.core.dist_checkpointing.strategies.async_utils.AsyncCallsQueue"

RECEIVERS: dict[str, dict[str, tuple[str, ...]]] = {
    "kdrl_mcore/model/gpt.py": {"self.config": (_CONFIG,)},
    "kdrl_mcore/checkpointing/writer.py": {"self._queue": (_QUEUE,)},
    "kdrl_mcore/model/attention.py": {
        "self.config": (_CONFIG,),
        "self.pg_collection": (_GROUPS,),
        "packed": ("megatron.core.packed_seq_params.PackedSeqParams",),
    },
    "kdrl_mcore/model/layer.py": {"self.config": (_CONFIG,)},
    "kdrl_mcore/parallel/layout.py": {"self.groups": (_GROUPS,), "groups": (_GROUPS,)},
    "kdrl_mcore/rollout/vllm/adapter.py": {
        "self._llm": (_ENGINE,),
        "args": ("vllm.engine.arg_utils.AsyncEngineArgs",),
        "vllm_config": ("vllm.config.VllmConfig",),
        "part": ("vllm.outputs.CompletionOutput",),
    },
    "kdrl_mcore/rollout/vllm/transfer.py": {
        "self.vllm_config": ("vllm.config.VllmConfig",),
        "config": ("vllm.config.ParallelConfig",),
    },
    "kdrl_mcore/parallel/optimizer_state.py": {
        "part": (_DISTRIBUTED_OPTIMIZER,),
        "piece": (_SHARDED,),
        "sharded": (_SHARDED,),
    },
    "kdrl_mcore/student/optimizer.py": {
        "self._config": (_CONFIG,),
        "self.megatron": _EVERY_OPTIMIZER,
        "chunk": (_DDP,),
    },
    "kdrl_mcore/student/student.py": {
        "self.parts.config": (_CONFIG,),
        "mcore.forward_backward_function(layout.pipeline, layout.virtual_pipeline)": _SCHEDULES,
    },
}
"""The classes of expressions whose class the file's syntax does not show."""
UNKNOWN_TYPES = (
    *("_GLOBAL_MEMORY_BUFFER", "__init__", "data", "output_layer", "optimizer"),
    *("tp", "cp", "dp", "pp", "dp_cp", "embd"),
)
"""Attributes whose own attributes are not followed."""
OPTIONAL = (
    "megatron.core.dist_checkpointing.strategies.common.TorchCommonSaveStrategy",
    "transformer_engine.pytorch.cpu_offload.NVTE_CPU_OFFLOAD_V1",
)
"""Names that are used only if a release has them."""

INDIRECT: dict[str, tuple[str, ...]] = {
    # Reload, refit and sleep, in vLLM's worker processes.
    "vllm.v1.executor.abstract.SLEEP_TAGS": (),
    f"{_WORKER}.sleep": ("level",),
    f"{_WORKER}.wake_up": ("tags",),
    **{
        f"{_WORKER}.{name}": arguments
        for name, arguments in {
            "start_weight_update": (),
            "update_weights": ("update_info",),
            "finish_weight_update": (),
        }.items()
    },
    # Adapters, in its worker processes.
    f"{_WORKER}.add_lora": ("lora_request",),
    # Weights that change while responses are unfinished.
    f"{_ENGINE}.pause_generation": ("mode", "clear_cache"),
    f"{_ENGINE}.resume_generation": (),
    f"{_ENGINE}.init_weight_transfer_engine": ("request",),
    f"{_ENGINE}.start_weight_update": (),
    f"{_ENGINE}.update_weights": ("request",),
    f"{_ENGINE}.finish_weight_update": ("weight_version",),
    "vllm.outputs.CompletionOutput.weight_versions": (),
    # What Megatron-Core's specs build, and how it builds it from Transformer Engine.
    **{
        f"megatron.core.extensions.transformer_engine.{name}": ()
        for name in (
            "TEColumnParallelLinear",
            "TEDotProductAttention",
            "TELayerNormColumnParallelLinear",
            "TENorm",
            "TERowParallelLinear",
        )
    },
    f"{_TE}.Linear": (
        "in_features",
        "out_features",
        "sequence_parallel",
        "tp_group",
        "parallel_mode",
        "fuse_wgrad_accumulation",
    ),
    f"{_TE}.LayerNormLinear": (
        "in_features",
        "out_features",
        "normalization",
        "sequence_parallel",
        "tp_group",
        "parallel_mode",
    ),
    f"{_TE}.GroupedLinear": ("num_gemms", "in_features", "out_features", "fuse_wgrad_accumulation"),
    f"{_TE}.RMSNorm": ("hidden_size", "eps", "sequence_parallel"),
    f"{_TE}.DotProductAttention": ("num_attention_heads", "kv_channels", "num_gqa_groups", "attn_mask_type", "tp_group"),
    f"{_TE}.DotProductAttention.forward": ("qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"),
    f"{_TE}.optimizers.FusedAdam": ("lr", "betas", "eps", "weight_decay"),
    # The experts that the sampler chose, replayed.
    "megatron.core.transformer.moe.router_replay.RouterReplay.set_replay_data": ("all_layers_topk_indices",),
    "megatron.core.transformer.moe.router_replay.RouterReplay.set_global_router_replay_action": ("router_replay_action",),
    "megatron.core.transformer.moe.router_replay.RouterReplay.clear_global_indices": (),
}
"""Names that our code depends on without naming them, and the arguments that they must have."""


@dataclass
class Use:
    """How one name is used.

    Attributes:
        files: where.
        calls: the arguments of each call: how many by position, which by keyword, and whether some are unpacked.
        derived: whether we derive a class from it. methods: what that class defines.
    """

    files: set[str] = field(default_factory=set)
    calls: set[tuple[int, frozenset[str], bool]] = field(default_factory=set)
    derived: bool = False
    methods: set[str] = field(default_factory=set)


class Reader(ast.NodeVisitor):
    """Collects the uses in one file's syntax tree."""

    def __init__(self, file: str, uses: dict[str, Use]) -> None:
        self._file, self._uses = file, uses
        self._names: dict[str, tuple[str, ...]] = dict(RECEIVERS.get(file, {}))
        self._dictionaries: dict[str, set[str]] = {}  # keys of the enclosing function's dictionaries, by variable
        self._own: list[tuple[str, set[str]]] = []  # of the enclosing class: its foreign base, and what it defines itself
        self._classes: dict[str, set[str]] = {}  # what each class of the file defines
        self._derived: dict[str, str] = {}  # the foreign base of each of the file's dataclasses that has one
        self._added: dict[str, set[str]] = defaultdict(set)  # by such a base, the fields that are ours

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and node.module.split(".")[0] in PACKAGES and not node.level:
            for alias in node.names:
                self._names[alias.asname or alias.name] = (f"{node.module}.{alias.name}",)
                self._use(f"{node.module}.{alias.name}")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        defined = {child.name for child in node.body if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))}
        fields = {
            child.target.id for child in node.body if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)
        }
        assigned = {
            target.attr
            for child in ast.walk(node)
            if isinstance(child, ast.Assign)
            for targets in child.targets
            for target in (targets.elts if isinstance(targets, ast.Tuple) else [targets])
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
        }
        bases = [path for base in node.bases for path in self._paths(base)]
        for base in bases:
            use = self._use(base)
            use.derived, use.methods = True, use.methods | defined
        if bases and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            self._derived[node.name] = bases[0]
            self._added[bases[0]] |= fields
        inherited = {name for base in node.bases for name in self._classes.get(ast.unparse(base), ())}
        self._classes[node.name] = defined | fields | assigned | inherited
        self._own.append((bases[0] if bases else "", self._classes[node.name]))
        self.generic_visit(node)
        self._own.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self._dictionaries = self._dictionaries, {**self._dictionaries, **_dictionaries(node)}
        self.generic_visit(node)
        self._dictionaries = outer

    def visit_Call(self, node: ast.Call) -> None:
        derived = self._derived.get(ast.unparse(node.func))
        for path in (derived,) if derived else self._paths(node.func):
            unpacked = [word.value for word in node.keywords if word.arg is None]
            keys = {key for value in unpacked for key in self._dictionaries.get(ast.unparse(value), ())}
            keywords = frozenset(word.arg for word in node.keywords if word.arg is not None) | keys
            by_position = sum(not isinstance(arg, ast.Starred) for arg in node.args)
            incomplete = bool(unpacked) or by_position < len(node.args)
            self._use(path).calls.add((by_position, keywords - self._added[path], incomplete))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        for path in self._paths(node):
            self._use(path)
        self.generic_visit(node)

    def _paths(self, node: ast.expr) -> tuple[str, ...]:
        """The full names of what an expression means, where it is foreign."""
        text = ast.unparse(node)
        if text in self._names:
            return self._names[text]
        if not isinstance(node, ast.Attribute):
            return ()
        if isinstance(node.value, ast.Name) and node.value.id == "self" and self._own:
            base, defined = self._own[-1]
            return (f"{base}.{node.attr}",) if base and node.attr not in defined else ()
        owners = self._paths(node.value)
        return tuple(
            f"{owner}.{node.attr}"
            for owner in owners
            if owner.rsplit(".", 1)[1] not in UNKNOWN_TYPES and node.attr not in self._added[owner]
        )

    def _use(self, path: str) -> Use:
        use = self._uses[path]
        use.files.add(self._file)
        return use


def _dictionaries(function: ast.FunctionDef) -> dict[str, set[str]]:
    """The string keys that a function gives each of its dictionaries, by the variable's name."""
    found: dict[str, set[str]] = defaultdict(set)
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            if isinstance(target, ast.Name) and node.value is not None:
                literals = [part for part in ast.walk(node.value) if isinstance(part, ast.Dict)]
                found[target.id] |= {key.value for part in literals for key in part.keys if isinstance(key, ast.Constant)}
            elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                found[ast.unparse(target.value)].add(target.slice.value)
    return found


def uses() -> dict[str, Use]:
    """Every foreign name that the package and its tools use, with how."""
    found: dict[str, Use] = defaultdict(Use)
    for file in sorted([*ROOT.glob("kdrl_mcore/**/*.py"), *ROOT.glob("tools/*.py")]):
        Reader(str(file.relative_to(ROOT)), found).visit(ast.parse(file.read_text()))
    for name, arguments in INDIRECT.items():
        found[name].files.add("tests/contracts/uses.py")
        found[name].calls.add((0, frozenset(arguments), True))
    return {name: use for name, use in found.items() if name not in OPTIONAL}
