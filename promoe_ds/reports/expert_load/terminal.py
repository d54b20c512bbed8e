"""The report for a terminal: a table of loads, the findings, other placements."""

from __future__ import annotations

import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from promoe_ds.load_stats import entropy, max_over_mean, shares, variation
from promoe_ds.reports.expert_load.findings import TAGS, Finding, find
from promoe_ds.reports.expert_load.run import RunView

STYLES = {"bad": "bold red", "warn": "yellow", "good": "green"}


def load_table(view: RunView, window: slice, *, covered: str) -> Table:
    """Return one row a layer: each expert's share, evenness, split by condition, prototypes,
    traffic.

    Args:
        window: intervals that are summed; covered: these in words.
    """
    log = view.log
    tokens_LE = log.tokens_TLE[window].sum(axis=0)
    columns = {
        **{f"e{expert}": (column, "{:.1%}") for expert, column in enumerate(shares(tokens_LE).T)},
        "max/mean": (max_over_mean(tokens_LE), "{:.2f}"),
        "CV": (variation(tokens_LE), "{:.2f}"),
        "entropy": (entropy(tokens_LE), "{:.3f}"),
        "dead": (view.starved_L(is_dead=True), "{}"),
        "conditional": (log.routed_TL[window].sum(axis=0), "{:,}"),
        "null": (log.null_TL[window].sum(axis=0), "{:,}"),
        "prototype cos": (view.newest(log.similarity_TL), "{:+.2f}"),
        "exchanged": (log.bytes_TL[window].sum(axis=0) / 1e6, "{:,.1f} MB"),
    }
    return _table(
        f"Expert load, {covered} (share of routed tokens; max/mean 1.00 = even)",
        ["layer", *columns],
        [
            [str(layer), *(words(values[row], form) for values, form in columns.values())]
            for row, layer in enumerate(log.layers)
        ],
    )


def placement_table(view: RunView) -> Table:
    """Return what other numbers of ranks and placements would give."""
    rows = (
        [(each.ep_size, each.name, each.uneven_L) for each in view.candidates]
        if view.tokens_LE.any()
        else []
    )
    if rows and not np.isnan(view.measured_uneven).all():
        # Beside sums of whole intervals, which all the others are.
        rows.insert(0, (view.log.ep_size, "present, pass by pass", view.present_uneven))
    return _table(
        f"Placements (fullest rank over the mean, last {view.window_steps:,} steps; time by"
        " estimate)",
        ["ep_size", "placement", "max/mean", "worst layer", "time lost"],
        [
            [
                str(ep_size),
                name,
                f"{np.nanmean(uneven_L):.3f}",
                f"{np.nanmax(uneven_L):.3f}",
                words(view.time_lost(uneven_L), "{:.1%}"),
            ]
            for ep_size, name, uneven_L in rows
        ],
    )


def findings_text(view: RunView) -> Text:
    """Return notes and findings, a line each."""
    notes = [Text(f"note: {note}", style="dim") for note in view.notes]
    return Text("\n").join([*notes, *map(finding_text, find(view))])


def finding_text(finding: Finding) -> Text:
    """Return a finding on one line."""
    return Text.assemble(
        (f"{TAGS[finding.level]:>5}: ", STYLES[finding.level]),
        (f"{finding.title}. ", "bold"),
        finding.text,
    )


def words(value: float | None, form: str) -> str:
    """Return a number in a form, a dash for none."""
    return "–" if value is None or np.isnan(value) else form.format(value)


def _table(title: str, head: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in head:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
