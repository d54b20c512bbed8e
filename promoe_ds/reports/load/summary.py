"""What promoe-load prints of a run, and the placement that it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from promoe_ds.errors import DataError
from promoe_ds.reports.load.placement import advise, unevenness, write_placement
from promoe_ds.reports.load.run import RunView
from promoe_ds.reports.load.terminal import findings_text, load_table, placement_table


def summarise(view: RunView, console: Console, *, everything: bool, is_named: bool) -> None:
    """Print a run's table, findings and placements."""
    if is_named:
        console.rule(view.name)
    table = load_table(
        view,
        slice(None) if everything else view.window,
        covered="all steps" if everything else f"last {view.window_steps:,} steps",
    )
    # Never wrapped: a narrow terminal or a pipe gets the whole line.
    Console(width=max(console.width, Console(width=1000).measure(table).maximum)).print(table)
    console.print(findings_text(view), soft_wrap=True)
    console.print(placement_table(view))


def place(view: RunView, console: Console, path: Path, ep_size: int | None) -> None:
    """Write the advised placement and say what it is expected to give.

    Raises: DataError if the window has no tokens to judge by.
    """
    size = ep_size or view.log.ep_size
    if not view.tokens_LE.any():
        raise DataError(
            f"--placement {path}: no token was routed in the last {view.window_steps:,} steps, so"
            " there is nothing to judge by: take a longer window with --last-steps"
        )
    order = advise(view.log, view.window, size)
    tokens = view.log.tokens_TLE[view.window]
    before, after = (
        np.nanmean(unevenness(tokens, each, size)) for each in (view.log.order_LE, order)
    )
    write_placement(path, view.log, order, size)
    moved = int((order != view.log.order_LE).sum())
    what = (
        f"{moved} of {order.size} experts move"
        if moved
        else "no expert moves, nothing better was found"
    )
    change = f"{before:.3f} -> {after:.3f}" if moved else f"{before:.3f}"
    apply = (
        f" Apply it at the next resume: --set parallel.expert_placement={path}"
        if moved or size != view.log.ep_size
        else ""
    )
    console.print(
        f"placement: {path}: {what}; fullest of {size} ranks over the mean {change}.{apply}",
        soft_wrap=True,
    )
