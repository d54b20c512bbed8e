"""Reading routing.jsonl into flat arrays, in several processes where it is long."""

from __future__ import annotations

import multiprocessing
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.analysis.expert_load.lines import UnknownSchemaError, iterate_records
from promoe_ds.analysis.expert_load.tables import TableSeries

#: As in moe.collectives, whose torch would take longer to import than a log to read.
EXCHANGES = ("counts", "dispatch", "combine", "combine_backward", "dispatch_backward")
TABLES = ("tokens_per_class", "tokens_per_position")
_MOST_WORKERS, _BYTES_A_WORKER = 8, 1 << 26


@dataclass
class Columns:
    """What is taken from each line, as it comes.

    experts: of the file's first record; lines with another number are left out.
    tables: by name, layer and number of rows. unknown: line and problem of a younger schema.
    """

    experts: int = 0
    keys: array = field(default_factory=lambda: array("q"))  # step, steps, layer, bin, bins
    counts: array = field(default_factory=lambda: array("q"))  # routed, null, bytes
    tokens: array = field(default_factory=lambda: array("q"))
    gates: array = field(default_factory=lambda: array("d"))
    floats: array = field(default_factory=lambda: array("d"))  # gate mean, similarity
    detail_keys: array = field(default_factory=lambda: array("q"))  # step, layer
    details: array = field(default_factory=lambda: array("f"))
    matrices: dict[int, np.ndarray] = field(default_factory=dict)
    orders: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    newest_order: dict[int, tuple[int, ...]] = field(default_factory=dict)
    tables: dict[tuple[str, int, int], TableSeries] = field(default_factory=dict)
    placement: tuple[int, int] = (1, 1)
    schemas: Counter = field(default_factory=Counter)
    broken: list[tuple[int, str]] = field(default_factory=list)
    unknown: tuple[int, str] | None = None
    lines: int = 0

    def take(self, number: int, record: dict[str, Any]) -> None:
        """Take the values of one line, which `problem_of` has found sound."""
        tokens = record["tokens_per_expert"]
        self.experts = self.experts or len(tokens)
        if len(tokens) != self.experts:
            self.broken.append((number, f"has {len(tokens)} experts, the lines before it {self.experts}"))
            return
        gates = record.get("gate_sum_per_expert")
        self.keys.extend((record["step"], record.get("steps", 0), record["layer"], record.get("timestep_bin", 0),
                          record.get("timestep_bins", 1)))
        self.counts.extend((record["conditional_tokens"], record["unconditional_tokens"], record["layer_bytes_exchanged"]))
        self.tokens.extend(tokens)
        # Missing in an older schema, or not finite.
        self.gates.extend(_numbers(gates or [None] * self.experts))
        self.floats.extend(_numbers((record.get("gate_mean"), record["prototype_similarity"])))
        self.schemas[record.get("schema", 1)] += 1
        if (detail := record.get("layer_detail")) is not None:
            self._take_detail(record["step"], record["layer"], detail)

    def _take_detail(self, step: int, layer: int, detail: dict[str, Any]) -> None:
        order = detail.get("experts")
        if order is not None:
            self.orders[step, layer] = tuple(order)
        self.newest_order[layer] = tuple(order or range(self.experts))
        self.placement = (detail["ep_size"], detail["ranks"])
        waits = [detail["exchanges"].get(name, {}).get("seconds") for name in EXCHANGES]
        self.detail_keys.extend((step, layer))
        self.details.extend(_numbers([*detail["prototype_to_centroid"], *detail["prototype_to_other_centroids"],
                                      detail["rank_max_over_mean"], *waits]))
        if (matrix := detail.get("prototype_similarity_matrix")) is not None:
            values = by_first_number(np.array(matrix, dtype=float), order)
            self.matrices[layer] = by_first_number(values.T, order).T
        for name in TABLES:
            if (table := detail.get(name)) is not None:
                counts = by_first_number(np.array(table["counts"], dtype=np.int64), order)
                self.tables.setdefault((name, layer, len(counts)), TableSeries()).add(step, counts)

    def join(self, later: Columns) -> None:
        """Add what was read from the lines that follow."""
        self.broken += [(self.lines + number, problem) for number, problem in later.broken]
        if self.unknown is None and later.unknown is not None:
            self.unknown = (self.lines + later.unknown[0], later.unknown[1])
        for name in ("keys", "counts", "tokens", "gates", "floats", "detail_keys", "details"):
            getattr(self, name).extend(getattr(later, name))
        for name in ("matrices", "orders", "newest_order"):
            getattr(self, name).update(getattr(later, name))
        for key, series in later.tables.items():
            self.tables.setdefault(key, TableSeries()).join(series)
        self.placement = later.placement if later.newest_order else self.placement
        self.schemas += later.schemas
        self.experts, self.lines = self.experts or later.experts, self.lines + later.lines


def read_columns(path: Path) -> Columns:
    """Read all lines; a long file in several processes, each a stretch of it, with the same result.

    Raises: UnknownSchemaError if a younger package wrote a line.
    """
    size = path.stat().st_size
    workers = max(1, min(os.cpu_count() or 1, _MOST_WORKERS, size // _BYTES_A_WORKER))
    if workers == 1:
        columns = _read_stretch(path, 0, 0, None)
    else:
        starts = [next_line(path, size * worker // workers) for worker in range(workers)]
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            columns, *later = pool.map(partial(_read_stretch, path, _first_experts(path)), starts, [*starts[1:], None])
        for each in later:
            columns.join(each)
    if columns.unknown is not None:
        raise UnknownSchemaError(path, *columns.unknown)
    return columns


def _first_experts(path: Path) -> int:
    """Return the experts of the first record, which all stretches measure their lines by; 0 where there is none."""
    try:
        _, record = next(iterate_records(path, refuse=lambda *_: None), (0, {"tokens_per_expert": []}))
    except UnknownSchemaError:
        return 0  # told by the stretch that holds the line
    return len(record["tokens_per_expert"])


def next_line(path: Path, position: int) -> int:
    """Return where the first line begins at or after a position, in bytes."""
    if not position:
        return 0
    with path.open("rb") as file:
        file.seek(position - 1)
        file.readline()
        return file.tell()


def _read_stretch(path: Path, experts: int, start: int, stop: int | None) -> Columns:
    columns = Columns(experts)
    records = iterate_records(path, refuse=lambda number, problem: columns.broken.append((number, problem)), start=start, stop=stop,
                              tell=lambda _, lines: setattr(columns, "lines", lines))
    try:
        for number, record in records:
            columns.take(number, record)
    except UnknownSchemaError as error:
        columns.unknown = (error.number, error.problem)
    return columns


def by_first_number(values: np.ndarray, order: Sequence[int] | None) -> np.ndarray:
    """Return values, whose last dimension goes by place, by the experts' first numbers."""
    if order is None:
        return values
    result = np.empty_like(values)
    result[..., list(order)] = values
    return result


def _numbers(values: Sequence[float | None]) -> Sequence[float]:
    """Return values with NaN for what was not logged."""
    return [np.nan if value is None else value for value in values] if None in values else values
