"""A run's routing.jsonl as arrays, however long it is; what had to be left out or put right is said in `notes`.

Letters: T log intervals, L MoE layers, Q timestep bins, E routed experts, X exchanges.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from promoe_ds.analysis.expert_load.columns import EXCHANGES, Columns, by_first_number, read_columns
from promoe_ds.analysis.expert_load.lines import log_file
from promoe_ds.errors import DataError

_SHOWN_PROBLEMS = 3


@dataclass(frozen=True, kw_only=True)
class RoutingLog:
    """Statistics by interval. Experts carry the numbers that they had at the start of the run, wherever they lie.

    steps_T: steps finished; covered_T: steps that an interval counts.
    tokens_TLQE, routed_TLQ, null_TLQ: assignments, routed and unconditional tokens; 0 where a line is missing.
    gates_TLE: sums of gates, NaN in schema 1; gate_mean_TL.
    similarity_TL, bytes_TL: of the prototypes, and exchanged.
    to_centroid_TLE, to_others_TLE: cosines of each prototype with the centroid of its tokens, and the mean with the others'.
    rank_uneven_TL: rows of the fullest rank over the mean, pass by pass; wait_TLX: seconds per rank; NaN where not logged.
    matrix_LEE: the prototypes' newest cosines, NaN where not logged.
    order_LE: which expert lies where, now; ep_size: ranks that share a set of experts, now (1 if not logged).
    tables: name -> layer -> [(step, rows x E counts)], e.g. "tokens_per_class".
    """

    path: Path
    layers: list[int]
    steps_T: np.ndarray
    covered_T: np.ndarray
    tokens_TLQE: np.ndarray
    routed_TLQ: np.ndarray
    null_TLQ: np.ndarray
    gates_TLE: np.ndarray
    gate_mean_TL: np.ndarray
    similarity_TL: np.ndarray
    bytes_TL: np.ndarray
    to_centroid_TLE: np.ndarray
    to_others_TLE: np.ndarray
    rank_uneven_TL: np.ndarray
    wait_TLX: np.ndarray
    matrix_LEE: np.ndarray
    order_LE: np.ndarray
    ep_size: int
    ranks: int
    tables: dict[str, dict[int, list[tuple[int, np.ndarray]]]]
    notes: list[str]

    @cached_property
    def tokens_TLE(self) -> np.ndarray:
        """Assignments of all bins."""
        return self.tokens_TLQE.sum(axis=2)

    @property
    def experts(self) -> int:
        """E."""
        return self.tokens_TLQE.shape[-1]

    @property
    def bins(self) -> int:
        """Q."""
        return self.tokens_TLQE.shape[2]

    def window(self, last_steps: int | None = None) -> slice:
        """Return the intervals of the last so many steps; of the last tenth of the steps if left out; at least one."""
        newest = int(self.steps_T[-1])
        last = max(1, -(-newest // 10)) if last_steps is None else last_steps
        inside = int((self.steps_T > newest - last).sum())
        return slice(len(self.steps_T) - max(1, inside), len(self.steps_T))

    def table(self, name: str, layer: int, window: slice) -> np.ndarray | None:
        """Return a table's counts summed over a window, or its newest one where the window has none; None if never logged."""
        series = self.tables.get(name, {}).get(layer)
        if not series:
            return None
        start = int(self.steps_T[window][0] - self.covered_T[window][0])
        inside = [counts for step, counts in series if step > start]
        return np.sum(inside or [series[-1][1]], axis=0)


def load_log(run_dir: Path) -> RoutingLog:
    """Read a run's routing.jsonl.

    Broken lines and those of an abandoned branch are left out, which `notes` says.
    Raises: DataError if there is no such file, nothing in it, or a younger schema.
    """
    path = log_file(run_dir)
    columns = read_columns(path)
    told = [f"line {number:,}: {problem}" for number, problem in columns.broken + columns.problems]
    if not columns.experts:
        reason = f"holds no routing record: {'; '.join(told[:_SHOWN_PROBLEMS])}" if told else \
            "is empty: the run has no MoE layer or did not reach its first log step (train.log_every)"
        raise DataError(f"{path} {reason}")
    notes = [f"{len(told)} line{'s' if len(told) > 1 else ''} left out ({'; '.join(told[:_SHOWN_PROBLEMS])})"] if told else []
    if not _ends_whole(path):
        notes.append("the last line is cut off: the run was interrupted, or is writing it now")
    if columns.schemas[1]:
        notes.append(f"{columns.schemas[1]:,} of {columns.schemas.total():,} lines have schema 1: gates by expert, prototypes, "
                     "waits and tables by class and patch were not logged then")
    return _arrange(path, columns, notes)


def _arrange(path: Path, columns: Columns, notes: list[str]) -> RoutingLog:
    keys = np.frombuffer(columns.keys, dtype=np.int64).reshape(-1, 5)
    bins = int(keys[-1, 4])
    kept = keys[:, 4] == bins
    if not kept.all():
        notes.append(f"{(~kept).sum():,} lines with another number of timestep bins than the newest {bins} are left out")
    kept &= _newest_branch(keys, notes)
    steps, step_index = np.unique(keys[kept, 0], return_inverse=True)
    layers, layer_index = np.unique(keys[kept, 2], return_inverse=True)
    where = (step_index, layer_index, keys[kept, 3])
    shape, experts = (len(steps), len(layers), bins), columns.experts

    def _fill(values: np.ndarray, like: float, *tail: int) -> np.ndarray:
        result = np.full((*shape, *tail), like, dtype=values.dtype)
        result[where] = values[kept]
        return result

    counts = np.frombuffer(columns.counts, dtype=np.int64).reshape(-1, 3)
    floats = np.frombuffer(columns.floats, dtype=np.float64).reshape(-1, 2)
    tokens = _fill(np.frombuffer(columns.tokens, dtype=np.int64).reshape(-1, experts), 0, experts)
    gates = _fill(np.frombuffer(columns.gates, dtype=np.float64).reshape(-1, experts), 0.0, experts).sum(axis=2)
    tokens_TLQ = tokens.sum(axis=-1)
    means = np.nan_to_num(_fill(floats[:, 0], 0.0)) * tokens_TLQ
    totals = tokens_TLQ.sum(axis=2)
    covered = np.zeros(len(steps), dtype=np.int64)
    covered[step_index] = keys[kept, 1]
    missing = len(steps) * len(layers) * bins - len(np.unique(np.ravel_multi_index(where, shape)))
    if missing:
        notes.append(f"{missing:,} lines of a layer and bin are missing and count as no tokens")
    if gap := int(steps[-1] - covered.sum()):
        notes.append(f"{gap:,} of {steps[-1]:,} steps are not covered: they ended in an interruption or before this log began")
    details = _spread(columns, steps, layers)
    for (step, layer), order in columns.orders.items():
        at = (np.searchsorted(steps, step), np.searchsorted(layers, layer))
        if at[0] < len(steps) and steps[at[0]] == step:
            for values in (tokens, gates, details[..., :experts], details[..., experts:2 * experts]):
                values[at] = by_first_number(values[at], order)
    orders = np.array([columns.newest_order.get(int(layer), tuple(range(experts))) for layer in layers])
    ep_size, ranks = columns.placement
    return RoutingLog(
        path=path, layers=[int(layer) for layer in layers], steps_T=steps, covered_T=covered, tokens_TLQE=tokens,
        routed_TLQ=_fill(counts[:, 0], 0), null_TLQ=_fill(counts[:, 1], 0), gates_TLE=gates,
        gate_mean_TL=np.divide(means.sum(axis=2), totals, out=np.full(totals.shape, np.nan), where=totals > 0),
        similarity_TL=_fill(floats[:, 1], np.nan)[:, :, 0], bytes_TL=_fill(counts[:, 2], 0)[:, :, 0],
        to_centroid_TLE=details[..., :experts], to_others_TLE=details[..., experts:2 * experts],
        rank_uneven_TL=details[..., 2 * experts], wait_TLX=details[..., 2 * experts + 1:],
        matrix_LEE=_matrices(columns, layers, orders), order_LE=orders, ep_size=ep_size, ranks=ranks, tables=columns.tables,
        notes=notes)


def _newest_branch(keys: np.ndarray, notes: list[str]) -> np.ndarray:
    """Return which lines stay: where the log goes back in steps, the lines after that step were repeated and go."""
    kept, steps = np.ones(len(keys), dtype=bool), keys[:, 0]
    for place in np.flatnonzero(np.diff(steps) < 0) + 1:
        kept[:place] &= steps[:place] < steps[place]
        notes.append(f"the run went back from step {steps[place - 1]:,} and on from before {steps[place]:,}; what it did twice "
                     "counts once, as it was done last")
    return kept


def _spread(columns: Columns, steps: np.ndarray, layers: np.ndarray) -> np.ndarray:
    """Return the details (T, L, ...), NaN where a line has none; of a step done twice the later one's."""
    width = 2 * columns.experts + 1 + len(EXCHANGES)
    details = np.full((len(steps), len(layers), width), np.nan, dtype=np.float32)
    keys = np.frombuffer(columns.detail_keys, dtype=np.int64).reshape(-1, 2)
    known = np.isin(keys[:, 0], steps)
    where = np.searchsorted(steps, keys[known, 0]), np.searchsorted(layers, keys[known, 1])
    details[where] = np.frombuffer(columns.details, dtype=np.float32).reshape(-1, width)[known]
    return details


def _matrices(columns: Columns, layers: np.ndarray, orders: np.ndarray) -> np.ndarray:
    result = np.full((len(layers), columns.experts, columns.experts), np.nan)
    for row, layer in enumerate(layers):
        if int(layer) in columns.matrices:
            result[row][np.ix_(orders[row], orders[row])] = np.array(columns.matrices[int(layer)], dtype=float)
    return result


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(0, 2)
        if not file.tell():
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"
