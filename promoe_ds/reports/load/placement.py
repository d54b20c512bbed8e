"""Which experts should share a rank: the advice, and what other placements and sizes would give,
from the log alone.

Letters: T log intervals, L MoE layers, E routed experts, W ranks of an expert-parallel group, O
orders to choose from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promoe_ds.config.named_files import FORMAT
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.files import json_text
from promoe_ds.load_stats import divide
from promoe_ds.reports.log import RoutingLog
from promoe_ds.reports.page import write_text

#: A layer's experts move where the fullest rank gets emptier by this part at least.
_WORTH_MOVING = 0.005
#: An exchange of two experts has to gain this part of the fullest rank's load.
_WORTH_EXCHANGING = 2e-4
#: Stretches of time, times pairs of experts, that exchanges are judged by; the result is judged by
# all intervals.
_MOST_STRETCHES, _MOST_JUDGED = 32, 1 << 17


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A placement: what a number of ranks and an order of experts would give.

    order_LE: the experts place by place; uneven_L: fullest rank over the mean, summed interval by
    interval.
    """

    ep_size: int
    name: str
    order_LE: np.ndarray
    uneven_L: np.ndarray

    @classmethod
    def of(
        cls, log: RoutingLog, window: slice, name: str, order_LE: np.ndarray, ep_size: int
    ) -> Candidate:
        """Measure an order by a window's intervals."""
        return cls(
            ep_size=ep_size,
            name=name,
            order_LE=order_LE,
            uneven_L=unevenness(log.tokens_TLE[window], order_LE, ep_size),
        )


def balance(load_E: np.ndarray, ep_size: int) -> list[int]:
    """Return an order of experts over ranks, equally many on each: the heaviest expert to the
    emptiest rank that has room.
    """
    ranks: list[list[int]] = [[] for _ in range(ep_size)]
    for expert in np.argsort(-load_E, kind="stable").tolist():
        free = [rank for rank in ranks if len(rank) < len(load_E) // ep_size]
        min(free, key=lambda rank: sum(load_E[rank])).append(expert)
    return _by_rank(ranks)


def _by_rank(ranks: list[list[int]]) -> list[int]:
    """Return an order whose ranks, and experts on a rank, go upwards."""
    return [expert for rank in sorted(map(sorted, ranks)) for expert in rank]


def unevenness(tokens_TLE: np.ndarray, order_LE: np.ndarray, ep_size: int) -> np.ndarray:
    """Return each layer's largest over mean load of a rank (L,), both summed over intervals; NaN
    without tokens.
    """
    placed = np.take_along_axis(tokens_TLE, np.broadcast_to(order_LE, tokens_TLE.shape), axis=2)
    by_rank = placed.reshape(*placed.shape[:2], ep_size, -1).sum(axis=3).astype(float)
    return divide(by_rank.max(axis=2).sum(axis=0), by_rank.mean(axis=2).sum(axis=0))


def candidates(log: RoutingLog, window: slice, advised: Candidate) -> list[Candidate]:
    """Return, for every number of ranks that divides the experts, the plain order and the advised
    one; none that is the present placement.

    Args:
        advised: that of the present number of ranks, which is known.
    """
    plain = np.tile(np.arange(log.experts), (len(log.layers), 1))
    found = []
    for ep_size in (size for size in range(1, log.experts + 1) if log.experts % size == 0):
        found.append(Candidate.of(log, window, "plain order", plain, ep_size))
        if 1 < ep_size < log.experts:
            found.append(
                advised
                if ep_size == advised.ep_size
                else Candidate.of(log, window, "advised", advise(log, window, ep_size), ep_size)
            )
    return [
        each
        for each in found
        if each.ep_size != log.ep_size or not np.array_equal(each.order_LE, log.order_LE)
    ]


def advise(log: RoutingLog, window: slice, ep_size: int) -> np.ndarray:
    """Return the advised order of every layer's experts (L, E): the present one where none was
    found that is worth a move.

    Raises: ConfigError if `ep_size` does not divide the experts.
    """
    if log.experts % ep_size:
        raise ConfigError(
            f"--ep-size {ep_size} does not divide the {log.experts} experts: every rank holds"
            " equally many"
        )
    tokens_TLE = log.tokens_TLE[window].astype(float)
    stretches = max(1, min(_MOST_STRETCHES, len(tokens_TLE), _MOST_JUDGED // log.experts**2))
    starts = np.linspace(0, len(tokens_TLE), stretches, endpoint=False).astype(int)
    stretches_TLE = np.add.reduceat(tokens_TLE, starts, axis=0)
    greedy = [balance(load_E, ep_size) for load_E in tokens_TLE.sum(axis=0)]
    options_OLE = np.array(
        [
            [exchange(stretches_TLE[:, row], order, ep_size) for row, order in enumerate(orders)]
            for orders in (log.order_LE.tolist(), greedy)
        ]
    )
    uneven_OL = np.array([unevenness(tokens_TLE, order_LE, ep_size) for order_LE in options_OLE])
    best_LE = np.take_along_axis(options_OLE, uneven_OL.argmin(axis=0)[None, :, None], axis=0)[0]
    present_L = unevenness(tokens_TLE, log.order_LE, ep_size)
    is_worth_L = uneven_OL.min(axis=0) < present_L * (1 - _WORTH_MOVING)
    return np.where(is_worth_L[:, None], best_LE, log.order_LE)


def exchange(tokens_TE: np.ndarray, order: list[int], ep_size: int) -> list[int]:
    """Exchange pairs of experts of two ranks, the best pair first, while that lowers the fullest
    rank's load, summed over time.
    """
    order_E, rank_E = np.array(order), np.arange(len(order)) // (len(order) // ep_size)
    is_pair_EE = rank_E[:, None] != rank_E
    while True:
        tokens = tokens_TE[:, order_E]
        loads_TW = tokens.reshape(len(tokens), ep_size, -1).sum(axis=2)
        gain_TEE, own_TE = tokens[:, :, None] - tokens[:, None], loads_TW[:, rank_E]
        both_TEE = np.maximum(own_TE[:, :, None] - gain_TEE, own_TE[:, None] + gain_TEE)
        after_EE = np.maximum(both_TEE, _fullest_besides(loads_TW)[:, rank_E][:, :, rank_E]).sum(
            axis=0
        )
        after_EE[~is_pair_EE] = np.inf
        one, other = np.unravel_index(after_EE.argmin(), after_EE.shape)
        if not after_EE[one, other] < loads_TW.max(axis=1).sum() * (1 - _WORTH_EXCHANGING):
            return _by_rank(order_E.reshape(ep_size, -1).tolist())
        order_E[[one, other]] = order_E[[other, one]]


def _fullest_besides(loads_TW: np.ndarray) -> np.ndarray:
    """Return the largest load of the ranks other than two (T, W, W), -inf where there are no
    others.
    """
    ranks = np.arange(loads_TW.shape[1])
    result = np.full((*loads_TW.shape, len(ranks)), -np.inf)
    # From the third largest up: each larger one overwrites wherever it is not one of the two
    # itself.
    for place in np.argsort(loads_TW, axis=1)[:, -3:].T:
        is_other = (place[:, None, None] != ranks[:, None]) & (place[:, None, None] != ranks)
        result = np.where(
            is_other, np.take_along_axis(loads_TW, place[:, None], axis=1)[..., None], result
        )
    return result


def place(log: RoutingLog, window: slice, path: Path, ep_size: int | None) -> str:
    """Write the advised placement; return what it is expected to give.

    Args:
        ep_size: ranks to place on; as many as the run has if left out.
    Raises: DataError if the window has no tokens to judge by, or the file cannot be written.
    """
    size, tokens_TLE = ep_size or log.ep_size, log.tokens_TLE[window]
    if not tokens_TLE.any():
        raise DataError(
            f"--placement {path}: no token was routed in the last"
            f" {log.covered_T[window].sum():,} steps, so there is nothing to judge by: take a"
            " longer window with --last-steps"
        )
    order_LE = advise(log, window, size)
    before, after = (
        np.nanmean(unevenness(tokens_TLE, each, size)) for each in (log.order_LE, order_LE)
    )
    write_placement(path, log, order_LE, size)
    moved = int((order_LE != log.order_LE).sum())
    what = (
        f"{moved} of {order_LE.size} experts move"
        if moved
        else "no expert moves, nothing better was found"
    )
    change = f"{before:.3f} -> {after:.3f}" if moved else f"{before:.3f}"
    apply = (
        f" Apply it at the next resume: --set parallel.expert_placement={path}"
        if moved or size != log.ep_size
        else ""
    )
    return f"placement: {path}: {what}; fullest of {size} ranks over the mean {change}.{apply}"


def write_placement(path: Path, log: RoutingLog, order_LE: np.ndarray, ep_size: int) -> None:
    """Write a placement file, which `parallel.expert_placement` takes.

    Raises: DataError if it cannot be written.
    """
    values = {
        "format": FORMAT,
        "ep_size": ep_size,
        "from_step": int(log.steps_T[-1]),
        "layers": dict(zip(map(str, log.layers), order_LE.tolist(), strict=True)),
    }
    write_text(path, json_text(values, indent=1))
