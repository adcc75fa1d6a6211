"""A model whose adapters lie apart from it: a PEFT folder, or a checkpoint of a run with `student.lora`, read as one model with
the adapters merged into its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from kdrl_mcore.config import LoraConfig
from kdrl_mcore.convert.byte_ranges import ByteRange
from kdrl_mcore.convert.fingerprint import fingerprint
from kdrl_mcore.convert.folders import STATE_FILE, is_peft_folder, torch_dist_folder
from kdrl_mcore.convert.hf_files import INDEX, KEPT, HFWeights
from kdrl_mcore.convert.peft_files import FACTOR_A, FACTOR_B, read_peft_folder, write_peft_folder
from kdrl_mcore.convert.torch_dist import TorchDistWeights, read_metadata
from kdrl_mcore.convert.weight_map import HEAD, GlobalTensor, TensorSlice
from kdrl_mcore.errors import CheckpointError, ModelError
from kdrl_mcore.model.families import base_of_adapters, config_folder, read_architecture
from kdrl_mcore.parallel.dtypes import DTYPES


class AdaptedWeights:
    """The weights W + scale * B A of a base model and its adapters, computed in float32 as they are read and rounded once. A
    context manager: it keeps the base's files open."""

    def __init__(
        self,
        path: Path,
        base: HFWeights | TorchDistWeights,
        factors: Mapping[str, Tensor],
        scale: float,
        to: torch.dtype | None,
    ) -> None:
        """Args:
            path: where the adapters are.
            factors: A and B by `HF_MODULE.lora_A.weight` and `HF_MODULE.lora_B.weight`; see `read_peft_folder`.
            to: the dtype of the model, to which the base is cast first; None keeps the base's.

        Raises:
            ModelError: a factor belongs to no weight of the base, or has another shape.
        """
        factors = _of_weights(factors)
        self.path, self.names, self.files = path, base.names, base.files
        self._base, self._factors, self._scale, self._to = base, factors, scale, to
        for name in factors:
            module, _, _ = name.rpartition(".lora_")
            a, b = factors.get(module + FACTOR_A), factors.get(module + FACTOR_B)
            if name not in (module + FACTOR_A, module + FACTOR_B) or a is None or b is None:
                raise ModelError(f"{path} has {name}, but not both A and B of a linear layer")
            if f"{module}.weight" not in base.names:
                raise ModelError(f"{path} adapts {module}, which {base.path} does not have")
            product, shape = (b.size(0), a.size(-1)), base.shape(f"{module}.weight")
            if a.dim() != 2 or b.dim() != 2 or b.size(1) != a.size(0) or product != shape:
                raise ModelError(
                    f"{path}: the factors {list(b.shape)} x {list(a.shape)} of {module} do not fit its weight {list(shape)} in "
                    f"{base.path}"
                )

    @property
    def unexpected_keys(self) -> Sequence[str]:
        """See `TorchDistWeights`."""
        return getattr(self._base, "unexpected_keys", [])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._to or self._base.dtype(name)

    def read(self, name: str, start: int, length: int, dim: int = 0) -> Tensor:
        """`length` rows (dim 0) or columns (dim 1) of a tensor, in its dtype."""
        weight = self._base.read(name, start, length, dim).to(self.dtype(name))
        module = name.removesuffix(".weight")
        if module + FACTOR_A not in self._factors:
            return weight
        a, b = self._factors[module + FACTOR_A].float(), self._factors[module + FACTOR_B].float()
        a, b = (a, b.narrow(0, start, length)) if dim == 0 else (a.narrow(1, start, length), b)
        return torch.addmm(weight.float(), b, a, alpha=self._scale).to(weight.dtype)

    def ranges(self, name: str, start: int, length: int) -> list[ByteRange] | None:
        """Where the bytes of these rows lie; None for rows that must be computed."""
        computed = name.removesuffix(".weight") + FACTOR_A in self._factors or self.dtype(name) != self._base.dtype(name)
        return None if computed else self._base.ranges(name, start, length)

    def __enter__(self) -> AdaptedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()


def _of_weights(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors of each weight in HF's files, which hold an expert's gate_proj and up_proj separately: both have the A of the
    common gate_up_proj, and one half each of its B."""
    result: dict[str, Tensor] = {}
    for name, value in factors.items():
        if ".gate_up_proj." not in name:
            result[name] = value
            continue
        halves = (value, value) if name.endswith(FACTOR_A) else value.chunk(2)
        for projection, half in zip(("gate_proj", "up_proj"), halves, strict=True):
            result[name.replace(".gate_up_proj.", f".{projection}.")] = half
    return result


OpenedWeights = HFWeights | TorchDistWeights | AdaptedWeights


def open_weights(path: str | Path, base: str | Path | None = None) -> OpenedWeights:
    """The weights of a model folder: HF's, converted, or adapters (a PEFT folder, or a checkpoint that holds adapters alone),
    which are merged into their base.

    Args:
        base: the base of a checkpoint's adapters, if it is no longer where the run found it.

    Raises:
        ModelError, CheckpointError: the folder is of no such kind, or damaged, or the base is not that of the adapters.
    """
    folder = torch_dist_folder(path)
    if folder is not None and any((Path(path) / name).is_file() for name in ("model.safetensors", INDEX)):
        raise ModelError(f"{path} holds a converted checkpoint and safetensors: remove one of the two")
    if folder is None and is_peft_folder(path):
        lora, factors = read_peft_folder(path)
        return AdaptedWeights(Path(path), _open_whole(base_of_adapters(path)), factors, lora.alpha / lora.rank, None)
    if folder is not None and holds_adapters(folder):
        found = CheckpointAdapters(path, base)
        to = DTYPES[found.dtype]
        return AdaptedWeights(Path(path), _open_whole(found.base), found.factors(), found.lora.alpha / found.lora.rank, to)
    if base is not None:
        raise CheckpointError(f"{path} is a whole model, not adapters: leave out the base {base}")
    return _open_whole(path)


def _open_whole(path: str | Path) -> HFWeights | TorchDistWeights:
    """The weights of an HF folder or a converted one.

    Raises:
        ModelError, CheckpointError: the folder holds adapters, or is damaged.
    """
    folder = torch_dist_folder(path)
    if is_peft_folder(path) or (folder is not None and holds_adapters(folder)):
        raise ModelError(f"{path} holds adapters, and cannot be the base of others: merge them first (kdrl-convert export)")
    if folder is None:
        return HFWeights(path)
    return TorchDistWeights.of_model(folder, read_architecture(path), config_folder(path) / KEPT)


def holds_adapters(folder: Path) -> bool:
    """Whether a torch_dist folder holds adapters, and not the weights that they belong to."""
    return any(".lora_A." in name for name in read_metadata(folder).state_dict_metadata)


class CheckpointAdapters:
    """The adapters in a checkpoint of a run with `student.lora`.

    Attributes:
        lora: their settings.
        base: the folder of the model that they belong to, which is the one that the run began with.
        dtype: the run's `model.dtype`.
    """

    def __init__(self, checkpoint: str | Path, base: str | Path | None = None) -> None:
        """Args:
            base: the base's folder, if it is no longer where the run found it.

        Raises:
            CheckpointError: the checkpoint is damaged, or the base is gone or has another content than the run's.
        """
        self._path = Path(checkpoint)
        try:
            state = json.loads((self._path / STATE_FILE).read_text())
            config, known = state["config"], state["fingerprints"].get("student.path")
            self.lora = LoraConfig(**config["student"]["lora"])
            self.dtype: str = config["model"]["dtype"]
            self.base = str(base or config["student"]["path"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self._path / STATE_FILE} does not describe adapters: {error!r}") from error
        found = fingerprint(self.base)
        if found is None:
            raise CheckpointError(
                f"{checkpoint} holds adapters of {self.base}, which does not exist here: name its folder with --base"
            )
        if found != known:
            raise CheckpointError(
                f"{checkpoint} holds adapters of another model than {self.base} (its weights or tokenizer differ from those "
                "that the run began with): name the right folder with --base"
            )

    def factors(self) -> dict[str, Tensor]:
        """A and B of every projection, by the names of `read_peft_folder`.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        folder = torch_dist_folder(self._path)
        assert folder is not None
        stored = read_metadata(folder).state_dict_metadata
        shapes = {
            name: tuple(each.size)
            for name, each in stored.items()
            if isinstance(each, TensorStorageMetadata)
            and name.startswith(("model.", HEAD.removesuffix("weight")))
            and name.endswith((FACTOR_A, FACTOR_B))
        }
        tensors = [tensor for key, shape in shapes.items() for tensor in _stored_factors(key, shape)]
        with TorchDistWeights(folder, tensors) as weights:
            factors = {tensor.hf_names[0]: weights.read(tensor.hf_names[0], 0, tensor.shape[0]) for tensor in tensors}
        head = HEAD.removesuffix(".weight") + FACTOR_B
        if head in factors:  # may have rows for vocabulary padding
            factors[head] = factors[head][: read_architecture(self.base).vocab_size]
        return factors


def _stored_factors(key: str, shape: tuple[int, ...]) -> Iterator[GlobalTensor]:
    """A factor in a checkpoint, or those of all experts of a layer, which are stacked."""
    *grid, rows, columns = shape
    for expert in range(*grid or (1,)):
        name = key.replace(".mlp.experts.", f".mlp.experts.{expert}.") if grid else key
        size, place = (rows, columns), (expert,) if grid else ()
        yield GlobalTensor(key, place, tuple(grid), size, (name,), (size,), (TensorSlice(name, 0, 0, rows, 0),))


def export_adapter_folder(
    checkpoint: str | Path, output: str | Path, base: str | Path | None = None, *, overwrite: bool = False
) -> None:
    """Write the adapters of a checkpoint as a PEFT folder. No communication.

    Args:
        base: the base's folder, if it is no longer where the run found it.
        overwrite: an earlier output may be replaced (`check_target`).

    Raises:
        ModelError, CheckpointError: the checkpoint holds no adapters or is damaged, its base is gone or has another content, or
            the output cannot be written.
    """
    folder = torch_dist_folder(checkpoint)
    if folder is None or not holds_adapters(folder):
        raise CheckpointError(f"{checkpoint} holds no adapters (student.lora): leave out --adapter")
    found = CheckpointAdapters(checkpoint, base)
    write_peft_folder(found.factors(), found.lora, found.base, output, [checkpoint, found.base], overwrite=overwrite)
