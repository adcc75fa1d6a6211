"""What our code uses of Megatron-Core, vLLM and Transformer Engine exists in every release that it must work with, with these
arguments: against a table of signatures that `make contracts` reads from the published CUDA wheels."""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from typing import Any

import pytest

from tests.contracts.check import SIGNATURES, mismatches
from tests.contracts.uses import RECEIVERS, ROOT, Reader, Use, uses


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return json.loads(SIGNATURES.read_text())


def test_our_code_fits_every_release(table: dict[str, Any]) -> None:
    used = uses()
    assert len(used) > 100
    assert mismatches(used, table) == []


def test_the_sleep_tags_are_those_that_are_woken(table: dict[str, Any]) -> None:
    for release in ("vllm==0.32.0", "vllm==0.33.0"):
        tags = table[release]["vllm.v1.executor.abstract.SLEEP_TAGS"]["text"]
        assert "'weights'" in tags and "'kv_cache'" in tags


def test_both_interfaces_of_logits_processors_are_seen(table: dict[str, Any]) -> None:
    for path in (
        "vllm.v1.sample.logits_processor.LogitsProcessor",
        "vllm.v1.worker.gpu.sample.logits_processor.LogitsProcessor",
    ):
        assert "apply" in table["vllm==0.33.0"][path]["abstract"]


def test_declared_receivers_still_stand_in_their_files() -> None:
    for file, receivers in RECEIVERS.items():
        text = (ROOT / file).read_text()
        assert [receiver for receiver in receivers if receiver not in text] == []


DERIVED = """
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe import moe_utils
@dataclass
class Packed(PackedSeqParams):
    ours: int = 0
packed = Packed(qkv_format="thd", ours=1)
moe_utils.permute = None
"""


def test_a_dataclass_of_ours_is_built_like_its_base_and_what_is_written_counts() -> None:
    found: dict[str, Use] = defaultdict(Use)
    Reader("a.py", found).visit(ast.parse(DERIVED))
    assert found["megatron.core.packed_seq_params.PackedSeqParams"].calls == {(0, frozenset({"qkv_format"}), False)}
    assert "megatron.core.transformer.moe.moe_utils.permute" in found


@pytest.mark.parametrize(
    ("signature", "use", "reason"),
    [
        (None, Use({"a.py"}), "does not exist"),
        ({"kind": "function", "parameters": "(a, *, b=...)"}, Use(calls={(1, frozenset({"c"}), False)}), "no argument c"),
        ({"kind": "function", "parameters": "(a, *, b=...)"}, Use(calls={(2, frozenset(), False)}), "takes 1 arguments"),
        ({"kind": "function", "parameters": "(a, *, b)"}, Use(calls={(1, frozenset(), False)}), "needs b"),
        ({"kind": "class", "parameters": "()", "abstract": ["apply"]}, Use(derived=True, methods={"update"}), "lacks apply"),
    ],
)
def test_what_does_not_fit_is_said(signature: Any, use: Use, reason: str) -> None:
    (line,) = mismatches({"vllm.thing": use}, {"vllm==0.33.0": {"vllm.thing": signature}})
    assert reason in line and line.startswith("vllm==0.33.0: vllm.thing")


@pytest.mark.parametrize("parameters", ["(a, b=...)", "(*args, **kwargs)", "(a, **kwargs)"])
def test_what_fits_is_not_reported(parameters: str) -> None:
    use = Use({"a.py"}, calls={(1, frozenset({"b"}), False)})
    assert (
        mismatches({"vllm.thing": use}, {"vllm==0.33.0": {"vllm.thing": {"kind": "function", "parameters": parameters}}}) == []
    )
