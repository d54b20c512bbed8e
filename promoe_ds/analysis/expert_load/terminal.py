"""The same for a terminal: a table, what is to be said, and a view that follows a run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from promoe_ds.analysis.expert_load.findings import UNEVEN, VERY_UNEVEN, find
from promoe_ds.analysis.expert_load.lines import FILE_NAME, iterate_records, log_file
from promoe_ds.analysis.expert_load.totals import LayerLoad, summarise_load
from promoe_ds.analysis.expert_load.view import RunView

_STYLES = {"bad": "bold red", "warn": "yellow", "good": "green"}
_WORDS = {"bad": "act", "warn": "watch", "good": "fine"}
_BARS = " ▁▂▃▄▅▆▇█"
_SPARKS = 24


def load_table(loads: list[LayerLoad], title: str = "Expert load (share of routed tokens; max/mean 1.00 = even)",
               curves: tuple[str, list[str]] | None = None) -> Table:
    """Return one row a layer: each expert's share, evenness, split by condition, prototypes, traffic.

    Args:
        curves: heading and cells of a last column, which also lets rows be coloured by how uneven they are.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE)
    experts = [f"e{expert}" for expert in range(len(loads[0].tokens_per_expert))]
    for name in ("layer", *experts, "max/mean", "CV", "entropy", "dead", "conditional", "null", "prototype cos", "exchanged"):
        table.add_column(name, justify="right", no_wrap=True)
    if curves is not None:
        table.add_column(curves[0], no_wrap=True)
    for row, load in enumerate(loads):
        table.add_row(str(load.layer), *(f"{share:.1%}" for share in load.shares), f"{load.max_over_mean:.2f}",
                      f"{load.coefficient_of_variation:.2f}", f"{load.entropy:.3f}", str(load.tokens_per_expert.count(0)),
                      f"{load.conditional_tokens:,}", f"{load.unconditional_tokens:,}", f"{load.prototype_similarity:+.2f}",
                      f"{load.bytes_exchanged / 1e6:,.1f} MB", *([] if curves is None else [curves[1][row]]),
                      style="" if curves is None else _style(load.max_over_mean))
    return table


def loads_of(view: RunView, window: slice) -> list[LayerLoad]:
    """Return the totals of every layer over a window."""
    log = view.log
    tokens_LE = log.tokens_TLE[window].sum(axis=0)
    return [LayerLoad(layer=layer, tokens_per_expert=[int(n) for n in tokens_LE[row]],
                      conditional_tokens=int(log.routed_TLQ[window, row].sum()),
                      unconditional_tokens=int(log.null_TLQ[window, row].sum()),
                      prototype_similarity=float(log.similarity_TL[-1, row]), bytes_exchanged=int(log.bytes_TL[window, row].sum()))
            for row, layer in enumerate(log.layers)]


def findings_text(view: RunView) -> Text:
    """Return notes and findings, a line each."""
    text = Text()
    for note in view.notes:
        text.append(f"note: {note}\n", style="dim")
    for finding in find(view):
        text.append(f"{_WORDS[finding.level]:>5}: ", style=_STYLES[finding.level])
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
    for each in view.outlooks if view.tokens_LE.any() else ():
        lost = view.time_lost(each.uneven_L)
        table.add_row(str(each.ep_size), each.name, f"{np.nanmean(each.uneven_L):.3f}", f"{np.nanmax(each.uneven_L):.3f}",
                      "–" if lost is None else f"{lost:.1%}")
    return table


class Follower:
    """Reads what a growing log got since the last look; keeps the newest log steps."""

    def __init__(self, run_dir: Path) -> None:
        """Follow a run, which may not have reached its first log step yet.

        Raises: DataError if there is no such run.
        """
        self._path, self._position = run_dir / FILE_NAME if run_dir.is_dir() else log_file(run_dir), 0
        self._by_step: deque[tuple[int, list[dict[str, Any]]]] = deque(maxlen=_SPARKS)

    def look(self) -> bool:
        """Read new lines; return whether there were any."""
        if not self._path.is_file():
            return False
        if self._path.stat().st_size < self._position:  # rewritten by a resume
            self._position = 0
            self._by_step.clear()
        before, found = self._position, False

        def _tell(position: int, _: int) -> None:
            self._position = position

        for _, record in iterate_records(self._path, refuse=lambda *_: None, start=before, tell=_tell):
            found = True
            if not self._by_step or self._by_step[-1][0] != record["step"]:
                self._by_step.append((record["step"], []))
            self._by_step[-1][1].append(record)
        return found

    def draw(self) -> Table | Text:
        """Return the newest log step, with max/mean over the last ones as a small curve."""
        if not self._by_step:
            return Text("waiting for the first log step", style="dim")
        history = [{load.layer: load for load in summarise_load(records)} for _, records in self._by_step]
        newest = list(history[-1].values())
        curves = [_spark([each[load.layer].max_over_mean for each in history if load.layer in each]) for load in newest]
        return load_table(newest, f"step {self._by_step[-1][0]:,}: load since the log step before",
                          (f"max/mean, {len(history)} log steps", curves))


def follow(run_dir: Path, console: Console, *, every: float, is_over: Callable[[], bool] = lambda: False) -> None:
    """Show a run's load until interrupted.

    Args:
        every: seconds between looks.
    """
    follower = Follower(run_dir)
    follower.look()
    try:
        with Live(_screen(follower), console=console, auto_refresh=False, screen=False) as live:
            while not is_over():
                time.sleep(every)
                follower.look()
                live.update(_screen(follower), refresh=True)
    except KeyboardInterrupt:
        console.print("stopped following", style="dim")


def _screen(follower: Follower) -> Group:
    return Group(follower.draw(), Text(time.strftime("looked at %H:%M:%S, Ctrl-C ends"), style="dim"))


def _style(uneven: float) -> str:
    return _STYLES["bad"] if uneven > VERY_UNEVEN else _STYLES["warn"] if uneven > UNEVEN else ""


def _spark(values: list[float]) -> str:
    """Draw a small curve from 1 (even) to the largest value, 2 at least."""
    high = max([2.0, *(v for v in values if not np.isnan(v))])
    places = [0 if np.isnan(v) else 1 + int((v - 1) / (high - 1) * (len(_BARS) - 2)) for v in values]
    return "".join(_BARS[place] for place in places)
