"""Kinds of charts: lines over steps, bars, grids of cells, maps over time, scattered points, small images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from promoe_ds.analysis.drawing.scene import DASHES, FONT_SIZE, SERIES, Color, Point, Scene, diverge, fade, palette, ramp

WIDTH = 360.0
_LEFT, _RIGHT, _TOP = 40.0, 8.0, 8.0
_LEGEND_ROW = 15.0
#: Cells with a word of their own under the pointer; of larger tables the rows have one.
_SHOWN_CELLS = 400
#: Rows of a map over time that are drawn, and how high they are together.
_MOST_ROWS, _MAP_HEIGHT = 400, 900.0
#: Numbers stand on cells: the strongest shade leaves them readable.
_LEGIBLE = 0.78


@dataclass(frozen=True, kw_only=True)
class Axes:
    """How far a line chart's axes reach and what stands beside them.

    y_from, y_to: the least that is shown; y_to None: as the values want. even: a dashed line at this value; also: further values
    that there is room for. is_ordered: lines are a sequence, like layers: many get a ramp of colours.
    """

    y_from: float = 0.0
    y_to: float | None = None
    even: float | None = None
    also: Sequence[float] = ()
    x_name: str = "step"
    percent: bool = False
    is_ordered: bool = False


def line_chart(title: str, series: Sequence[tuple[str, Sequence[float], Sequence[float]]], axes: Axes | None = None, *,
               note: str = "") -> Scene:
    """Draw lines over steps.

    Args:
        series: name, steps, values (NaN is a gap) of each line; the colour goes by place.
    """
    axes = axes or Axes()
    height, names = 176.0, [name for name, *_ in series]
    is_ramp = axes.is_ordered and len(series) > len(SERIES)
    rows = [] if is_ramp else _legend_rows(names)
    scene = Scene(WIDTH, height + 30 + _LEGEND_ROW * max(len(rows), is_ramp), title, note)
    scene.numbers = [[axes.x_name, *names], *_by_x(series)]
    finite = [y for _, _, ys in series for y in ys if not math.isnan(y)]
    steps = [x for _, xs, _ in series for x in xs]
    if not finite:
        scene.text((WIDTH / 2, height / 2), "nothing logged", color="muted", anchor="middle")
        return scene
    low = min(axes.y_from, *finite, *axes.also)
    high = max(*finite, *axes.also, axes.even or finite[0], low + 1e-9) if axes.y_to is None else axes.y_to
    x0, x1 = min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1

    def place(x: float, y: float) -> tuple[float, float]:
        return (_LEFT + (x - x0) / (x1 - x0) * (WIDTH - _LEFT - _RIGHT),
                _TOP + (high - min(max(y, low), high)) / (high - low) * (height - _TOP))

    _draw_axes(scene, place, (x0, x1), (low, high), axes)
    if axes.even is not None:
        scene.line([place(x0, axes.even), place(x1, axes.even)], "muted", dash=1)
    styles = [(color, 0) for color in ramp(len(series))] if is_ramp else _styles(len(series))
    for (name, xs, ys), (color, dash) in zip(series, styles, strict=True):
        for piece in _pieces(xs, ys):
            if len(piece) == 1:
                scene.dot(place(*piece[0]), 2.0, color, tip=name)
            scene.line([place(x, y) for x, y in piece], color, width=1.6, dash=dash, tip=name)
    if is_ramp:
        _ramp_legend(scene, names, styles, height + 34)
    else:
        _legend(scene, rows, styles, height + 34)
    return scene


def _styles(count: int) -> list[tuple[Color, int]]:
    """Return colour and dashes of lines without an order: colours come round again after a dozen, dashes tell the rounds."""
    return [(place, place // len(SERIES) % len(DASHES)) for place in range(count)]


def _draw_axes(scene: Scene, place: Callable[[float, float], Point], x_range: Point, y_range: Point, axes: Axes) -> None:
    bottom = place(0, y_range[0])[1]
    marks = ticks(*y_range, 4)
    for y, words in zip(marks, tick_words(marks, percent=axes.percent), strict=True):
        scene.line([place(x_range[0], y), place(x_range[1], y)], "grid")
        scene.text((_LEFT - 5, place(0, y)[1] + 3.5), words, color="muted", anchor="end", size=10)
    for x in ticks(*x_range, 4):
        px = place(x, y_range[0])[0]
        anchor = "end" if px > WIDTH - 22 else "middle"
        scene.text((px, bottom + 14), short(x), color="muted", anchor=anchor, size=10)
    scene.text((_LEFT - 5, bottom + 14), axes.x_name, color="muted", anchor="end", size=10)


def bar_chart(title: str, bars: Sequence[tuple[str, float, str, str | int]], *, note: str = "", mark: float | None = None,
              mark_name: str = "", label_width: float = 92.0) -> Scene:
    """Draw bars that lie, one a row, to the left of zero where negative.

    Args:
        bars: name, length (NaN: none), words after it, colour.
        mark: a dashed line at this length.
    """
    row, top, words_width = min(19.0, max(10.0, 456.0 / len(bars))), 6.0, 8.0 + 5.2 * max(len(words) for *_, words, _ in bars)
    base, size = 0.5 * row + 2.5, min(FONT_SIZE, row - 1)
    scene = Scene(WIDTH, top + row * len(bars) + (16 if mark is not None else 4), title, note)
    scene.numbers = [["", "value"], *([name, number(value)] for name, value, *_ in bars)]
    known = [value for _, value, *_ in bars if not math.isnan(value)] + [mark or 0.0]
    low, high = min(0.0, *known), max(0.0, *known)
    scale = (WIDTH - label_width - words_width - _RIGHT) / max(high - low, 1e-12)
    zero, bottom = label_width - low * scale, top + row * len(bars)
    if low < 0:
        scene.line([(zero, top), (zero, bottom)], "muted")
    for place, (name, value, words, color) in enumerate(bars):
        y = top + row * place
        scene.text((label_width - 6, y + base), name, anchor="end", size=size)
        if not math.isnan(value):
            length = max(0.8, abs(value) * scale)
            left = zero - length if value < 0 else zero
            scene.rect((left, y + 0.1 * row, length, 0.7 * row), color, radius=2, tip=f"{name}: {words}")
        scene.text((WIDTH - _RIGHT, y + base), words, color="muted", anchor="end", size=min(10.0, size))
    if mark is not None:
        x = zero + mark * scale
        scene.line([(x, top), (x, bottom)], "fg", dash=1)
        scene.text((x, bottom + 11), mark_name, color="muted", anchor="middle", size=10)
    return scene


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Names of a cell chart's rows and columns, and how a value is written and shaded (-1 blue, 0 clear, 1 orange).

    ends: what full blue and full orange stand for, beside a bar of the colours; no bar if left out.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    show: Callable[[float], str]
    shade: Callable[[np.ndarray], np.ndarray]
    row_name: str = ""
    column_name: str = ""
    ends: tuple[str, str] | None = None


def cell_chart(title: str, values_RC: np.ndarray, cells: Cells, *, note: str = "") -> Scene:
    """Draw a table as shaded cells, with the numbers where there is room."""
    rows, columns, row_name = cells.rows, cells.columns, cells.row_name
    left = 14.0 + 5.6 * max(len(name) for name in [*rows, row_name])
    cell = min(68.0, (WIDTH - left - 4) / len(columns))
    high = min(20.0, max(5.0, 300.0 / len(rows)))
    top = 18.0
    bottom = top + high * len(rows)
    scene = Scene(WIDTH, bottom + (22 if cells.ends else 8), title, note)
    scene.numbers = [[row_name, *columns], *([name, *map(number, values)] for name, values in zip(rows, values_RC, strict=True))]
    wide = cell * len(columns)
    scene.rect((left, top, wide, high * len(rows)), "grid", opacity=0.25)
    scene.pixels((left, top, wide, high * len(rows)), diverge(_LEGIBLE * cells.shade(values_RC)))
    scene.text((left - 6, 11), row_name, color="muted", anchor="end", size=10)
    every = max(1, math.ceil(len(columns) * (7.0 + 5.0 * max(map(len, columns))) / max(wide, 1.0)))
    for place, name in enumerate(columns):
        if place % every == 0:
            scene.text((left + cell * (place + 0.5), 12), name, color="muted", anchor="middle", size=9.5)
    for place, name in enumerate(rows):
        if high >= 9 or place % math.ceil(10 / high) == 0:
            scene.text((left - 6, top + high * (place + 0.5) + 3.5), name, color="muted", anchor="end", size=min(10.0, high + 2))
    _write_cells(scene, values_RC, cells, (left, top, cell, high))
    if cells.ends:
        _scale(scene, (left, bottom + 7), cells.ends, _LEGIBLE)
    return scene


def _write_cells(scene: Scene, values_RC: np.ndarray, cells: Cells, first: tuple[float, float, float, float]) -> None:
    """Write the numbers, on the cells where there is room and under the pointer.

    Args:
        first: the box of the first cell.
    """
    left, top, cell, high = first
    rows, columns = cells.rows, cells.columns
    legible = high >= 14 and cell >= 25
    if values_RC.size > _SHOWN_CELLS and not legible:
        for row, values in enumerate(values_RC):
            if not np.isnan(values).all():
                ends = [f"{columns[at]} {cells.show(values[at])}" for at in (np.nanargmin(values), np.nanargmax(values))]
                scene.rect((left, top + high * row, cell * len(columns), high), "fg", opacity=0.0,
                           tip=f"{cells.row_name} {rows[row]}: from {ends[0]} to {ends[1]}")
        return
    for (row, column), value in np.ndenumerate(values_RC):
        words = "–" if np.isnan(value) else cells.show(value)
        x, y = left + cell * column, top + high * row
        tip = f"{cells.row_name} {rows[row]}, {cells.column_name} {columns[column]}: {words}"
        scene.rect((x, y, cell, high), "fg", opacity=0.0, tip=tip)
        if legible:
            scene.text((x + cell / 2, y + high / 2 + 3.5), words, anchor="middle", size=9.5)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Names of a map's rows and how their values are shaded (-1 blue, 0 clear, 1 orange).

    groups: name and number of rows of each stretch of rows, named instead of single rows. ends: as of `Cells`.
    """

    names: Sequence[str]
    shade: Callable[[np.ndarray], np.ndarray]
    groups: Sequence[tuple[str, int]] = ()
    ends: tuple[str, str] | None = None


def map_over_time(title: str, values_RT: np.ndarray, rows: Rows, steps: Sequence[float], *, note: str = "") -> Scene:
    """Draw rows over steps as pixels; of many rows, each of the drawn ones shows the value farthest from clear of a few."""
    names, stretches = rows.names, list(rows.groups) or [("", len(rows.names))]
    few = -(-len(names) // _MOST_ROWS)
    drawn = sum(-(-count // few) for _, count in stretches)
    high = min(12.0, max(3.0, 420.0 / drawn), _MAP_HEIGHT / drawn)
    gap = 4.0 if rows.groups else 0.0
    left, top, width = _LEFT + 14, 4.0, WIDTH - _LEFT - 14 - _RIGHT
    if few > 1:
        note = f"{note} Each line is {few} rows: the one farthest from even."
    scene = Scene(WIDTH, top + high * drawn + gap * len(stretches) + (36 if rows.ends else 22), title, note)
    scene.numbers = [["row", *map(str, steps)]]
    scene.numbers += [[name, *map(number, values)] for name, values in zip(names, values_RT, strict=True)]
    y, start = top, 0
    for name, count in stretches:
        shades = _farthest(rows.shade(values_RT[start:start + count]), few)
        tall = high * len(shades)
        scene.rect((left, y, width, tall), "grid", opacity=0.35)
        scene.pixels((left, y, width, tall), diverge(shades))
        for place in range(len(shades)):
            ours = names[start + few * place:start + min(count, few * (place + 1))]
            tip = ours[0] if len(ours) == 1 else f"{ours[0]} to {ours[-1]}"
            scene.rect((left, y + high * place, width, high), "fg", opacity=0.0, tip=tip)
            if not name and (high >= 9 or place % math.ceil(10 / high) == 0):
                scene.text((left - 6, y + high * (place + 0.5) + 3.5), ours[0], color="muted", anchor="end",
                           size=min(10.0, high + 2))
        if name:
            scene.text((left - 6, y + tall / 2 + 3.5), name, color="muted", anchor="end", size=10)
        y, start = y + tall + gap, start + count
    x0, x1 = steps[0], max(steps[-1], steps[0] + 1)
    for x in ticks(x0, x1, 4):
        px = left + (x - x0) / (x1 - x0) * width
        scene.text((px, y + 11), short(x), color="muted", anchor="end" if px > WIDTH - 22 else "middle", size=10)
    scene.text((left - 6, y + 11), "step", color="muted", anchor="end", size=10)
    if rows.ends:
        _scale(scene, (left, y + 20), rows.ends, 1.0)
    return scene


def _farthest(shades_RT: np.ndarray, few: int) -> np.ndarray:
    """Return, of every few rows, the shade that is farthest from clear at each time."""
    places = range(0, len(shades_RT), few)
    parts = [shades_RT[place:place + few] for place in places]
    return np.stack([np.take_along_axis(part, np.nan_to_num(np.abs(part)).argmax(axis=0)[None], axis=0)[0] for part in parts])


def _scale(scene: Scene, at: Point, ends: tuple[str, str], strongest: float) -> None:
    """Draw a bar of the colours between what they stand for."""
    x, width = at[0] + 5.2 * len(ends[0]) + 6, 72.0
    scene.text((at[0], at[1] + 8), ends[0], color="muted", size=9.5)
    scene.rect((x, at[1], width, 9), "grid", opacity=0.25)
    scene.pixels((x, at[1], width, 9), diverge(strongest * np.linspace(-1, 1, 49)[None]))
    scene.text((x + width + 6, at[1] + 8), ends[1], color="muted", size=9.5)


def image_chart(title: str, images: Sequence[tuple[str, np.ndarray]], *, note: str = "", hue: str = "accent",
                columns: int = 4) -> Scene:
    """Draw small maps of values in 0 ... 1, each with its name."""
    columns = min(columns, len(images))
    side = min(84.0, (WIDTH - 8 * (columns + 1)) / columns)
    rows = -(-len(images) // columns)
    scene = Scene(WIDTH, rows * (side + 22) + 4, title, note)
    scene.numbers = [["map", "row", "column", "value"], *([name, r, c, number(v)] for name, values in images
                                                          for (r, c), v in np.ndenumerate(values))]
    for place, (name, values) in enumerate(images):
        x, y = 8 + (place % columns) * (side + 8), 14 + (place // columns) * (side + 22)
        scene.text((x + side / 2, y - 3), name, color="muted", anchor="middle", size=10)
        scene.rect((x, y, side, side), "grid", opacity=0.5)
        scene.pixels((x, y, side, side), fade(values, hue))
    return scene


def scatter_chart(title: str, points_N2: np.ndarray, groups_N: np.ndarray, names: Sequence[str], *, note: str = "") -> Scene:
    """Draw points coloured by group; the axes have no meaning and no marks."""
    side = WIDTH - 16
    rows, colors = _legend_rows(names), palette(len(names))
    scene = Scene(WIDTH, side + 16 + _LEGEND_ROW * len(rows), title, note)
    scene.numbers = [["x", "y", "group"]]
    scene.numbers += [[number(x), number(y), names[group]] for (x, y), group in zip(points_N2, groups_N, strict=True)]
    low, span = points_N2.min(axis=0), np.ptp(points_N2, axis=0).max() or 1.0
    for (x, y), group in zip((points_N2 - low) / span * (side - 8), groups_N, strict=True):
        scene.dot((12 + x, 8 + y), 2.1, colors[group], opacity=0.75)
    _legend(scene, rows, [(color, 0) for color in colors], side + 22)
    return scene


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return round values between two, near `about` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9) * step
    return [round(first + i * step, 12) for i in range(int((high - first) / step + 1e-9) + 1)]


def tick_words(values: Sequence[float], *, percent: bool = False) -> list[str]:
    """Return ticks in words with as many decimals as tell neighbours apart exactly."""
    scaled = [100 * value for value in values] if percent else list(values)
    step = min((b - a for a, b in pairwise(scaled)), default=abs(scaled[0]) or 1.0)
    decimals = next((places for places in range(10) if math.isclose(step, round(step, places), rel_tol=1e-6)), 10)
    return [f"{value:.{decimals}f}{'%' if percent else ''}" for value in scaled]


def short(value: float) -> str:
    """Return a step or a count in few signs: 1500 -> 1.5K."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _legend_rows(names: Sequence[str]) -> list[list[tuple[int, str, float]]]:
    """Break names into rows: place, name and x of each."""
    rows: list[list[tuple[int, str, float]]] = []
    x = WIDTH
    for place, name in enumerate(names):
        width = 22 + 6.2 * len(name)
        if x + width > WIDTH - _RIGHT:
            rows.append([])
            x = _LEFT - 28
        rows[-1].append((place, name, x))
        x += width
    return rows if len(names) > 1 else []


def _legend(scene: Scene, rows: list[list[tuple[int, str, float]]], styles: Sequence[tuple[Color, int]], y: float) -> None:
    has_dashes = any(dash for _, dash in styles)
    for row, entries in enumerate(rows):
        for place, name, x in entries:
            color, dash = styles[place]
            line = y + _LEGEND_ROW * row
            if has_dashes:
                scene.line([(x - 4, line - 3), (x + 9, line - 3)], color, width=2.0, dash=dash)
            else:
                scene.rect((x, line - 7, 8, 8), color, radius=2)
            scene.text((x + 12, line), name, color="muted", size=10)


def _ramp_legend(scene: Scene, names: Sequence[str], styles: Sequence[tuple[Color, int]], y: float) -> None:
    x, width = _LEFT + 6.0 + 5.6 * len(names[0]), 120.0 / len(names)
    scene.text((_LEFT, y), names[0], color="muted", size=10)
    for place, (color, _) in enumerate(styles):
        scene.rect((x + width * place, y - 7, width, 8), color, tip=names[place])
    scene.text((x + 126, y), names[-1], color="muted", size=10)


def _pieces(xs: Sequence[float], ys: Sequence[float]) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if math.isnan(y):
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if piece]


def _by_x(series: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> list[list[object]]:
    steps = sorted({x for _, xs, _ in series for x in xs})
    columns = [dict(zip(xs, ys, strict=True)) for _, xs, ys in series]
    return [[x, *(number(column.get(x, math.nan)) for column in columns)] for x in steps]


def number(value: float) -> object:
    """Return a value for a CSV, in six digits; nothing for NaN."""
    return "" if math.isnan(value) else float(f"{value:.6g}")
