"""A run's routing.jsonl as arrays, however long it is; `notes` says what was left out or corrected.

Letters: T log intervals, L MoE layers, Q timestep bins, E routed experts, X exchanges.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.errors import DataError, first_few
from promoe_ds.load_stats import divide
from promoe_ds.reports.intervals import KeptLines
from promoe_ds.reports.records import TABLES, Exchanges, LayerDetail, Line, log_file, read_lines

EXCHANGES = Exchanges.__struct_fields__
#: Sums that a table over training is kept in.
_MOST_PARTS = 64


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
    return columns.arrange(path, notes)


def collect(path: Path) -> tuple[Columns, list[str]]:
    """Return what a file's lines say, and notes about those that were left out.

    Raises: as `load_log`.
    """
    columns = Columns()
    problems, schemas, is_cut = [], [], False
    for number, _, line, problem in read_lines(path):
        if line is not None and not (problem := columns.take(line)):
            schemas.append(line.schema)
        elif problem:
            problems.append(f"line {number:,}: {problem}")
        else:
            is_cut = True
    if not schemas:
        reason = "is empty: the run has no MoE layer or did not reach its first log step"
        if problems:
            reason = f"has no routing record: {first_few(problems)}"
        elif is_cut:
            reason = "has no complete line: the run was interrupted in its first log step"
        raise DataError(f"{path} {reason}")
    notes = []
    if problems:
        plural = "s" if len(problems) > 1 else ""
        notes.append(f"{len(problems):,} line{plural} left out ({first_few(problems)})")
    if is_cut:
        notes.append("the last line is cut off: the run was interrupted, or is writing it now")
    if early := schemas.count(1):
        notes.append(
            f"{early:,} of {len(schemas):,} lines have schema 1: gates by expert, prototypes, waits"
            " and tables by class and patch were not logged then"
        )
    return columns, notes


def by_first_number(values: np.ndarray, order: Sequence[int] | None) -> np.ndarray:
    """Return values, whose last dimension goes by place, by the experts' first numbers."""
    return values if order is None else values[..., np.argsort(order)]


@dataclass
class _Series:
    """Sums of a table over stretches of training of equal numbers of tables."""

    width: int = 1
    parts: list[tuple[int, int, np.ndarray]] = field(default_factory=list)

    def add(self, step: int, counts: np.ndarray) -> None:
        """Add the table of a step; one that goes back in steps replaces what was repeated."""
        self.parts = [part for part in self.parts if part[0] < step]
        if self.parts and self.parts[-1][1] < self.width:
            _, tables, total = self.parts.pop()
            self.parts.append((step, tables + 1, total + counts))
        else:
            self.parts.append((step, 1, counts))
        if len(self.parts) > _MOST_PARTS:
            self.width *= 2
            pairs = zip_longest(self.parts[::2], self.parts[1::2])
            self.parts = [
                one if two is None else (two[0], one[1] + two[1], one[2] + two[2])
                for one, two in pairs
            ]


@dataclass
class Columns:
    """What is taken from each line, in the order of the file; by the experts' first numbers.

    experts: of the first line; lines with another number are left out; orders: the expert at each
    place, of layers whose experts have moved, else None: stated by the line of bin 0, which comes
    first.
    """

    experts: int = 0
    keys: array = field(default_factory=lambda: array("q"))  # step, steps, layer, bin, bins
    counts: array = field(default_factory=lambda: array("q"))  # routed, null, bytes, tokens
    floats: array = field(default_factory=lambda: array("d"))  # gate mean, similarity, gates
    details: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)  # by step and layer
    matrices: dict[int, np.ndarray] = field(default_factory=dict)
    orders: dict[int, list[int] | None] = field(default_factory=dict)
    tables: dict[tuple[str, int, int], _Series] = field(default_factory=dict)
    placement: tuple[int, int] = (1, 1)
    patch_columns: int | None = None

    def take(self, line: Line) -> str:
        """Take a line's values; return why it is left out, "" if it is not."""
        tokens = line.tokens_per_expert
        self.experts = self.experts or len(tokens)
        if len(tokens) != self.experts:
            return f"has {len(tokens)} experts, the lines before it {self.experts}"
        if line.layer_detail is not None:
            self._take_detail(line.step, line.layer, line.layer_detail)
        self.keys.extend((line.step, line.steps, line.layer, line.timestep_bin, line.timestep_bins))
        self.counts.extend(
            (
                line.conditional_tokens,
                line.unconditional_tokens,
                line.layer_bytes_exchanged,
                *self._by_number(line.layer, tokens),
            )
        )
        gates = self._by_number(line.layer, line.gate_sum_per_expert or [None] * self.experts)
        values = np.array([line.gate_mean, line.prototype_similarity, *gates], dtype=float)
        self.floats.extend(values.tolist())  # NaN for what was not logged
        return ""

    def _by_number(self, layer: int, values: Sequence[Any]) -> Sequence[Any]:
        """Return a layer's values, which go by place, by the experts' first numbers."""
        order = self.orders.get(layer)
        return values if order is None else by_first_number(np.array(values), order).tolist()

    def _take_detail(self, step: int, layer: int, detail: LayerDetail) -> None:
        order = self.orders[layer] = detail.experts
        self.placement = (detail.ep_size, detail.ranks)
        values = [
            *self._by_number(layer, detail.prototype_to_centroid),
            *self._by_number(layer, detail.prototype_to_other_centroids),
            detail.rank_max_over_mean,
            *(getattr(detail.exchanges, name).seconds for name in EXCHANGES),
        ]
        self.details[step, layer] = np.array(values, dtype=np.float32)
        if (matrix := detail.prototype_similarity_matrix) is not None:
            cosines = by_first_number(np.array(matrix, dtype=float), order)
            self.matrices[layer] = by_first_number(cosines.T, order).T
        if detail.tokens_per_position is not None:
            self.patch_columns = detail.tokens_per_position.columns
        for name in TABLES:
            if (table := getattr(detail, name)) is not None:
                counts = by_first_number(np.array(table.counts, dtype=np.int64), order)
                self.tables.setdefault((name, layer, len(counts)), _Series()).add(step, counts)

    def arrange(self, path: Path, notes: list[str]) -> RoutingLog:
        """Make arrays of what was taken; `notes` gets what had to be corrected."""
        lines = KeptLines.of(np.frombuffer(self.keys, dtype=np.int64).reshape(-1, 5), notes)
        experts, bins, steps = self.experts, int(lines.bins_T[-1]), lines.steps_T
        has_bins_T = lines.bins_T == bins
        if not has_bins_T.all():
            notes.append(
                f"noise levels were cut into {bins} bins from step {steps[has_bins_T][0]:,} on and"
                " otherwise before: figures by noise level begin there"
            )
        counts = np.frombuffer(self.counts, dtype=np.int64).reshape(-1, 3 + experts)
        floats = np.frombuffer(self.floats, dtype=float).reshape(-1, 2 + experts)
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
                [self.details.get((step, layer), unknown) for layer in layers]
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
            gate_mean_TL=divide(
                lines.spread(gates_N).sum(axis=2), lines.spread(weights_N).sum(axis=2)
            ),
            similarity_TL=lines.last(floats[:, 1], np.nan),
            bytes_TL=lines.last(counts[:, 2], 0),
            to_centroid_TLE=details[..., :experts],
            to_others_TLE=details[..., experts : 2 * experts],
            rank_uneven_TL=details[..., 2 * experts],
            wait_TLX=details[..., 2 * experts + 1 :],
            matrix_LEE=np.array([self.matrices.get(layer, unknown_EE) for layer in layers]),
            order_LE=np.array([self.orders.get(layer) or plain for layer in layers]),
            ep_size=self.placement[0],
            ranks=self.placement[1],
            tables=self._tables(notes),
            patch_columns=self.patch_columns,
            notes=notes,
        )

    def _tables(self, notes: list[str]) -> dict[str, dict[int, list[tuple[int, np.ndarray]]]]:
        """Return every layer's tables; of those with several numbers of rows the newest."""
        result: dict[str, dict[int, list[tuple[int, np.ndarray]]]] = {}
        ours = sorted(self.tables.items(), key=lambda item: item[1].parts[-1][0])
        for (name, layer, _), series in ours:
            result.setdefault(name, {})[layer] = [(step, total) for step, _, total in series.parts]
        notes += [
            f"{name} had other numbers of rows before: only the newest kind is shown"
            for name, by_layer in result.items()
            if sum(key[0] == name for key in self.tables) > len(by_layer)
        ]
        return result
