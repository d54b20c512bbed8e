"""A run's routing.jsonl as columns, a row an expert, for whoever makes tables and figures of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from promoe_ds.logs import get_logger
from promoe_ds.reports.intervals import KeptLines
from promoe_ds.reports.log import collect
from promoe_ds.reports.records import log_file

_LOG = get_logger("reports")
_LINE = ("step", "steps", "layer", "timestep_bin", "timestep_bins")


def read_columns(run_dir: Path) -> dict[str, np.ndarray]:
    """Return the columns of `promoe_ds.read_routing`, by step, layer, bin and expert.

    What is left out of the file is logged as a warning.
    Raises: DataError as `load_log`.
    """
    columns, notes = collect(log_file(run_dir))
    keys = np.frombuffer(columns.keys, dtype=np.int64).reshape(-1, len(_LINE))
    lines = KeptLines.of(keys, notes)
    for note in notes:
        _LOG.warning("%s: %s", run_dir, note)
    # The last of equal lines counts, as in every report.
    places = np.ravel_multi_index(lines.at, lines.shape)[::-1]
    chosen = lines.kept[::-1][np.unique(places, return_index=True)[1]]
    experts, keys = columns.experts, keys[chosen]
    counts = np.frombuffer(columns.counts, dtype=np.int64).reshape(-1, 3 + experts)[chosen]
    floats = np.frombuffer(columns.floats, dtype=float).reshape(-1, 2 + experts)[chosen]
    of_line = {
        **dict(zip(_LINE, keys.T, strict=True)),
        "conditional_tokens": counts[:, 0],
        "unconditional_tokens": counts[:, 1],
    }
    return {
        **{name: values.repeat(experts) for name, values in of_line.items()},
        "expert": np.tile(np.arange(experts), len(keys)),
        "tokens": counts[:, 3:].ravel(),
        "gate_sum": floats[:, 2:].ravel(),
    }
