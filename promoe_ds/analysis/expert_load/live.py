"""A view that follows a run in a terminal of any size: every layer's experts as blocks, evenness, and what is to be said."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from promoe_ds.analysis.expert_load import stats
from promoe_ds.analysis.expert_load.columns import Columns, next_line
from promoe_ds.analysis.expert_load.findings import UNEVEN, VERY_UNEVEN, find
from promoe_ds.analysis.expert_load.lines import FILE_NAME, iterate_records, log_file
from promoe_ds.analysis.expert_load.log import arrange
from promoe_ds.analysis.expert_load.terminal import STYLES, WORDS
from promoe_ds.analysis.expert_load.view import RunView

_BARS = "▁▂▃▄▅▆▇█"
_DEAD = "×"
#: Log steps that are kept: what the curves show and the words are about.
_KEPT = 24
#: A load of this many times the mean is a full block.
_FULL_BLOCK = 2.0
_MOST_WORDS = 4
#: Of a long log, the bytes at its end that are read at first: some log steps of the largest models.
_TAIL = 1 << 26


@dataclass(frozen=True)
class _Column:
    """A column as wide as its name: its values by row and their form; above `warn` and `bad` they are coloured."""

    name: str
    values: np.ndarray
    form: str
    warn: float = np.inf
    bad: float = np.inf

    def cell(self, row: int) -> Text:
        """Return a row's value in words."""
        value = self.values[row]
        style = STYLES["bad"] if value > self.bad else STYLES["warn"] if value > self.warn else ""
        return Text("–" if np.isnan(value) else self.form.format(value), style)


class Follower:
    """Reads what a growing log got since the last look; keeps the newest log steps."""

    def __init__(self, run_dir: Path) -> None:
        """Follow a run, which may not have reached its first log step yet.

        Raises: DataError if there is no such run.
        """
        self._path, self._position = run_dir / FILE_NAME if run_dir.is_dir() else log_file(run_dir), 0
        self._by_step: deque[tuple[int, list[dict[str, Any]]]] = deque(maxlen=_KEPT)
        self._cut: int | None = None
        self._view: RunView | None = None

    def look(self) -> None:
        """Read new lines.

        Raises: DataError if the file cannot be read, or a younger package writes it.
        """
        if not self._path.is_file():
            return
        size = self._path.stat().st_size
        if size < self._position:  # rewritten by a resume
            self._position, self._cut = 0, None
            self._by_step.clear()
            self._view = None
        is_cut = not self._position and size > _TAIL
        if is_cut:
            self._position = next_line(self._path, size - _TAIL)
        for _, record in iterate_records(self._path, refuse=lambda *_: None, start=self._position, tell=self._tell):
            if is_cut and self._cut in (None, record["step"]):
                self._cut = record["step"]  # may lack its first lines
                continue
            if not self._by_step or self._by_step[-1][0] != record["step"]:
                self._by_step.append((record["step"], []))
            self._by_step[-1][1].append(record)
            self._view = None

    def _tell(self, position: int, _: int) -> None:
        self._position = position

    def view(self) -> RunView | None:
        """Return the kept log steps as a run whose whole is now; None before the first."""
        if self._view is None and self._by_step:
            # A run restarted with another number of experts would otherwise be measured by what it was.
            columns = Columns(len(self._by_step[-1][1][-1]["tokens_per_expert"]))
            for _, records in self._by_step:
                for record in records:
                    columns.take(0, record)
            log = arrange(self._path, columns, [])
            window = slice(0, len(log.steps_T))
            self._view = RunView(log, stats.read_facts(log, window), window)
        return self._view


def follow(run_dir: Path, console: Console, *, every: float, is_over: Callable[[], bool] = lambda: False) -> None:
    """Show a run's load until interrupted.

    Args:
        every: seconds between looks.
    """
    follower = Follower(run_dir)
    follower.look()
    try:
        with Live(_screen(follower, console), console=console, auto_refresh=False, screen=False) as live:
            while not is_over():
                time.sleep(every)
                follower.look()
                live.update(_screen(follower, console), refresh=True)
    except KeyboardInterrupt:
        console.print("stopped following", style="dim")


def _screen(follower: Follower, console: Console) -> RenderableType:
    view, last = follower.view(), Text(time.strftime("looked at %H:%M:%S, Ctrl-C ends"), style="dim")
    if view is None:
        return Group(Text("waiting for the first log step", style="dim"), last)
    return Group(*draw(view, console.width, console.height - 2), last)


def draw(view: RunView, width: int, height: int) -> list[RenderableType]:
    """Return the newest log step and what is to be said of the kept ones, so that it fits into a terminal.

    Args:
        height: rows there are; where the layers take more, the least even ones are shown.
    """
    layers = len(view.log.layers)
    said = _sentences(view, width)[:max(1, min(_MOST_WORDS, height - 2 - min(layers, height // 2)))]
    room = max(1, height - 2 - len(said))
    uneven_L = np.nan_to_num(stats.max_over_mean(view.log.tokens_TLE[-1]), nan=np.inf)
    is_cut = layers > room
    shown = sorted(np.argsort(-uneven_L, kind="stable")[:max(1, room - 1)] if is_cut else range(layers))
    table, few = _table(view, width, [int(row) for row in shown])
    title = f"step {int(view.log.steps_T[-1]):,}: load of each expert"
    blocks = f" (a block is {few} experts, the farthest from even)" if few > 1 else ""
    parts: list[RenderableType] = [Text(title + blocks, no_wrap=True, overflow="ellipsis"), table]
    if is_cut:
        parts.append(Text(f"and {layers - len(shown)} layers that are more even", style="dim", no_wrap=True))
    return [*parts, *said]


def _table(view: RunView, width: int, rows: list[int]) -> tuple[Table, int]:
    """Return a row a layer, with as many columns as there is room for, and how many experts one block stands for."""
    experts, needed, wanted = view.log.experts, *_columns(view)
    # Every column but the last has a gap behind it.
    rest = width - sum(len(column.name) + 1 for column in needed) - _KEPT // 3 - 1
    few = -(-experts // max(len("experts"), rest))
    blocks = max(len("experts"), -(-experts // few))
    rest -= blocks
    kept = []
    for column in wanted:
        if len(column.name) + 1 <= rest:
            kept.append(column)
            rest -= len(column.name) + 1
    curve = min(_KEPT, max(0, rest) + _KEPT // 3)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    layer, *others = needed
    table.add_column(layer.name, width=len(layer.name), justify="right", no_wrap=True)
    table.add_column("experts", width=blocks, no_wrap=True)
    for column in (*others, *kept):
        table.add_column(column.name, width=len(column.name), justify="right", no_wrap=True)
    table.add_column("so far", width=curve, no_wrap=True)
    for row in rows:
        table.add_row(layer.cell(row), _blocks(view, row, few), *(column.cell(row) for column in (*others, *kept)),
                      _spark(stats.max_over_mean(view.log.tokens_TLE[-curve:, row])))
    return table, few


def _columns(view: RunView) -> tuple[list[_Column], list[_Column]]:
    """Return the columns that are always there, the layer first, and others in the order in which they are wanted."""
    log, newest_LE = view.log, view.log.tokens_TLE[-1]
    uneven_L, variation_L, entropy_L = (measure(newest_LE) for measure in (stats.max_over_mean, stats.variation, stats.entropy))
    ranks_L = np.where(np.isnan(log.rank_uneven_TL[-1]), view.present.uneven_L, log.rank_uneven_TL[-1])
    dead_L, starving_L = (np.array([sum(lack.layer == layer and lack.is_dead is is_dead for lack in view.lacks)
                                    for layer in log.layers]) for is_dead in (True, False))
    null_L = log.null_TL[-1] / np.maximum(1, log.routed_TL[-1] + log.null_TL[-1])

    needed = [_Column("layer", np.array(log.layers), "{}"), _Column("max/mean", uneven_L, "{:.2f}", UNEVEN, VERY_UNEVEN),
              _Column("dead", dead_L, "{}", 0, 0)]
    ranks = [_Column("ranks", ranks_L, "{:.2f}", UNEVEN, VERY_UNEVEN)] if log.ep_size > 1 else []
    return needed, [_Column("starving", starving_L, "{}", 0), *ranks, _Column("entropy", entropy_L, "{:.3f}"),
                    _Column("null", null_L, "{:.0%}"), _Column("  CV", variation_L, "{:.2f}"),
                    _Column("cosine", view.newest(log.similarity_TL), "{:+.2f}")]


def _blocks(view: RunView, row: int, few: int) -> Text:
    """Draw a block an expert (or a few): half high is an even share, red has none or much too much."""
    load_E = stats.shares(view.log.tokens_TLE[-1, row]) * view.log.experts
    text = Text()
    for place in range(0, len(load_E), few):
        ours = load_E[place:place + few]
        if np.isnan(ours).any():
            text.append("·", "dim")
            continue
        # The farthest from even by factor: an expert without tokens before all others.
        load = float(ours[np.argmax(np.abs(np.log(np.maximum(ours, 1e-6))))])
        style = STYLES["bad"] if load == 0 or load > VERY_UNEVEN else \
            STYLES["warn"] if load < stats.STARVING_SHARE or load > UNEVEN else STYLES["good"]
        text.append(_DEAD if load == 0 else _BARS[min(len(_BARS) - 1, int(load / _FULL_BLOCK * len(_BARS)))], style)
    return text


def _sentences(view: RunView, width: int) -> list[Text]:
    """Return the findings, each cut to one line."""
    result = []
    for finding in find(view):
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(f"{WORDS[finding.level]:>5}: ", STYLES[finding.level])
        text.append(f"{finding.title}. ", "bold")
        text.append(finding.text)
        text.truncate(width, overflow="ellipsis")
        result.append(text)
    return result


def _spark(values_T: np.ndarray) -> Text:
    """Draw a small curve from 1 (even) to the largest value, 2 at least."""
    known = values_T[~np.isnan(values_T)]
    high = max(_FULL_BLOCK, *known) if len(known) else _FULL_BLOCK
    return Text("".join(" " if np.isnan(v) else _BARS[int((v - 1) / (high - 1) * (len(_BARS) - 1))] for v in values_T))
