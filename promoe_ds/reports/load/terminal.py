"""A run in a terminal: a summary (loads, findings, other placements), and a view that follows
training in a terminal of any size.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from promoe_ds.load_stats import entropy, max_over_mean, relative, shares, variation
from promoe_ds.reports.columns import Columns
from promoe_ds.reports.load.findings import TAGS, UNEVEN, VERY_UNEVEN, Finding, find
from promoe_ds.reports.load.run import STARVED_SHARE, RunView
from promoe_ds.reports.log import arrange
from promoe_ds.reports.maps import farthest_from_even
from promoe_ds.reports.records import FILE_NAME, Line, log_file, read_lines

STYLES = {"bad": "bold red", "warn": "yellow", "good": "green"}
_BARS, _DEAD = "▁▂▃▄▅▆▇█", "×"
#: Log steps that are kept: what the curves show and the findings are about.
_KEPT = 24
#: A load of this many times the mean is a full block.
_FULL_BLOCK = 2.0
_MOST_FINDINGS = 4
#: Of a long log, the bytes at its end that are read at first: some log steps of the largest models.
_TAIL = 1 << 26


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
        "conditional tokens": (log.routed_TL[window].sum(axis=0), "{:,}"),
        "null tokens": (log.null_TL[window].sum(axis=0), "{:,}"),
        "prototype cos": (view.newest(log.similarity_TL), "{:+.2f}"),
        "sent": (log.bytes_TL[window].sum(axis=0) / 1e6, "{:,.1f} MB"),
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
    columns = (Column(name, justify="right", no_wrap=True) for name in head)
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE)
    for row in rows:
        table.add_row(*row)
    return table


class Follower:
    """Reads what a growing log got since the last look; `view` is the newest log steps as a run
    whose whole is now, None before the first.
    """

    def __init__(self, run_dir: Path) -> None:
        """Follow a run, which may not have reached its first log step yet.

        Raises: DataError if there is no such run.
        """
        self._path = run_dir / FILE_NAME if run_dir.is_dir() else log_file(run_dir)
        self._start_anew()

    def _start_anew(self) -> None:
        self._position, self._by_step = 0, dict[int, list[Line]]()
        self.view: RunView | None = None

    def look(self) -> None:
        """Read new lines.

        Raises: DataError if the file cannot be read, or a newer package writes it.
        """
        size, cut = self._path.stat().st_size if self._path.is_file() else 0, None
        if size < self._position:  # rewritten by a resume
            self._start_anew()
        is_long, new = not self._position and size > _TAIL, []
        for _, end, line, _ in (
            read_lines(self._path, size - _TAIL if is_long else self._position) if size else ()
        ):
            self._position = end
            if line is not None and is_long and cut in (None, line.step):
                cut = line.step  # may lack its first lines
            elif line is not None:
                new.append(line)
        for line in new:
            self._by_step[line.step] = [*self._by_step.pop(line.step, []), line]
        self._by_step = dict(list(self._by_step.items())[-_KEPT:])
        if new:
            # A run restarted with another number of experts is measured by its newest lines.
            columns = Columns(len(new[-1].tokens_per_expert))
            for line in (line for lines in self._by_step.values() for line in lines):
                columns.take(line)
            log = arrange(columns, self._path, [])
            self.view = RunView.of(log, slice(0, len(log.steps_T)))


def follow(run_dir: Path, console: Console, *, every: float) -> None:
    """Show a run's load until interrupted.

    Args:
        every: seconds between looks.
    """
    follower = Follower(run_dir)
    follower.look()
    try:
        with Live(_screen(follower, console), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                follower.look()
                live.update(_screen(follower, console), refresh=True)
    except KeyboardInterrupt:
        console.print("stopped following", style="dim")


def _screen(follower: Follower, console: Console) -> RenderableType:
    shown: list[RenderableType] = [Text("waiting for the first log step", style="dim")]
    if follower.view is not None:
        shown = draw(follower.view, console.width, console.height - 2)
    return Group(*shown, Text(time.strftime("looked at %H:%M:%S, Ctrl-C ends"), style="dim"))


def draw(view: RunView, width: int, height: int) -> list[RenderableType]:
    """Return the newest log step and the findings of the kept ones, so that it fits into a
    terminal.

    Args:
        height: rows there are; if the layers take more, the least even ones are shown.
    """
    layers = len(view.log.layers)
    most = max(1, min(_MOST_FINDINGS, height - 2 - min(layers, height // 2)))
    texts = [finding_text(each) for each in find(view)[:most]]
    for text in texts:
        text.truncate(width, overflow="ellipsis")
    room, rows, rest = max(1, height - 2 - len(texts)), list(range(layers)), []
    if layers > room:
        uneven_L = np.nan_to_num(max_over_mean(view.log.tokens_TLE[-1]), nan=np.inf)
        rows = sorted(np.argsort(-uneven_L, kind="stable")[: max(1, room - 1)].tolist())
        words = f"and {layers - len(rows)} layers that are more even"
        rest = [Text(words, "dim", no_wrap=True)]
    table, few = _live_table(view, width, rows)
    title = f"step {int(view.log.steps_T[-1]):,}: load of each expert"
    blocks = f" (a block is {few} experts, the farthest from even)" if few > 1 else ""
    return [Text(title + blocks, no_wrap=True, overflow="ellipsis"), table, *rest, *texts]


def _live_table(view: RunView, width: int, rows: list[int]) -> tuple[Table, int]:
    """Return a row a layer, with as many columns as there is room for, and how many experts one
    block is for.
    """
    columns, optional = _columns(view)
    # Every column but the last has a gap behind it; the curve takes a third of its width at least.
    rest = width - sum(len(name) + 1 for name in ("layer", *columns)) - _KEPT // 3 - 1
    few = -(-view.log.experts // max(len("experts"), rest))
    blocks = max(len("experts"), -(-view.log.experts // few))
    rest -= blocks
    for name, column in optional.items():
        if len(name) + 1 <= rest:
            columns[name] = column
            rest -= len(name) + 1
    curve = min(_KEPT, max(0, rest) + _KEPT // 3)
    table = Table(
        Column("layer", width=5, justify="right", no_wrap=True),
        Column("experts", width=blocks, no_wrap=True),
        *(Column(name, width=len(name), justify="right", no_wrap=True) for name in columns),
        Column("so far", width=curve, no_wrap=True),
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        header_style="dim",
    )
    for row in rows:
        table.add_row(
            str(view.log.layers[row]),
            _blocks(view, row, few),
            *(
                Text(words(values[row], form), _style(values[row], *limits))
                for values, form, *limits in columns.values()
            ),
            _curve(max_over_mean(view.log.tokens_TLE[-curve:, row])),
        )
    return table, few


def _columns(view: RunView) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Return the columns that are always there, and others in the order in which they are
    preferred.

    Each as wide as its name: values by layer, form, and the limits above which they are coloured.
    """
    log, newest_LE = view.log, view.log.tokens_TLE[-1]
    ranks_L = np.where(
        np.isnan(log.rank_uneven_TL[-1]), view.present.uneven_L, log.rank_uneven_TL[-1]
    )
    null_L = log.null_TL[-1] / np.maximum(1, log.routed_TL[-1] + log.null_TL[-1])
    needed = {
        "max/mean": (max_over_mean(newest_LE), "{:.2f}", UNEVEN, VERY_UNEVEN),
        "dead": (view.starved_L(is_dead=True), "{}", 0, 0),
    }
    return needed, {
        "starved": (view.starved_L(is_dead=False), "{}", 0),
        **({"ranks": (ranks_L, "{:.2f}", UNEVEN, VERY_UNEVEN)} if log.ep_size > 1 else {}),
        "entropy": (entropy(newest_LE), "{:.3f}"),
        "null": (null_L, "{:.0%}"),
        "  CV": (variation(newest_LE), "{:.2f}"),
        "cosine": (view.newest(log.similarity_TL), "{:+.2f}"),
    }


def _style(value: float, warn: float = np.inf, bad: float = np.inf) -> str:
    return STYLES["bad"] if value > bad else STYLES["warn"] if value > warn else ""


def _blocks(view: RunView, row: int, few: int) -> Text:
    """Draw a block an expert (or a few): half high is an even share, red has none or much too
    much.
    """
    load_E, text = relative(view.log.tokens_TLE[-1, row]), Text()
    for place in range(0, len(load_E), few):
        load = float(farthest_from_even(load_E[place : place + few]))
        if np.isnan(load):
            text.append("·", "dim")
        elif load == 0:
            text.append(_DEAD, STYLES["bad"])
        else:
            style = STYLES["warn"] if load < STARVED_SHARE else _style(load, UNEVEN, VERY_UNEVEN)
            block = _BARS[min(len(_BARS) - 1, int(load / _FULL_BLOCK * len(_BARS)))]
            text.append(block, style or STYLES["good"])
    return text


def _curve(values_T: np.ndarray) -> Text:
    """Draw a small curve from 1 (even) to the largest value, 2 at least."""
    known = values_T[~np.isnan(values_T)]
    high = max(_FULL_BLOCK, *known) if len(known) else _FULL_BLOCK
    return Text(
        "".join(
            " " if np.isnan(v) else _BARS[int((v - 1) / (high - 1) * (len(_BARS) - 1))]
            for v in values_T
        )
    )
