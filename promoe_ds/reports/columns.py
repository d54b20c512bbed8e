"""What the lines of a routing.jsonl say, as columns of plain numbers: a log may be long."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.errors import DataError, first_few
from promoe_ds.reports.records import EXCHANGES, TABLES, LayerDetail, Line, read_lines

#: Of every line: where it belongs.
KEYS = ("step", "steps", "layer", "timestep_bin", "timestep_bins")
_keys_of = attrgetter(*KEYS)
#: Sums that a table over training is kept in.
_MOST_PARTS = 64


@dataclass
class Columns:
    """What is taken from each line, in the order of the file; by the experts' first numbers.

    experts: of the first line; lines with another number are left out; orders: the expert at each
    place, of layers whose experts have moved, else None: stated by the line of bin 0, which comes
    first.
    """

    experts: int = 0
    keys: array = field(default_factory=lambda: array("q"))  # as KEYS
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
        self.keys.extend(_keys_of(line))
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

    def by_line(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return keys, counts and floats, a row a line."""
        return (
            np.frombuffer(self.keys, dtype=np.int64).reshape(-1, len(KEYS)),
            np.frombuffer(self.counts, dtype=np.int64).reshape(-1, 3 + self.experts),
            np.frombuffer(self.floats, dtype=float).reshape(-1, 2 + self.experts),
        )


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
