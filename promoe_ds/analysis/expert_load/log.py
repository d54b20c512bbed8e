"""A run's routing.jsonl as arrays, however long it is; what had to be left out or put right is said in `notes`.

Letters: T log intervals, L MoE layers, Q timestep bins, E routed experts, X exchanges.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promoe_ds.analysis.expert_load.columns import EXCHANGES, TABLES, Columns, by_first_number, read_columns
from promoe_ds.analysis.expert_load.lines import log_file
from promoe_ds.errors import DataError

_SHOWN_PROBLEMS = 3


@dataclass(frozen=True, kw_only=True)
class RoutingLog:
    """Statistics by interval. Experts carry the numbers that they had at the start of the run, wherever they lie.

    steps_T: steps finished; covered_T: steps that an interval counts.
    tokens_TLE, routed_TL, null_TL: assignments, routed and unconditional tokens; 0 where a line is missing.
    tokens_TLQE: assignments by noise level, of the intervals that have the newest number of levels; 0 in the others.
    gates_TLE: sums of gates, NaN in schema 1; gate_mean_TL.
    similarity_TL, bytes_TL: of the prototypes, and exchanged.
    to_centroid_TLE, to_others_TLE: cosines of each prototype with the centroid of its tokens, and the mean with the others'.
    rank_uneven_TL: rows of the fullest rank over the mean, pass by pass; wait_TLX: seconds per rank; NaN where not logged.
    matrix_LEE: the prototypes' newest logged cosines, NaN where there are none.
    order_LE: which expert lies where, now; ep_size: ranks that share a set of experts, now (1 if not logged).
    tables: name -> layer -> [(step, rows x E counts)], e.g. "tokens_per_class".
    """

    path: Path
    layers: list[int]
    steps_T: np.ndarray
    covered_T: np.ndarray
    tokens_TLE: np.ndarray
    tokens_TLQE: np.ndarray
    routed_TL: np.ndarray
    null_TL: np.ndarray
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
    told = [f"line {number:,}: {problem}" for number, problem in sorted(columns.broken)]
    if not columns.keys:
        reason = f"holds no routing record: {'; '.join(told[:_SHOWN_PROBLEMS])}" if told else \
            "is empty: the run has no MoE layer or did not reach its first log step (train.log_every)"
        raise DataError(f"{path} {reason}")
    more = "; …" if len(told) > _SHOWN_PROBLEMS else ""
    lines = f"{len(told):,} line{'s' if len(told) > 1 else ''}"
    notes = [f"{lines} left out ({'; '.join(told[:_SHOWN_PROBLEMS])}{more})"] if told else []
    if not _ends_whole(path):
        notes.append("the last line is cut off: the run was interrupted, or is writing it now")
    if columns.schemas[1]:
        notes.append(f"{columns.schemas[1]:,} of {columns.schemas.total():,} lines have schema 1: gates by expert, prototypes, "
                     "waits and tables by class and patch were not logged then")
    return arrange(path, columns, notes)


def arrange(path: Path, columns: Columns, notes: list[str]) -> RoutingLog:
    """Make arrays of what was read; `notes` gets what had to be put right."""
    lines = _Lines.of(columns, notes)
    steps, experts, bins = lines.steps, columns.experts, int(lines.keys[-1, 4])
    covered = np.zeros(len(steps), dtype=np.int64)
    covered[lines.step_index] = lines.keys[:, 1]
    _note_coverage(steps, covered, notes)
    has_bins = lines.keys[:, 4] == bins
    if not has_bins.all():
        notes.append(f"noise levels were cut into {bins} bins from step {lines.keys[has_bins][0, 0]:,} on and otherwise before: "
                     "figures by noise level begin there")
    tokens = np.frombuffer(columns.tokens, dtype=np.int64).reshape(-1, experts)
    counts = np.frombuffer(columns.counts, dtype=np.int64).reshape(-1, 3)
    floats = np.frombuffer(columns.floats, dtype=np.float64).reshape(-1, 2)
    tokens_TLQE = np.zeros((len(steps), len(lines.layers), bins, experts), dtype=np.int64)
    tokens_TLQE[lines.step_index[has_bins], lines.layer_index[has_bins], lines.keys[has_bins, 3]] = tokens[lines.kept][has_bins]
    totals, gates = lines.total(tokens), lines.total(np.frombuffer(columns.gates, dtype=np.float64).reshape(-1, experts))
    weights = np.where(np.isnan(floats[:, 0]), 0, tokens.sum(axis=1))
    gate_sums, weights = lines.total(np.nan_to_num(floats[:, 0]) * weights), lines.total(weights)
    details = _spread(columns, steps, lines.layers)
    by_expert = (tokens_TLQE, totals, gates, details[..., :experts], details[..., experts:2 * experts])
    for (step, layer), order in columns.orders.items():
        at = tuple(np.searchsorted(known, value) for known, value in ((steps, step), (lines.layers, layer)))
        if at[0] < len(steps) and steps[at[0]] == step and at[1] < len(lines.layers) and lines.layers[at[1]] == layer:
            for values in by_expert:
                values[at] = by_first_number(values[at], order)
    nothing = np.full((experts, experts), np.nan)
    ep_size, ranks = columns.placement
    return RoutingLog(
        path=path, layers=[int(layer) for layer in lines.layers], steps_T=steps, covered_T=covered, tokens_TLE=totals,
        tokens_TLQE=tokens_TLQE, routed_TL=lines.total(counts[:, 0]), null_TL=lines.total(counts[:, 1]), gates_TLE=gates,
        gate_mean_TL=np.divide(gate_sums, weights, out=np.full(weights.shape, np.nan), where=weights > 0),
        similarity_TL=lines.last(floats[:, 1], np.nan), bytes_TL=lines.last(counts[:, 2], 0),
        to_centroid_TLE=details[..., :experts], to_others_TLE=details[..., experts:2 * experts],
        rank_uneven_TL=details[..., 2 * experts], wait_TLX=details[..., 2 * experts + 1:],
        matrix_LEE=np.array([columns.matrices.get(int(layer), nothing) for layer in lines.layers]),
        order_LE=np.array([columns.newest_order.get(int(layer), tuple(range(experts))) for layer in lines.layers]),
        ep_size=ep_size, ranks=ranks, tables=_tables(columns, notes), notes=notes)


@dataclass(frozen=True, kw_only=True)
class _Lines:
    """Which lines count, and where each of them belongs.

    kept: places of the lines, in order; keys: theirs; order, starts: the same by interval and layer.
    """

    kept: np.ndarray
    keys: np.ndarray
    steps: np.ndarray
    layers: np.ndarray
    step_index: np.ndarray
    layer_index: np.ndarray
    order: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, columns: Columns, notes: list[str]) -> _Lines:
        """Leave out what was done again later, and of lines that stand twice the first."""
        keys = np.frombuffer(columns.keys, dtype=np.int64).reshape(-1, 5)
        kept = np.flatnonzero(_newest_branch(keys, notes))
        steps, step_index = np.unique(keys[kept, 0], return_inverse=True)
        # A step has one number of bins: that of its last line.
        bins_T = np.zeros(len(steps), dtype=np.int64)
        bins_T[step_index] = keys[kept, 4]
        kept = kept[keys[kept, 4] == bins_T[step_index]]
        step_index = np.searchsorted(steps, keys[kept, 0])
        layers, layer_index = np.unique(keys[kept, 2], return_inverse=True)
        places = np.ravel_multi_index((step_index, layer_index, keys[kept, 3]), (len(steps), len(layers), int(bins_T.max())))
        # Of lines that stand twice the last.
        unique = np.sort(len(kept) - 1 - np.unique(places[::-1], return_index=True)[1])
        kept, step_index, layer_index = kept[unique], step_index[unique], layer_index[unique]
        if missing := int(bins_T.sum()) * len(layers) - len(kept):
            notes.append("1 line of a layer and bin is missing and counts as no tokens" if missing == 1 else
                         f"{missing:,} lines of a layer and bin are missing and count as no tokens")
        flat = step_index * len(layers) + layer_index
        order = np.argsort(flat, kind="stable")
        starts = np.flatnonzero(np.diff(flat[order], prepend=-1))
        return cls(kept=kept, keys=keys[kept], steps=steps, layers=layers, step_index=step_index, layer_index=layer_index,
                   order=order, starts=starts)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum the lines of every interval and layer (T, L, ...)."""
        sums = np.add.reduceat(values[self.kept[self.order]], self.starts, axis=0)
        return self._place(sums, 0)

    def last(self, values: np.ndarray, like: float) -> np.ndarray:
        """Return what the last line of every interval and layer says (T, L), `like` where there is none."""
        ends = np.append(self.starts[1:], len(self.order)) - 1
        return self._place(values[self.kept[self.order[ends]]], like)

    def _place(self, values: np.ndarray, like: float) -> np.ndarray:
        result = np.full((len(self.steps), len(self.layers), *values.shape[1:]), like, dtype=values.dtype)
        first = self.order[self.starts]
        result[self.step_index[first], self.layer_index[first]] = values
        return result


def _newest_branch(keys: np.ndarray, notes: list[str]) -> np.ndarray:
    """Return which lines stay: where a log goes back in steps, or an interval begins before earlier ones, those were repeated."""
    kept, steps = np.ones(len(keys), dtype=bool), keys[:, 0]
    starts = steps - keys[:, 1]
    changes = np.flatnonzero(np.diff(steps)) + 1
    for place in changes[starts[changes] < steps[changes - 1]]:
        before, start = steps[place - 1], starts[place]
        repeated = (steps[:place] >= steps[place]) | ((steps[:place] > start) & (starts[:place] >= start))
        if (kept[:place] & repeated).any():
            kept[:place] &= ~repeated
            notes.append(f"the run went back from step {before:,} to {start:,}; what it did twice counts once, as it was done last")
    return kept


def _note_coverage(steps: np.ndarray, covered: np.ndarray, notes: list[str]) -> None:
    """Say which steps no interval covers, and which two do."""
    before = np.concatenate([[0], steps[:-1]])
    twice = int(np.maximum(0, before - (steps - covered)).sum())
    if gap := int(np.maximum(0, steps - covered - before).sum()):
        notes.append(f"{gap:,} of {steps[-1]:,} steps are not covered: they ended in an interruption or before this log began")
    if twice:
        notes.append(f"{twice:,} of {steps[-1]:,} steps count twice: a resume began within a log interval")


def _spread(columns: Columns, steps: np.ndarray, layers: np.ndarray) -> np.ndarray:
    """Return the details (T, L, ...), NaN where a line has none; of a step done twice the later one's."""
    width = 2 * columns.experts + 1 + len(EXCHANGES)
    details = np.full((len(steps), len(layers), width), np.nan, dtype=np.float32)
    keys = np.frombuffer(columns.detail_keys, dtype=np.int64).reshape(-1, 2)
    known = np.isin(keys[:, 0], steps) & np.isin(keys[:, 1], layers)
    where = np.searchsorted(steps, keys[known, 0]), np.searchsorted(layers, keys[known, 1])
    details[where] = np.frombuffer(columns.details, dtype=np.float32).reshape(-1, width)[known]
    return details


def _tables(columns: Columns, notes: list[str]) -> dict[str, dict[int, list[tuple[int, np.ndarray]]]]:
    """Return the tables of every layer; of those with several numbers of rows, which are several runs', the newest."""
    result: dict[str, dict[int, list[tuple[int, np.ndarray]]]] = {}
    for name in TABLES:
        # Sorted, so that the newest of a layer comes last.
        ours = sorted((series.newest, layer, rows) for (table, layer, rows), series in columns.tables.items() if table == name)
        chosen = {layer: rows for _, layer, rows in ours}
        if len(ours) > len(chosen):
            notes.append(f"{name} had other numbers of rows before: only the newest kind is shown")
        if chosen:
            result[name] = {layer: columns.tables[name, layer, rows].sums() for layer, rows in sorted(chosen.items())}
    return result


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(0, 2)
        if not file.tell():
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"
