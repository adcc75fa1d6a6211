"""Gloo uses the interface that NCCL uses, or the one that reaches the first node."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kdrl_mcore.parallel.interfaces import gloo_interface
from tests.support import ROOT

NODE = {
    "lo": ["127.0.0.1"],
    "eno1": ["192.168.1.7", "fe80::1"],
    "ib0": ["10.1.0.7"],
    "ib1": ["10.2.0.7"],
    "docker0": ["172.17.0.1"],
}


@pytest.mark.parametrize(
    ("nccl", "reaching", "chosen"),
    [
        ("", "10.2.0.7", "ib1"),
        ("", "127.0.0.1", "lo"),  # all ranks on one node
        ("", "9.9.9.9", None),
        ("", None, None),
        ("ib0", "192.168.1.7", "ib0"),
        ("ib", "10.2.0.7", "ib1"),  # both are possible: the one that reaches the first node
        ("ib", "192.168.1.7", "ib0"),
        ("=ib", "10.2.0.7", None),
        ("=ib1,eno1", None, "eno1"),
        ("ib0:5", None, "ib0"),
        ("^docker,lo", "10.1.0.7", "ib0"),
        ("^ib", "10.1.0.7", None),
        ("^=ib", "10.1.0.7", "ib0"),
    ],
)
def test_the_interface(nccl: str, reaching: str | None, chosen: str | None) -> None:
    assert gloo_interface(nccl, NODE, reaching) == chosen


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [({}, "lo"), ({"GLOO_SOCKET_IFNAME": "eth7"}, "eth7"), ({"NCCL_SOCKET_IFNAME": "lo"}, "lo")],
    ids=["told by the first node's address", "set beforehand", "as NCCL's"],
)
def test_every_rank_sets_it_beside_nccls(settings: dict[str, str], chosen: str) -> None:
    """The interface is chosen before the rank joins the world, which makes gloo's first group."""
    script = (
        "import os, torch\nfrom kdrl_mcore.parallel.platform import initialize_distributed\n"
        "torch.distributed.init_process_group = lambda *_, **__: print(os.environ.get('GLOO_SOCKET_IFNAME'))\n"
        "initialize_distributed(timeout_minutes=1)"
    )
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    environment = kept | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": "2", **settings}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == chosen, done.stderr
