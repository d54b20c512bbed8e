"""Delays every frame between two network interfaces: a long cable, where the kernel has no netem.

Run as a program: delay.py INTERFACE INTERFACE SECONDS.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

_ETH_P_ALL, _SOL_PACKET, _PACKET_VNET_HDR, _PACKET_OUTGOING = 3, 263, 15, 4
_LARGEST_FRAME = 1 << 17


def _open(interface: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    # Frames keep what the sender left to the hardware: unfinished checksums, segments to be cut.
    end.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
    end.bind((interface, 0))
    return end


def relay(first: str, second: str, seconds: float) -> None:
    """Pass frames on, each `seconds` after it came, for ever."""
    one, two = _open(first), _open(second)
    other, waiting = {one: two, two: one}, deque()
    while True:
        ready, _, _ = select.select(
            [one, two], [], [], max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        )
        for end in ready:
            frame, address = end.recvfrom(_LARGEST_FRAME)
            if address[2] != _PACKET_OUTGOING:
                waiting.append((time.monotonic() + seconds, other[end], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, end, frame = waiting.popleft()
            with suppress(OSError):  # as a cable: what cannot be sent is lost
                end.send(frame)


if __name__ == "__main__":
    relay(sys.argv[1], sys.argv[2], float(sys.argv[3]))
