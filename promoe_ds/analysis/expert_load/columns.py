"""Reading routing.jsonl into flat arrays, in several processes where it is long."""

from __future__ import annotations

import multiprocessing
import os
from array import array
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.analysis.expert_load.lines import iterate_records
from promoe_ds.errors import DataError

#: As in moe.collectives, whose torch would take longer to import than a log to read.
EXCHANGES = ("counts", "dispatch", "combine", "combine_backward", "dispatch_backward")
_LONGEST_SERIES = 64
_MOST_WORKERS, _BYTES_A_WORKER = 8, 1 << 26


@dataclass
class Columns:
    """What is taken from each line, as it comes."""

    keys: array = field(default_factory=lambda: array("q"))  # step, steps, layer, bin, bins
    counts: array = field(default_factory=lambda: array("q"))  # routed, null, bytes
    tokens: array = field(default_factory=lambda: array("q"))
    gates: array = field(default_factory=lambda: array("d"))
    floats: array = field(default_factory=lambda: array("d"))  # gate mean, similarity
    detail_keys: array = field(default_factory=lambda: array("q"))  # step, layer
    details: array = field(default_factory=lambda: array("f"))
    matrices: dict[int, list[list[float]]] = field(default_factory=dict)
    orders: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    newest_order: dict[int, tuple[int, ...]] = field(default_factory=dict)
    tables: dict[str, dict[int, list[tuple[int, np.ndarray]]]] = field(default_factory=dict)
    placement: tuple[int, int] = (1, 1)
    schemas: Counter = field(default_factory=Counter)
    problems: list[tuple[int, str]] = field(default_factory=list)
    broken: list[tuple[int, str]] = field(default_factory=list)
    experts: int = 0
    lines: int = 0

    def take(self, number: int, record: dict[str, Any]) -> None:
        """Take one line's values."""
        tokens = record["tokens_per_expert"]
        if self.experts and len(tokens) != self.experts:
            self.problems.append((number, f"has {len(tokens)} experts, lines before it {self.experts}: left out"))
            return
        self.experts = len(tokens)
        layer, bin_ = record["layer"], record.get("timestep_bin", 0)
        gates = record.get("gate_sum_per_expert")
        gate_mean = record.get("gate_mean")
        self.keys.extend((record["step"], record.get("steps", 0), layer, bin_, record.get("timestep_bins", 1)))
        self.counts.extend((record["conditional_tokens"], record["unconditional_tokens"], record["layer_bytes_exchanged"]))
        self.tokens.extend(tokens)
        if gates is None or None in gates:  # an older schema, or gates that were not finite
            gates = [np.nan if gate is None else gate for gate in gates or [None] * self.experts]
        self.gates.extend(gates)
        similarity = record["prototype_similarity"]
        self.floats.extend((np.nan if gate_mean is None else gate_mean, np.nan if similarity is None else similarity))
        self.schemas[record.get("schema", 1)] += 1
        if (detail := record.get("layer_detail")) is not None:
            self._take_detail(record["step"], layer, detail)

    def _take_detail(self, step: int, layer: int, detail: dict[str, Any]) -> None:
        order = detail.get("experts")
        if order is not None:
            self.orders[step, layer] = tuple(order)
        self.newest_order[layer] = tuple(order or range(self.experts))
        self.placement = (detail["ep_size"], detail["ranks"])
        waits = [detail["exchanges"].get(name, {}).get("seconds", 0.0) for name in EXCHANGES]
        uneven = detail["rank_max_over_mean"]
        values = [*detail["prototype_to_centroid"], *detail["prototype_to_other_centroids"], uneven, *waits]
        self.detail_keys.extend((step, layer))
        self.details.extend(np.nan if value is None else value for value in values)
        self.matrices[layer] = detail["prototype_similarity_matrix"]
        for name in ("tokens_per_class", "tokens_per_position"):
            if name in detail:
                counts = np.array(detail[name]["counts"], dtype=np.int64)
                _append(self.tables.setdefault(name, {}).setdefault(layer, []), step, by_first_number(counts, order))


    def join(self, later: Columns) -> None:
        """Add what was read from the lines that follow."""
        if self.experts and later.experts and self.experts != later.experts:
            raise DataError(f"the first {self.lines:,} lines have {self.experts} experts, those after them {later.experts}: they "
                            "are two runs' in one file")
        for name in ("keys", "counts", "tokens", "gates", "floats", "detail_keys", "details"):
            getattr(self, name).extend(getattr(later, name))
        for name in ("matrices", "orders", "newest_order"):
            getattr(self, name).update(getattr(later, name))
        for name, by_layer in later.tables.items():
            for layer, series in by_layer.items():
                for step, counts in series:
                    _append(self.tables.setdefault(name, {}).setdefault(layer, []), step, counts)
        self.placement = later.placement if later.newest_order else self.placement
        self.schemas += later.schemas
        self.problems += [(self.lines + number, problem) for number, problem in later.problems]
        self.broken += [(self.lines + number, problem) for number, problem in later.broken]
        self.experts, self.lines = self.experts or later.experts, self.lines + later.lines


def read_columns(path: Path) -> Columns:
    """Read all lines; a long file in several processes, each a stretch of it."""
    size = path.stat().st_size
    workers = max(1, min(os.cpu_count() or 1, _MOST_WORKERS, size // _BYTES_A_WORKER))
    if workers == 1:
        return _read_stretch(path, 0, None)
    starts = [_next_line(path, size * worker // workers) for worker in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        first, *later = pool.map(_read_stretch, [path] * workers, starts, [*starts[1:], None])
    for columns in later:
        first.join(columns)
    return first


def _next_line(path: Path, position: int) -> int:
    """Return where the first line begins at or after a position."""
    if not position:
        return 0
    with path.open("rb") as file:
        file.seek(position - 1)
        file.readline()
        return file.tell()


def _read_stretch(path: Path, start: int, stop: int | None) -> Columns:
    columns = Columns()
    records = iterate_records(path, refuse=lambda number, problem: columns.broken.append((number, problem)), start=start, stop=stop,
                              tell=lambda _, lines: setattr(columns, "lines", lines))
    for number, record in records:
        try:
            columns.take(number, record)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"{path}, line {number}: cannot be understood ({type(error).__name__}: {error})") from None
    return columns


def by_first_number(values: np.ndarray, order: tuple[int, ...] | list[int] | None) -> np.ndarray:
    """Return values, whose last dimension goes by place, by the experts' first numbers."""
    if order is None:
        return values
    result = np.empty_like(values)
    result[..., list(order)] = values
    return result


def _append(series: list[tuple[int, np.ndarray]], step: int, counts: np.ndarray) -> None:
    """Add a table; a long series is thinned by summing neighbours, so that memory stays small."""
    while series and series[-1][0] >= step:
        series.pop()  # an abandoned branch's
    series.append((step, counts))
    if len(series) > _LONGEST_SERIES:
        head = series[-1:] if len(series) % 2 else []
        pairs = [(b[0], a[1] + b[1]) for a, b in zip(series[:-1:2] if head else series[::2], series[1::2], strict=False)]
        series[:] = pairs + head
