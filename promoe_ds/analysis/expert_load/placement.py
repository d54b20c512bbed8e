"""Which experts should share a rank: the advice, and what other placements and sizes would give, from the log alone.

Letters: T log intervals, L MoE layers, E routed experts, W ranks of an expert-parallel group.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promoe_ds.analysis.expert_load.log import RoutingLog
from promoe_ds.config.placement import FORMAT
from promoe_ds.errors import ConfigError, DataError

#: Less than this part of a load is no progress: sums in another order must not look like it for ever.
_PROGRESS = 1e-9


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a number of ranks and an order of experts would give.

    order_LE: experts in the order in which they lie; uneven_L: fullest rank over the mean, summed interval by interval.
    """

    ep_size: int
    name: str
    order_LE: np.ndarray
    uneven_L: np.ndarray


def balance(load_E: np.ndarray, ep_size: int) -> list[int]:
    """Return an order of experts over ranks, equally many on each, in which the fullest rank is as empty as can be found.

    Greedy (the heaviest expert to the emptiest rank that has room), then exchanges of an expert of the fullest rank for one of
    another while that leaves both below what the fullest one had.
    """
    experts = len(load_E)
    room = [experts // ep_size] * ep_size
    ranks: list[list[int]] = [[] for _ in range(ep_size)]
    for expert in sorted(range(experts), key=lambda e: (-load_E[e], e)):
        free = [rank for rank in range(ep_size) if len(ranks[rank]) < room[rank]]
        emptiest = min(free, key=lambda rank: (sum(load_E[e] for e in ranks[rank]), rank))
        ranks[emptiest].append(expert)
    while _improve(load_E, ranks):
        pass
    return [expert for rank in sorted(map(sorted, ranks)) for expert in rank]


def _improve(load_E: np.ndarray, ranks: list[list[int]]) -> bool:
    """Make the best exchange between the fullest rank and another, in place; return whether there was one."""
    loads_W = np.array([load_E[rank].sum() for rank in ranks])
    fullest = int(loads_W.argmax())
    theirs = [(rank, place) for rank, members in enumerate(ranks) if rank != fullest for place in range(len(members))]
    if not theirs:
        return False
    their_load = np.array([load_E[ranks[rank][place]] for rank, place in theirs])
    gain = load_E[ranks[fullest]][:, None] - their_load[None]
    # The larger of the two ranks' loads after exchanging (own, their) experts.
    after = np.maximum(loads_W[fullest] - gain, loads_W[[rank for rank, _ in theirs]][None] + gain)
    own, other = np.unravel_index(after.argmin(), after.shape)
    if not after[own, other] < loads_W[fullest] * (1 - _PROGRESS):
        return False
    rank, place = theirs[other]
    ranks[fullest][own], ranks[rank][place] = ranks[rank][place], ranks[fullest][own]
    return True


def unevenness(tokens_TLE: np.ndarray, order_LE: np.ndarray, ep_size: int) -> np.ndarray:
    """Return each layer's largest over mean load of a rank (L,), both summed over intervals; NaN without tokens."""
    placed = np.take_along_axis(tokens_TLE, np.broadcast_to(order_LE, tokens_TLE.shape), axis=2)
    by_rank = placed.reshape(*placed.shape[:2], ep_size, -1).sum(axis=3).astype(float)
    mean_L = by_rank.mean(axis=2).sum(axis=0)
    return np.divide(by_rank.max(axis=2).sum(axis=0), mean_L, out=np.full(len(mean_L), np.nan), where=mean_L > 0)


def outlooks(log: RoutingLog, window: slice) -> list[Outlook]:
    """Return, for every number of ranks that divides the experts, the plain order and the advised one; first the present one."""
    tokens_TLE = log.tokens_TLE[window]
    plain = np.tile(np.arange(log.experts), (len(log.layers), 1))
    found = [Outlook(ep_size=log.ep_size, name="present", order_LE=log.order_LE,
                     uneven_L=unevenness(tokens_TLE, log.order_LE, log.ep_size))]
    for ep_size in (size for size in range(1, log.experts + 1) if log.experts % size == 0):
        options = [("plain order", plain)]
        if 1 < ep_size < log.experts:
            options.append(("advised", advise(log, window, ep_size)))
        found += [Outlook(ep_size=ep_size, name=name, order_LE=order, uneven_L=unevenness(tokens_TLE, order, ep_size))
                  for name, order in options]
    return found


def advise(log: RoutingLog, window: slice, ep_size: int) -> np.ndarray:
    """Return the advised order of every layer's experts (L, E): the present one where nothing better was found.

    Raises: ConfigError if `ep_size` does not divide the experts.
    """
    if ep_size < 1 or log.experts % ep_size:
        raise ConfigError(f"--ep-size {ep_size} does not divide the {log.experts} experts: every rank holds equally many")
    load_LE = log.tokens_TLE[window].sum(axis=0).astype(float)
    orders = []
    for load_E, present in zip(load_LE, log.order_LE, strict=True):
        new = balance(load_E, ep_size)
        heaviest = [load_E[list(order)].reshape(ep_size, -1).sum(axis=1).max() for order in (present, new)]
        orders.append(new if heaviest[1] < heaviest[0] else list(present))
    return np.array(orders)


def write_placement(path: Path, log: RoutingLog, order_LE: np.ndarray, ep_size: int) -> None:
    """Write a placement file, which `parallel.expert_placement` takes.

    Raises: DataError if it cannot be written.
    """
    values = {"format": FORMAT, "ep_size": ep_size, "from_step": int(log.steps_T[-1]),
              "layers": {str(layer): [int(e) for e in order] for layer, order in zip(log.layers, order_LE, strict=True)}}
    try:
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None
