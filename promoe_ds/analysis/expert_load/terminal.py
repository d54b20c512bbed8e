"""The same for a terminal: a table, what is to be said, other placements."""

from __future__ import annotations

import math

import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from promoe_ds.analysis.expert_load.findings import find
from promoe_ds.analysis.expert_load.totals import LayerLoad
from promoe_ds.analysis.expert_load.view import RunView

STYLES = {"bad": "bold red", "warn": "yellow", "good": "green"}
WORDS = {"bad": "act", "warn": "watch", "good": "fine"}


def load_table(loads: list[LayerLoad], dead: list[int], *, covered: str) -> Table:
    """Return one row a layer: each expert's share, evenness, split by condition, prototypes, traffic.

    Args:
        dead: each layer's dead experts.
        covered: which steps are summed, in words.
    """
    table = Table(title=f"Expert load, {covered} (share of routed tokens; max/mean 1.00 = even)", title_justify="left", box=SIMPLE)
    experts = [f"e{expert}" for expert in range(len(loads[0].tokens_per_expert))]
    for name in ("layer", *experts, "max/mean", "CV", "entropy", "dead", "conditional", "null", "prototype cos", "exchanged"):
        table.add_column(name, justify="right", no_wrap=True)
    for load, count in zip(loads, dead, strict=True):
        cosine = "–" if math.isnan(load.prototype_similarity) else f"{load.prototype_similarity:+.2f}"
        table.add_row(str(load.layer), *(f"{share:.1%}" for share in load.shares), f"{load.max_over_mean:.2f}",
                      f"{load.coefficient_of_variation:.2f}", f"{load.entropy:.3f}", str(count), f"{load.conditional_tokens:,}",
                      f"{load.unconditional_tokens:,}", cosine, f"{load.bytes_exchanged / 1e6:,.1f} MB")
    return table


def dead_of(view: RunView) -> list[int]:
    """Return how many experts of each layer are dead now."""
    return [sum(lack.is_dead for lack in view.lacks if lack.layer == layer) for layer in view.log.layers]


def loads_of(view: RunView, window: slice) -> list[LayerLoad]:
    """Return the totals of every layer over a window."""
    log = view.log
    tokens_LE, similarity_L = log.tokens_TLE[window].sum(axis=0), view.newest(log.similarity_TL)
    return [LayerLoad(layer=layer, tokens_per_expert=[int(n) for n in tokens_LE[row]],
                      conditional_tokens=int(log.routed_TL[window, row].sum()),
                      unconditional_tokens=int(log.null_TL[window, row].sum()),
                      prototype_similarity=float(similarity_L[row]), bytes_exchanged=int(log.bytes_TL[window, row].sum()))
            for row, layer in enumerate(log.layers)]


def findings_text(view: RunView) -> Text:
    """Return notes and findings, a line each."""
    text = Text()
    for note in view.notes:
        text.append(f"note: {note}\n", style="dim")
    for finding in find(view):
        text.append(f"{WORDS[finding.level]:>5}: ", style=STYLES[finding.level])
        text.append(f"{finding.title}. ", style="bold")
        text.append(f"{finding.text}\n")
    text.rstrip()
    return text


def placement_table(view: RunView) -> Table:
    """Return what other numbers of ranks and placements would give."""
    table = Table(title=f"Placements (fullest rank over the mean, last {view.window_steps:,} steps; time by estimate)",
                  title_justify="left", box=SIMPLE)
    for name in ("ep_size", "placement", "max/mean", "worst layer", "time lost"):
        table.add_column(name, justify="right", no_wrap=True)
    if not view.tokens_LE.any():
        return table
    rows = [(each.ep_size, each.name, each.uneven_L) for each in view.outlooks]
    if not np.isnan(view.measured_uneven()).all():
        # Beside sums of whole intervals, which all the others are.
        rows.insert(0, (view.log.ep_size, "present, pass by pass", view.present_uneven()))
    for ep_size, name, uneven_L in rows:
        lost = view.time_lost(uneven_L)
        table.add_row(str(ep_size), name, f"{np.nanmean(uneven_L):.3f}", f"{np.nanmax(uneven_L):.3f}",
                      "–" if lost is None else f"{lost:.1%}")
    return table
