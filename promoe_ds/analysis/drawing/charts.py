"""Kinds of charts: lines over steps, bars, grids of cells, maps over time, scattered points, small images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from promoe_ds.analysis.drawing.scene import SERIES, Point, Scene, diverge, fade

WIDTH = 360.0
_LEFT, _RIGHT, _TOP = 40.0, 8.0, 8.0
_LEGEND_ROW = 15.0
_SHOWN_CELLS = 130
#: Numbers stand on cells: the strongest shade leaves them readable.
_LEGIBLE = 0.78


@dataclass(frozen=True, kw_only=True)
class Axes:
    """How far a line chart's axes reach and what stands beside them.

    y_from, y_to: the least that is shown; y_to None: as the values want. even: a dashed line at this value; also: further values
    that there is room for.
    """

    y_from: float = 0.0
    y_to: float | None = None
    even: float | None = None
    also: Sequence[float] = ()
    x_name: str = "step"
    show: Callable[[float], str] = "{:g}".format


def line_chart(title: str, series: Sequence[tuple[str, Sequence[float], Sequence[float]]], axes: Axes | None = None, *,
               note: str = "") -> Scene:
    """Draw lines over steps.

    Args:
        series: name, steps, values (NaN is a gap) of each line; the colour goes by place.
    """
    axes = axes or Axes()
    height = 176.0
    rows = _legend_rows([name for name, *_ in series])
    scene = Scene(WIDTH, height + 30 + _LEGEND_ROW * len(rows), title, note)
    scene.numbers = [[axes.x_name, *(name for name, *_ in series)], *_by_x(series)]
    finite = [y for _, _, ys in series for y in ys if not math.isnan(y)]
    steps = [x for _, xs, _ in series for x in xs]
    if not finite:
        scene.text((WIDTH / 2, height / 2), "nothing logged", color="muted", anchor="middle")
        return scene
    low = min(axes.y_from, *finite, *axes.also)
    high = max(*finite, *axes.also, axes.even or finite[0], low + 1e-9) if axes.y_to is None else axes.y_to
    x0, x1 = min(steps), max(max(steps), min(steps) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return (_LEFT + (x - x0) / (x1 - x0) * (WIDTH - _LEFT - _RIGHT),
                _TOP + (high - min(max(y, low), high)) / (high - low) * (height - _TOP))

    _draw_axes(scene, place, (x0, x1), (low, high), axes)
    if axes.even is not None:
        scene.line([place(x0, axes.even), place(x1, axes.even)], "muted", dashed=True)
    for color, (name, xs, ys) in enumerate(series):
        for piece in _pieces(xs, ys):
            if len(piece) == 1:
                scene.dot(place(*piece[0]), 2.0, color, tip=name)
            # Colours come round again after a dozen: dashes tell the second round.
            scene.line([place(x, y) for x, y in piece], color, width=1.6, dashed=color >= len(SERIES), tip=name)
    _legend(scene, rows, height + 34)
    return scene


def _draw_axes(scene: Scene, place: Callable[[float, float], Point], x_range: Point, y_range: Point, axes: Axes) -> None:
    bottom = place(0, y_range[0])[1]
    for y in ticks(*y_range, 4):
        scene.line([place(x_range[0], y), place(x_range[1], y)], "grid")
        scene.text((_LEFT - 5, place(0, y)[1] + 3.5), axes.show(y), color="muted", anchor="end", size=10)
    for x in ticks(*x_range, 4):
        px = place(x, y_range[0])[0]
        anchor = "end" if px > WIDTH - 22 else "middle"
        scene.text((px, bottom + 14), short(x), color="muted", anchor=anchor, size=10)
    scene.text((_LEFT - 5, bottom + 14), axes.x_name, color="muted", anchor="end", size=10)


def bar_chart(title: str, bars: Sequence[tuple[str, float, str, str | int]], *, note: str = "", mark: float | None = None,
              mark_name: str = "", label_width: float = 92.0) -> Scene:
    """Draw bars that lie, one a row.

    Args:
        bars: name, length, words after it, colour.
        mark: a dashed line at this length.
    """
    row, top, words_width = 19.0, 6.0, 8.0 + 5.2 * max(len(words) for *_, words, _ in bars)
    scene = Scene(WIDTH, top + row * len(bars) + (16 if mark is not None else 4), title, note)
    scene.numbers = [["", "value"], *([name, value] for name, value, *_ in bars)]
    longest = max([value for _, value, *_ in bars if not math.isnan(value)] + [mark or 0.0, 1e-12])
    scale = (WIDTH - label_width - words_width - _RIGHT) / longest
    for place, (name, value, words, color) in enumerate(bars):
        y = top + row * place
        scene.text((label_width - 6, y + 12), name, anchor="end")
        if not math.isnan(value):
            scene.rect((label_width, y + 2, max(0.8, value * scale), row - 6), color, radius=2, tip=f"{name}: {words}")
        scene.text((WIDTH - _RIGHT, y + 12), words, color="muted", anchor="end", size=10)
    if mark is not None:
        x, bottom = label_width + mark * scale, top + row * len(bars)
        scene.line([(x, top), (x, bottom)], "fg", dashed=True)
        scene.text((x, bottom + 11), mark_name, color="muted", anchor="middle", size=10)
    return scene


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Names of a cell chart's rows and columns, and how a value is written and shaded (-1 blue, 0 clear, 1 orange)."""

    rows: Sequence[str]
    columns: Sequence[str]
    show: Callable[[float], str]
    shade: Callable[[np.ndarray], np.ndarray]
    row_name: str = ""
    column_name: str = ""


def cell_chart(title: str, values_RC: np.ndarray, cells: Cells, *, note: str = "") -> Scene:
    """Draw a table as shaded cells, with the numbers where there is room."""
    rows, columns, row_name = cells.rows, cells.columns, cells.row_name
    left = 14.0 + 5.6 * max(len(name) for name in [*rows, row_name])
    cell = min(68.0, (WIDTH - left - 4) / len(columns))
    high = min(20.0, max(5.0, 300.0 / len(rows)))
    top = 18.0
    scene = Scene(WIDTH, top + high * len(rows) + 8, title, note)
    scene.numbers = [[row_name, *columns], *([name, *map(_number, values)] for name, values in zip(rows, values_RC, strict=True))]
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
    legible = high >= 14 and cell >= 25
    if values_RC.size <= _SHOWN_CELLS or legible:
        for (row, column), value in np.ndenumerate(values_RC):
            words = "–" if np.isnan(value) else cells.show(value)
            x, y = left + cell * column, top + high * row
            tip = f"{row_name} {rows[row]}, {cells.column_name} {columns[column]}: {words}"
            scene.rect((x, y, cell, high), "fg", opacity=0.0, tip=tip)
            if legible:
                scene.text((x + cell / 2, y + high / 2 + 3.5), words, anchor="middle", size=9.5)
    return scene


def map_over_time(title: str, values_RT: np.ndarray, rows: Sequence[str], steps: Sequence[float], *, note: str = "",
                  groups: Sequence[tuple[str, int]] = ()) -> Scene:
    """Draw rows over steps as pixels, values in -1 ... 1.

    Args:
        groups: name and number of rows of each stretch of rows, named instead of single rows.
    """
    high = min(12.0, max(3.0, 420.0 / len(rows)))
    gap = 4.0 if groups else 0.0
    left, top, width = _LEFT + 14, 4.0, WIDTH - _LEFT - 14 - _RIGHT
    stretches = list(groups) or [("", len(rows))]
    scene = Scene(WIDTH, top + high * len(rows) + gap * len(stretches) + 22, title, note)
    scene.numbers = [["row", *map(str, steps)]]
    scene.numbers += [[name, *map(_number, values)] for name, values in zip(rows, values_RT, strict=True)]
    y, start = top, 0
    for name, count in stretches:
        scene.rect((left, y, width, high * count), "grid", opacity=0.35)
        scene.pixels((left, y, width, high * count), diverge(values_RT[start:start + count]))
        if name:
            scene.text((left - 6, y + high * count / 2 + 3.5), name, color="muted", anchor="end", size=10)
        elif high >= 9:
            for place in range(count):
                scene.text((left - 6, y + high * (place + 0.5) + 3.5), rows[place], color="muted", anchor="end", size=10)
        y, start = y + high * count + gap, start + count
    x0, x1 = steps[0], max(steps[-1], steps[0] + 1)
    for x in ticks(x0, x1, 4):
        px = left + (x - x0) / (x1 - x0) * width
        scene.text((px, y + 11), short(x), color="muted", anchor="end" if px > WIDTH - 22 else "middle", size=10)
    scene.text((left - 6, y + 11), "step", color="muted", anchor="end", size=10)
    return scene


def image_chart(title: str, images: Sequence[tuple[str, np.ndarray]], *, note: str = "", hue: str = "accent",
                columns: int = 4) -> Scene:
    """Draw small maps of values in 0 ... 1, each with its name."""
    columns = min(columns, len(images))
    side = min(84.0, (WIDTH - 8 * (columns + 1)) / columns)
    rows = -(-len(images) // columns)
    scene = Scene(WIDTH, rows * (side + 22) + 4, title, note)
    scene.numbers = [["map", "row", "column", "value"], *([name, r, c, _number(v)] for name, values in images
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
    rows = _legend_rows(names)
    scene = Scene(WIDTH, side + 16 + _LEGEND_ROW * len(rows), title, note)
    scene.numbers = [["x", "y", "group"]]
    scene.numbers += [[_number(x), _number(y), names[group]] for (x, y), group in zip(points_N2, groups_N, strict=True)]
    low, span = points_N2.min(axis=0), np.ptp(points_N2, axis=0).max() or 1.0
    for (x, y), group in zip((points_N2 - low) / span * (side - 8), groups_N, strict=True):
        scene.dot((12 + x, 8 + y), 2.1, int(group), opacity=0.75)
    _legend(scene, rows, side + 22)
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


def _legend(scene: Scene, rows: list[list[tuple[int, str, float]]], y: float) -> None:
    for row, entries in enumerate(rows):
        for place, name, x in entries:
            scene.rect((x, y + _LEGEND_ROW * row - 7, 8, 8), place, radius=2)
            scene.text((x + 12, y + _LEGEND_ROW * row), name, color="muted", size=10)


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
    return [[x, *(_number(column.get(x, math.nan)) for column in columns)] for x in steps]


def _number(value: float) -> object:
    return "" if math.isnan(value) else float(f"{value:.6g}")
