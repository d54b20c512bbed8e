"""Charts of every report, as Vega-Lite specifications over a table of their numbers: lines, bars,
dots.

A page draws them with the Vega libraries that vl-convert brings along; that library also makes PNGs
of them.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from promoe_ds.errors import ConfigError
from promoe_ds.reports.theme import (
    PICKED,
    THEMES,
    WIDTH,
    Spec,
    color_of,
    nominal,
    number,
    quantitative,
    slug,
    tooltip,
    vega_config,
)

Rows = list[list[Any]]
#: What draws figures, and the extra of this package that has it.
DRAWING = {"vl_convert": "report"}
#: Of an axis without marks.
NO_AXIS: Spec = {"ticks": False, "domain": False}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure: its numbers as a table, the first row names the columns, and how they are drawn."""

    title: str
    rows: Rows
    spec: Spec
    note: str = ""

    def vega_lite(self) -> Spec:
        """Return the specification with its data."""
        head, *rows = self.rows
        columns = zip(*rows, strict=True) if rows else ([],) * len(head)
        kinds = {
            name: "number"
            if all(isinstance(x, (int, float, type(None))) for x in cells)
            else "string"
            for name, cells in zip(head, columns, strict=True)
        }
        data = {"values": csv_text(self.rows), "format": {"type": "csv", "parse": kinds}}
        fit = {"type": "fit-x", "contains": "padding"}
        return {"width": "container", "autosize": fit, **self.spec, "data": data}

    def write(self, folder: Path) -> None:
        """Write PNG and CSV under a name made of the title.

        Raises: OSError; ConfigError without vl-convert.
        """
        name = slug(self.title)
        (folder / f"{name}.csv").write_text(csv_text(self.rows), encoding="utf-8")
        (folder / f"{name}.png").write_bytes(self.png())

    def png(self) -> bytes:
        """Return the picture, in the light theme.

        Raises: ConfigError without vl-convert.
        """
        spec = self.vega_lite()
        width = 1.5 * WIDTH if spec["width"] == "container" else spec["width"]
        note = textwrap.wrap(self.note, int(width / 6.4))
        title = {"text": self.title, "subtitle": note, "anchor": "start"}
        spec |= {"width": width, "background": THEMES["light"]["card"], "title": title}
        return vl_convert().vegalite_to_png(spec, config=vega_config("light"), scale=2)

    def _repr_png_(self) -> bytes:
        """Return what a notebook shows."""
        return self.png()


def csv_text(rows: Sequence[Sequence[Any]]) -> str:
    """Return a table as CSV: numbers in six digits, nothing for NaN."""
    text = io.StringIO()
    table = ([number(cell) for cell in row] for row in rows)
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue()


def vl_convert() -> ModuleType:
    """Return the library that brings Vega.

    Raises: ConfigError if it is not installed.
    """
    require_libraries(DRAWING)
    import vl_convert as library

    return library


def require_libraries(extras: Mapping[str, str]) -> None:
    """Check that libraries are installed.

    Args:
        extras: by library, the extra of this package that has it.
    Raises: ConfigError naming the first that is missing, and how to install it.
    """
    for library, extra in extras.items():
        if find_spec(library) is None:
            raise ConfigError(
                f"{library} is not installed, the report needs it: pip install 'promoe_ds[{extra}]'"
            )


def line_chart(
    title: str,
    x: tuple[str, Sequence[float]],
    series: dict[str, np.ndarray],
    *,
    note: str = "",
    domain: Sequence[float] | None = None,
    even: float | None = None,
    percent: bool = False,
    is_ordered: bool = False,
) -> Chart:
    """Draw lines.

    Args:
        x: its name and values; series: name -> values.
        domain: values that the y axis has room for at least; even: a dashed line.
        is_ordered: the lines are a sequence, like layers.
    """
    names = list(series)
    rows = [[x[0], *names], *([at, *row] for at, *row in zip(x[1], *series.values(), strict=True))]
    form = "%" if percent else ".4~g"
    scale = {"zero": False, **({"domain": list(domain), "nice": True} if domain else {})}
    legend = {} if len(names) > 1 else {"legend": None}
    encoding = {
        "x": steps_axis(x[0]),
        "y": quantitative("value", title=None, axis={"format": form}, scale=scale),
        "color": {**color_of("line", names, is_ordered=is_ordered), **legend},
    }
    layer = [
        *([] if even is None else [rule("y", even)]),
        *lines(encoding, tooltip("line", x[0], value=".1%" if percent else ".4~g"), "line"),
    ]
    spec = {"height": 170, "transform": [{"fold": names, "as": ["line", "value"]}], "layer": layer}
    return Chart(title=title, note=note, rows=rows, spec=spec)


def steps_axis(column: str) -> Spec:
    """Return the x axis of a sequence, like steps or noise levels."""
    axis = {"grid": False, "format": "~s" if column == "step" else "~g", "tickCount": 5}
    return quantitative(column, axis=axis, scale={"nice": False, "zero": False})


def lines(encoding: Spec, shown: list[Spec], column: str) -> list[Spec]:
    """Return layers of lines: a click in the legend shows one alone, the pointer shows values."""
    picked = {"name": "shown", "select": {"type": "point", "fields": [column]}, "bind": "legend"}
    points = {name: each for name, each in encoding.items() if name != "strokeDash"}
    return [
        {
            "mark": {"type": "line", "strokeWidth": 1.7},
            "params": [picked],
            "encoding": {**encoding, "opacity": PICKED},
        },
        {
            "mark": {"type": "circle", "opacity": 0, "size": 60},
            "encoding": {**points, "tooltip": shown},
        },
    ]


def rule(axis: str, value: float) -> Spec:
    """Return a dashed line across a chart, in a layer with data of its own."""
    return {
        "mark": {"type": "rule", "style": "reference"},
        "data": {"values": [{}]},
        "encoding": {axis: {"datum": value}},
    }


def bar_chart(
    title: str,
    bars: Sequence[tuple[str, float, str]],
    *,
    note: str = "",
    style: str = "under",
    mark: tuple[float, str] | None = None,
    columns: dict[str, Sequence[float]] | None = None,
    by_name: bool = False,
) -> Chart:
    """Draw a bar a row, to the left of zero if negative.

    Args:
        bars: name, length (NaN: none), words after it; mark: a dashed line at this length, and its
        name.
        columns: further numbers of each bar, for its table; by_name: each name has its colour.
    """
    columns, names = columns or {}, [name for name, *_ in bars]
    rows: Rows = [["name", "value", *columns, "words"]]
    for (name, value, words), *more in zip(bars, *columns.values(), strict=True):
        rows.append([name, value, *more, words])
    ends = [*(value for _, value, _ in bars if not np.isnan(value)), mark[0] if mark else 0.0, 0.0]
    low, high = min(ends), max(ends)
    # The words after the bars take a part of the width.
    part = min(0.75, 0.04 + 0.024 * max(len(words) for *_, words in bars))
    scale = {"domain": [low, high + (high - low or 1.0) * part / (1 - part)], "nice": False}
    axis = {"tickCount": 4, "format": "~s" if high >= 1e3 else ".4~g"}
    y = nominal("name", sort=names, title=None, axis=NO_AXIS)
    bar: Spec = {
        "x": quantitative("value", title=None, axis=axis, scale=scale),
        "y": y,
        "tooltip": [nominal(name) for name in rows[0][:-1]],
        **({"color": {**color_of("name", names), "legend": None}} if by_name else {}),
    }
    text = {"x": {"value": "width"}, "y": y, "text": {"field": "words"}}
    layer = [
        {"mark": {"type": "bar", "style": style, "cornerRadius": 2}, "encoding": bar},
        {"mark": {"type": "text", "align": "right", "style": "muted"}, "encoding": text},
        *([rule("x", mark[0])] if mark else []),
    ]
    return Chart(
        title=title,
        note=note + (f" Dashed: {mark[1]}." if mark else ""),
        rows=rows,
        spec={"height": min(19, max(9, 456 / len(bars))) * len(bars), "layer": layer},
    )


def scatter_chart(
    title: str,
    points_N2: np.ndarray,
    groups: Sequence[str],
    names: Sequence[str],
    *,
    note: str = "",
) -> Chart:
    """Draw points coloured by group; the axes have no meaning and no marks."""
    x, y = (quantitative(axis, axis=None, scale={"zero": False}) for axis in "xy")
    points = zip(points_N2.tolist(), groups, strict=True)
    encoding: Spec = {
        "x": x,
        "y": y,
        "color": color_of("group", names),
        "tooltip": {"field": "group"},
    }
    spec = {"height": WIDTH, "mark": {"type": "circle", "size": 18}, "encoding": encoding}
    rows = [["x", "y", "group"], *([x, y, group] for (x, y), group in points)]
    return Chart(title=title, note=note, rows=rows, spec=spec)


def finite(values: Iterable[np.ndarray]) -> list[float]:
    """Return the smallest and largest of all values that are not NaN; nothing if all are."""
    known = [each for each in values if not np.isnan(each).all()]
    return [min(map(np.nanmin, known)).item(), max(map(np.nanmax, known)).item()] if known else []
