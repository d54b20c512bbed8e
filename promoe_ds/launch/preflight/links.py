"""Bandwidth and latency between all pairs of hosts: as many pairs at a time as share no host."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from promoe_ds.launch.preflight.client import Agent
from promoe_ds.launch.remote import RemoteError

#: A link is slow with less than half the bandwidth that a quarter of the links reach, or with more than twice the round trip that
#: a quarter of them do with, and this much more. (A slow host spoils most links of a small cluster: no median.)
_SLOW_SHARE, _SLOW_TRIPS, _SLOW_MORE_SECONDS = 0.5, 2.0, 0.2e-3
_STREAM_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one host measured to another; `problem` if it could not."""

    source: str
    target: str
    bits_per_second: float = 0.0
    round_trip: float = 0.0
    problem: str = ""


def measure_links(agents: Mapping[str, Agent], addresses: Mapping[str, str]) -> list[Link]:
    """Measure every pair in both directions.

    Args:
        addresses: of each host on the interface that joins them.
    """
    links: list[Link] = []
    with ThreadPoolExecutor(max_workers=max(1, len(agents))) as pool:
        for pairs in rounds(list(agents)):
            for turned in (False, True):
                directed = [(b, a) if turned else (a, b) for a, b in pairs]
                links += pool.map(lambda pair: _measure(agents[pair[0]], agents[pair[1]], addresses[pair[1]]), directed)
    return links


def rounds(names: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Yield rounds of disjoint pairs such that every pair meets once (a round-robin tournament)."""
    ring: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        yield [(a, b) for a, b in zip(ring[:half], reversed(ring[half:]), strict=True) if a is not None and b is not None]
        ring = [ring[0], ring[-1], *ring[1:-1]]


def slow_links(links: Sequence[Link]) -> list[Link]:
    """Return the links that cannot be used or stand out from the others by far."""
    sound = [link for link in links if not link.problem]
    if not sound:
        return list(links)
    bandwidth = sorted((link.bits_per_second for link in sound), reverse=True)[len(sound) // 4]
    trip = sorted(link.round_trip for link in sound)[len(sound) // 4]
    return [link for link in links if link.problem or link.bits_per_second < _SLOW_SHARE * bandwidth
            or link.round_trip > _SLOW_TRIPS * trip + _SLOW_MORE_SECONDS]


def link_table(links: Sequence[Link]) -> list[str]:
    """Return the lines of a table."""
    rows = [("from", "to", "Mbit/s", "round trip ms")]
    rows += [(link.source, link.target, link.problem, "") if link.problem else
             (link.source, link.target, f"{link.bits_per_second / 1e6:,.0f}", f"{link.round_trip * 1e3:.2f}") for link in links]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(cell.ljust(width) if at < 2 else cell.rjust(width) for at, (cell, width) in
                      enumerate(zip(row, widths, strict=True))) for row in rows]


def _measure(source: Agent, target: Agent, address: str) -> Link:
    token = secrets.token_hex(16)
    try:
        port = target.ask("listen", address=address, token=token)["port"]
        with ThreadPoolExecutor(max_workers=1) as pool:
            served = pool.submit(target.ask, "serve", seconds=_STREAM_SECONDS)
            measured = source.ask("measure", address=address, port=port, token=token, seconds=_STREAM_SECONDS)
            received = served.result()
        if "problem" in received:
            return Link(source=source.host, target=target.host, problem=received["problem"])
    except RemoteError as error:
        return Link(source=source.host, target=target.host, problem=f"no connection ({error})")
    return Link(source=source.host, target=target.host, round_trip=measured["round_trip"],
                bits_per_second=8 * received["bytes"] / received["seconds"])
