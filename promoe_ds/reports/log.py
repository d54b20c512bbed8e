"""A run's routing.jsonl as arrays, however long it is, and as columns for whoever makes tables and
figures of it; notes say what was left out or corrected.

Letters: T log intervals, L MoE layers, Q timestep bins, E routed experts, X exchanges.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promoe_ds.load_stats import divide
from promoe_ds.logs import get_logger
from promoe_ds.reports.columns import KEYS, Columns, collect
from promoe_ds.reports.intervals import KeptLines
from promoe_ds.reports.records import EXCHANGES, log_file

_LOG = get_logger("reports")


@dataclass(frozen=True, kw_only=True)
class RoutingLog:
    """Statistics by interval. Experts have the numbers of the start of the run, wherever they are.

    steps_T: steps finished; covered_T: steps that an interval counts.
    tokens_TLE, routed_TL, null_TL: assignments, routed and unconditional tokens; 0 if a line
        is missing.
    tokens_TLQE: assignments by noise level, of the intervals that have the newest number of levels;
        0 in the others.
    gates_TLE: sums of gates, NaN in schema 1; gate_mean_TL.
    similarity_TL, bytes_TL: of the prototypes, and exchanged.
    to_centroid_TLE, to_others_TLE: cosines of each prototype with the centroid of its tokens, and
        the mean with the others'.
    rank_uneven_TL: rows of the fullest rank over the mean, pass by pass; wait_TLX: seconds per
        rank; NaN if not logged.
    matrix_LEE: the prototypes' newest logged cosines, NaN if there are none.
    order_LE: the expert at each place, now; ep_size: ranks that share a set of experts, now.
    tables: name -> layer -> [(last step, rows x E counts)], e.g. "tokens_per_class".
    patch_columns: patches beside each other; None: images are square.
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
    patch_columns: int | None
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
        """Return the intervals of the last `last_steps` steps, or last tenth; at least one."""
        newest = int(self.steps_T[-1])
        last = max(1, -(-newest // 10)) if last_steps is None else last_steps
        inside = int((self.steps_T > newest - last).sum())
        return slice(len(self.steps_T) - max(1, inside), len(self.steps_T))

    def table(self, name: str, layer: int, window: slice) -> np.ndarray | None:
        """Return a table's sum over a window, or its newest part; None if never logged."""
        series = self.tables.get(name, {}).get(layer)
        if not series:
            return None
        start = int(self.steps_T[window][0] - self.covered_T[window][0])
        inside = [counts for step, counts in series if step > start]
        return np.sum(inside or [series[-1][1]], axis=0)


def load_log(run_dir: Path) -> RoutingLog:
    """Read a run's routing.jsonl, without broken lines and those that a resume repeated.

    Raises: DataError if there is no such file, nothing in it, or a newer schema.
    """
    path = log_file(run_dir)
    columns, notes = collect(path)
    return arrange(columns, path, notes)


def read_columns(run_dir: Path) -> dict[str, np.ndarray]:
    """Return the columns of `promoe_ds.read_routing`, by step, layer, bin and expert.

    What is left out of the file is logged as a warning.
    Raises: as `load_log`.
    """
    columns, notes = collect(log_file(run_dir))
    tables = columns.by_line()
    lines = KeptLines.of(tables[0], notes)
    for note in notes:
        _LOG.warning("%s: %s", run_dir, note)
    is_there_TLQ = lines.spread(np.ones(len(tables[0]), dtype=bool))
    keys, counts, floats = (lines.spread(table)[is_there_TLQ] for table in tables)
    of_line = {
        **dict(zip(KEYS, keys.T, strict=True)),
        "conditional_tokens": counts[:, 0],
        "unconditional_tokens": counts[:, 1],
    }
    return {
        **{name: values.repeat(columns.experts) for name, values in of_line.items()},
        "expert": np.tile(np.arange(columns.experts), len(keys)),
        "tokens": counts[:, 3:].ravel(),
        "gate_sum": floats[:, 2:].ravel(),
    }


def arrange(columns: Columns, path: Path, notes: list[str]) -> RoutingLog:
    """Make arrays of what was taken; `notes` gets what had to be corrected."""
    keys, counts, floats = columns.by_line()
    lines = KeptLines.of(keys, notes)
    experts, bins, steps = columns.experts, int(lines.bins_T[-1]), lines.steps_T
    has_bins_T = lines.bins_T == bins
    if not has_bins_T.all():
        notes.append(
            f"noise levels were cut into {bins} bins from step {steps[has_bins_T][0]:,} on and"
            " otherwise before: figures by noise level begin there"
        )
    counts_TLQ = lines.spread(counts)
    totals_TL, tokens_TLQE = counts_TLQ.sum(axis=2), counts_TLQ[:, :, :bins, 3:]
    tokens_TLQE[~has_bins_T] = 0
    weights_N = np.where(np.isnan(floats[:, 0]), 0, counts[:, 3:].sum(axis=1))
    gates_N = np.nan_to_num(floats[:, 0]) * weights_N
    layers, plain = lines.layers_L.tolist(), list(range(experts))
    unknown_EE = np.full((experts, experts), np.nan)
    unknown = np.full(2 * experts + 1 + len(EXCHANGES), np.nan, dtype=np.float32)
    details = np.array(
        [
            [columns.details.get((step, layer), unknown) for layer in layers]
            for step in steps.tolist()
        ]
    )
    return RoutingLog(
        path=path,
        layers=layers,
        steps_T=steps,
        covered_T=lines.covered_T,
        tokens_TLE=totals_TL[..., 3:],
        tokens_TLQE=tokens_TLQE,
        routed_TL=totals_TL[..., 0],
        null_TL=totals_TL[..., 1],
        gates_TLE=lines.spread(floats[:, 2:]).sum(axis=2),
        gate_mean_TL=divide(lines.spread(gates_N).sum(axis=2), lines.spread(weights_N).sum(axis=2)),
        similarity_TL=lines.last(floats[:, 1], np.nan),
        bytes_TL=lines.last(counts[:, 2], 0),
        to_centroid_TLE=details[..., :experts],
        to_others_TLE=details[..., experts : 2 * experts],
        rank_uneven_TL=details[..., 2 * experts],
        wait_TLX=details[..., 2 * experts + 1 :],
        matrix_LEE=np.array([columns.matrices.get(layer, unknown_EE) for layer in layers]),
        order_LE=np.array([columns.orders.get(layer) or plain for layer in layers]),
        ep_size=columns.placement[0],
        ranks=columns.placement[1],
        tables=_tables(columns, notes),
        patch_columns=columns.patch_columns,
        notes=notes,
    )


def _tables(
    columns: Columns, notes: list[str]
) -> dict[str, dict[int, list[tuple[int, np.ndarray]]]]:
    """Return every layer's tables; of those with several numbers of rows the newest."""
    result: dict[str, dict[int, list[tuple[int, np.ndarray]]]] = {}
    ours = sorted(columns.tables.items(), key=lambda item: item[1].parts[-1][0])
    for (name, layer, _), series in ours:
        result.setdefault(name, {})[layer] = [(step, total) for step, _, total in series.parts]
    notes += [
        f"{name} had other numbers of rows before: only the newest kind is shown"
        for name, by_layer in result.items()
        if sum(key[0] == name for key in columns.tables) > len(by_layer)
    ]
    return result
