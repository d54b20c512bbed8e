"""Which rank is at the other end: one sentence for the error of a broken collective."""

from __future__ import annotations

import os
import re
import socket

import torch.distributed as dist

from promoe_ds.distributed.context import DistributedContext

#: What gloo, NCCL and the store report of a broken collective; anything else is another defect.
_SIGNS = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Socket closed",
    "No route to host",
    "ncclRemoteError",
    "NCCL",
    "Broken pipe",
    "recvValue failed",
    "sendBytes failed",
)
_ADDRESS = re.compile(r"\[?((?:\d{1,3}\.){3}\d{1,3}|[0-9a-fA-F:]{3,})\]?:\d+")


def gather_addresses(context: DistributedContext) -> dict[str, str]:
    """Return the ranks at each address, e.g. {"10.0.0.2": "ranks 2, 3 on gpu02"}.

    Collectives: one.
    """
    places: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(context.gather((_own_address(), socket.gethostname()))):
        places.setdefault(place, []).append(rank)
    return {
        address: f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} on {host}"
        for (address, host), ranks in places.items()
    }


def peer_problem(error: BaseException, addresses: dict[str, str]) -> str:
    """Return what an exception says about the other ranks, "" if it is of another kind."""
    text = " ".join(str(error).split())
    if not isinstance(error, dist.DistError) and not (
        isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)
    ):
        return ""
    # The address of the peer, not the file and line of gloo that come first.
    found = [addresses[address] for address in _ADDRESS.findall(text) if address in addresses]
    who = f"lost {found[-1]}" if found else "a collective with other ranks failed or timed out"
    return f"{who} ({text[-300:]})"


def _own_address() -> str:
    """Return the address by which this host reaches the master; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
            return probe.getsockname()[0]
        except OSError:
            return ""
