"""The network interface for gloo: NCCL's, or the one that reaches the job's first node.

By default gloo listens on the address that the node's own name resolves to, which may belong to the loopback interface or to a
network that does not connect the nodes; NCCL looks at the interfaces themselves.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil


def set_gloo_interface() -> None:
    """Set `GLOO_SOCKET_IFNAME` for this process and those it starts, unless it is already set or no interface is found. Call it
    before gloo's first group is made."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    addresses = {name: [entry.address for entry in entries] for name, entries in psutil.net_if_addrs().items()}
    reaching = None
    with suppress(OSError):
        reaching = own_address(os.environ["MASTER_ADDR"])
    chosen = gloo_interface(os.environ.get("NCCL_SOCKET_IFNAME", ""), addresses, reaching)
    if chosen is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = chosen


def gloo_interface(nccl: str, addresses: Mapping[str, Sequence[str]], reaching: str | None) -> str | None:
    """Among the interfaces that NCCL may use, the one that reaches the first node, or else the first; None if none is known.

    Args:
        nccl: `NCCL_SOCKET_IFNAME`: prefixes of names; after `^`, of names to exclude; after `=`, whole names.
        addresses: the addresses of each interface.
        reaching: the address from which this node reaches the first node.
    """
    reaches = [name for name, found in addresses.items() if reaching is not None and reaching in found]
    if not nccl:
        return reaches[0] if reaches else None
    left_out, whole = nccl.startswith("^"), nccl.lstrip("^").startswith("=")
    names = tuple(name.partition(":")[0] for name in nccl.lstrip("^=").split(","))
    allowed = [name for name in addresses if (name in names if whole else name.startswith(names)) != left_out]
    if left_out:
        return next((name for name in reaches if name in allowed), None)
    return next((name for name in [*reaches, *allowed] if name in allowed), None)


def own_address(host: str) -> str:
    """The address from which this node reaches a host: the source address that a datagram would carry. Nothing is sent.

    Raises:
        OSError: the host is unknown or cannot be reached.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
