"""A view that follows a run in a terminal of any size: experts as blocks, evenness, findings."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from promoe_ds.load_stats import entropy, max_over_mean, relative, variation
from promoe_ds.reports.expert_load.findings import UNEVEN, VERY_UNEVEN, find
from promoe_ds.reports.expert_load.run import STARVED_SHARE, RunView
from promoe_ds.reports.expert_load.terminal import STYLES, finding_text, words
from promoe_ds.reports.log import Columns
from promoe_ds.reports.records import FILE_NAME, Line, log_file, read_lines

_BARS = "▁▂▃▄▅▆▇█"
_DEAD = "×"
#: Log steps that are kept: what the curves show and the findings are about.
_KEPT = 24
#: A load of this many times the mean is a full block.
_FULL_BLOCK = 2.0
_MOST_FINDINGS = 4
#: Of a long log, the bytes at its end that are read at first: some log steps of the largest models.
_TAIL = 1 << 26


class Follower:
    """Reads what a growing log got since the last look; keeps the newest log steps."""

    def __init__(self, run_dir: Path) -> None:
        """Follow a run, which may not have reached its first log step yet.

        Raises: DataError if there is no such run.
        """
        self._path = run_dir / FILE_NAME if run_dir.is_dir() else log_file(run_dir)
        self._start_anew()

    def _start_anew(self) -> None:
        self._position = 0
        self._by_step: dict[int, list[Line]] = {}
        self._view: RunView | None = None
        self._cut: int | None = None

    def look(self) -> None:
        """Read new lines.

        Raises: DataError if the file cannot be read, or a newer package writes it.
        """
        size = self._path.stat().st_size if self._path.is_file() else 0
        if size < self._position:  # rewritten by a resume
            self._start_anew()
        if not size:
            return
        is_cut = not self._position and size > _TAIL
        for _, end, line, _ in read_lines(self._path, size - _TAIL if is_cut else self._position):
            self._position = end
            if line is not None and not (is_cut and self._cut in (None, line.step)):
                self._by_step[line.step] = [*self._by_step.pop(line.step, []), line]
                self._view = None
            elif line is not None:
                self._cut = line.step  # may lack its first lines
        self._by_step = dict(list(self._by_step.items())[-_KEPT:])

    def view(self) -> RunView | None:
        """Return the kept log steps as a run whose whole is now; None before the first."""
        if self._view is None and self._by_step:
            lines = [line for lines in self._by_step.values() for line in lines]
            # A run restarted with another number of experts is measured by its newest lines.
            columns = Columns(len(lines[-1].tokens_per_expert))
            for line in lines:
                columns.take(line)
            self._view = RunView.of(
                log := columns.arrange(self._path, []), slice(0, len(log.steps_T))
            )
        return self._view


def follow(
    run_dir: Path, console: Console, *, every: float, is_over: Callable[[], bool] = lambda: False
) -> None:
    """Show a run's load until interrupted.

    Args:
        every: seconds between looks.
    """
    follower = Follower(run_dir)
    follower.look()
    try:
        with Live(
            _screen(follower, console), console=console, auto_refresh=False, screen=False
        ) as live:
            while not is_over():
                time.sleep(every)
                follower.look()
                live.update(_screen(follower, console), refresh=True)
    except KeyboardInterrupt:
        console.print("stopped following", style="dim")


def _screen(follower: Follower, console: Console) -> RenderableType:
    view, last = (
        follower.view(),
        Text(time.strftime("looked at %H:%M:%S, Ctrl-C ends"), style="dim"),
    )
    if view is None:
        return Group(Text("waiting for the first log step", style="dim"), last)
    return Group(*draw(view, console.width, console.height - 2), last)


def draw(view: RunView, width: int, height: int) -> list[RenderableType]:
    """Return the newest log step and the findings of the kept ones, so that it fits into a
    terminal.

    Args:
        height: rows there are; if the layers take more, the least even ones are shown.
    """
    layers = len(view.log.layers)
    texts = [finding_text(each) for each in find(view)][
        : max(1, min(_MOST_FINDINGS, height - 2 - min(layers, height // 2)))
    ]
    for text in texts:
        text.truncate(width, overflow="ellipsis")
    room = max(1, height - 2 - len(texts))
    uneven_L = np.nan_to_num(max_over_mean(view.log.tokens_TLE[-1]), nan=np.inf)
    shown = sorted(
        np.argsort(-uneven_L, kind="stable")[: max(1, room - 1)] if layers > room else range(layers)
    )
    table, few = _table(view, width, [int(row) for row in shown])
    title = f"step {int(view.log.steps_T[-1]):,}: load of each expert"
    blocks = f" (a block is {few} experts, the farthest from even)" if few > 1 else ""
    rest = (
        [Text(f"and {layers - len(shown)} layers that are more even", "dim", no_wrap=True)]
        if layers > room
        else []
    )
    return [Text(title + blocks, no_wrap=True, overflow="ellipsis"), table, *rest, *texts]


def _table(view: RunView, width: int, rows: list[int]) -> tuple[Table, int]:
    """Return a row a layer, with as many columns as there is room for, and how many experts one
    block stands for.
    """
    needed, optional = _columns(view)
    # Every column but the last has a gap behind it; the curve takes a third of its width at least.
    rest = width - sum(len(name) + 1 for name in ("layer", *needed)) - _KEPT // 3 - 1
    few = -(-view.log.experts // max(len("experts"), rest))
    blocks = max(len("experts"), -(-view.log.experts // few))
    rest -= blocks
    kept = dict(needed)
    for name, column in optional.items():
        if len(name) + 1 <= rest:
            kept[name] = column
            rest -= len(name) + 1
    curve = min(_KEPT, max(0, rest) + _KEPT // 3)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for name, size in (
        ("layer", 5),
        ("experts", blocks),
        *((name, len(name)) for name in kept),
        ("so far", curve),
    ):
        table.add_column(
            name,
            width=size,
            justify="left" if name in ("experts", "so far") else "right",
            no_wrap=True,
        )
    for row in rows:
        table.add_row(
            str(view.log.layers[row]),
            _blocks(view, row, few),
            *(
                Text(words(values[row], form), _style(values[row], *limits))
                for values, form, *limits in kept.values()
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
        ours = load_E[place : place + few]
        # The farthest from even by factor: an expert without tokens before all others.
        load = float(ours[np.argmax(np.abs(np.log(np.maximum(ours, 1e-6))))])
        if np.isnan(load):
            text.append("·", "dim")
            continue
        style = (
            STYLES["bad"]
            if load == 0
            else _style(
                max(load, UNEVEN + 1e-9 if load < STARVED_SHARE else 0), UNEVEN, VERY_UNEVEN
            )
        )
        block = _BARS[min(len(_BARS) - 1, int(load / _FULL_BLOCK * len(_BARS)))]
        text.append(_DEAD if load == 0 else block, style or STYLES["good"])
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
