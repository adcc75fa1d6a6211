"""Compare an HF checkpoint with a converted (or training) one, tensor by tensor, byte for byte."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kdrl_mcore.convert.adapted import holds_adapters
from kdrl_mcore.convert.byte_ranges import num_elements, raw_bytes
from kdrl_mcore.convert.convert import Progress, Start, blocks, run_all
from kdrl_mcore.convert.folders import torch_dist_folder
from kdrl_mcore.convert.hf_files import KEPT, HFWeights
from kdrl_mcore.convert.torch_dist import TorchDistWeights
from kdrl_mcore.convert.weight_map import HEAD, Weights, check_shapes, check_tied_head
from kdrl_mcore.errors import CheckpointError
from kdrl_mcore.model.families import FAMILIES, config_folder, read_architecture

STATUSES = ("equal", "cast", "missing", "different")


@dataclass
class Verification:
    """The result of a verification.

    Attributes:
        status: for every tensor: equal (the same bytes), cast (the same values in the checkpoint's dtype), missing (on one of
            the two sides) or different.
        why: for every missing or different tensor, what is wrong.
        digests: SHA-256 over the names, dtypes, shapes and bytes of all tensors, for the HF side and for the checkpoint.
    """

    status: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    digests: tuple[str, str] = ("", "")

    @property
    def agrees(self) -> bool:
        """Whether every tensor is equal or an exact cast."""
        return not self.why

    def table(self) -> list[tuple[str, Counter]]:
        """(tensor name with layer and expert numbers as *, count of each status), in order of first appearance."""
        rows: dict[str, Counter] = defaultdict(Counter)
        for name, status in self.status.items():
            rows[re.sub(r"\.\d+\.", ".*.", name)][status] += 1
        return list(rows.items())


def verify(hf: str | Path, checkpoint: str | Path, start: Start, threads: int | None = None) -> Verification:
    """Compare every tensor.

    Raises:
        ModelError, CheckpointError: one of the two is damaged or not supported.
    """
    folder = torch_dist_folder(checkpoint)
    if folder is None:
        raise CheckpointError(f"{checkpoint} is neither a converted nor a training checkpoint")
    if holds_adapters(folder):
        raise CheckpointError(
            f"{checkpoint} holds adapters alone (student.lora), and only whole models are compared: export it, and compare that"
        )
    architecture = read_architecture(checkpoint)
    result, kept = Verification(), config_folder(checkpoint) / KEPT
    lines: tuple[dict[str, str], dict[str, str]] = ({}, {})  # digests of each side's tensors
    with HFWeights(hf) as source, TorchDistWeights.of_model(folder, architecture, kept) as converted:
        check_shapes(converted, architecture, FAMILIES[architecture.family].rules(architecture))
        if architecture.tied_embeddings:
            check_tied_head(source)
        sides: tuple[Weights, Weights] = (source, converted)
        names = [
            name
            for name in sorted(source.names | converted.names)
            if not name.endswith("rotary_emb.inv_freq")
            and not (architecture.tied_embeddings and name == HEAD)  # a second copy of the embedding
        ]
        result.status = dict.fromkeys(names, "missing")  # fixes the order; every entry is overwritten
        held = [(side, name) for name in names for side in sides if name in side.names]
        progress = start(sum(num_elements(side.shape(name)) * side.dtype(name).itemsize for side, name in held))

        def compare(name: str) -> None:
            status, why = _compare(name, *sides, lines, progress)
            result.status[name] = status
            if why:
                result.why[name] = why

        run_all([lambda name=name: compare(name) for name in names], threads)  # type: ignore[misc]
        for key in converted.unexpected_keys:
            result.status[key], result.why[key] = "missing", f"{checkpoint} has it, but the architecture does not"
    result.digests = (_total(lines[0]), _total(lines[1]))
    return result


def _compare(
    name: str, source: Weights, converted: Weights, lines: tuple[dict[str, str], dict[str, str]], progress: Progress
) -> tuple[str, str]:
    """(status, why) of one tensor; its digests go into `lines`."""
    sides = (source, converted)
    absent = [side for side in sides if name not in side.names]
    shapes = [side.shape(name) for side in sides if side not in absent]
    if absent or shapes[0] != shapes[1]:
        for side, line in zip(sides, lines, strict=True):
            if side not in absent:
                digest = _Hash(side, name)
                for low, rows in _blocks(side, name):
                    progress(digest.add(raw_bytes(side.read(name, low, rows))))
                line[name] = digest.hexdigest()
        if absent:
            return "missing", f"it is not in {absent[0].path}"
        return "different", f"shape {shapes[0]} in {source.path}, {shapes[1]} in {converted.path}"
    cast, first = source.dtype(name) != converted.dtype(name), -1
    digest = _Hash(source, name)
    other = _Hash(converted, name) if cast else None  # while the bytes are the same, so is the digest
    for low, rows in _blocks(source, name):
        given, stored = (side.read(name, low, rows) for side in sides)
        theirs, ours = raw_bytes(given), raw_bytes(stored)
        expected = raw_bytes(given.to(stored.dtype)) if cast else theirs
        if first < 0 and not torch.equal(expected, ours):
            first = low * (len(ours) // rows) + int((expected != ours).nonzero()[0])
            other = other or digest.copy()
        digest.add(theirs)
        if other is not None:
            other.add(ours)
        progress(len(theirs) + len(ours))
    lines[0][name], lines[1][name] = digest.hexdigest(), (other or digest).hexdigest()
    if first >= 0:
        return "different", f"the first difference is at its byte {first}"
    return ("cast" if cast else "equal"), ""


def _blocks(weights: Weights, name: str) -> Iterable[tuple[int, int]]:
    shape = weights.shape(name)
    return blocks(0, shape[0], num_elements(shape[1:]) * weights.dtype(name).itemsize)


class _Hash:
    """SHA-256 of one tensor: its name, dtype and shape, then its bytes."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._hash = hashlib.sha256(f"{name} {weights.dtype(name)} {list(weights.shape(name))}\n".encode())

    def copy(self) -> _Hash:
        result = object.__new__(_Hash)
        result._hash = self._hash.copy()
        return result

    def add(self, data: Tensor) -> int:
        self._hash.update(data.numpy().data)
        return len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _total(digests: dict[str, str]) -> str:
    return hashlib.sha256("\n".join(digests[name] for name in sorted(digests)).encode()).hexdigest()
