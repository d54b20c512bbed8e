"""Charts of shaded cells: tables, loads over training, patches of an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from promoe_ds.reports.charts import NO_AXIS, Chart, Rows, steps_axis
from promoe_ds.reports.theme import LOAD_COLOR, WIDTH, Spec, nominal, quantitative, tooltip

#: A cell of more columns is too narrow for its number.
_MOST_NUMBERED = 13
#: Rows of a map over time that are drawn, and how high they are together.
_MOST_ROWS, _MAP_HEIGHT = 400, 800
#: Of a row's name "group name", the group.
_GROUP = "replace(datum.label, / [^ ]*$/, '')"


def heat_chart(
    title: str,
    values_RC: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    names: tuple[str, str],
    color: Spec | None = None,
    form: str = ".2f",
    note: str = "",
) -> Chart:
    """Draw a table as shaded cells, with their numbers if there is room.

    Args:
        names: of rows and columns; color: the shade's scale, that of loads if left out.
    """
    cells = ([rows[r], columns[c], value] for (r, c), value in np.ndenumerate(values_RC))
    high = min(20.0, max(3.0, 300.0 / len(rows)))
    top = {**NO_AXIS, "orient": "top", "labelAngle": 0, "labelOverlap": True}
    shade = quantitative("value", **(color or LOAD_COLOR))
    layer: list[Spec] = [{"mark": "rect", "encoding": {"color": shade}}]
    if high >= 14 and len(columns) <= _MOST_NUMBERED:
        layer.append({"mark": "text", "encoding": {"text": quantitative("value", format=form)}})
    encoding = {
        "x": nominal(names[1], sort=list(columns), axis=top),
        "y": nominal(names[0], sort=list(rows), axis={**NO_AXIS, "labelOverlap": True}),
        "tooltip": tooltip(*names, value=".4~g"),
    }
    spec = {"height": high * len(rows), "encoding": encoding, "layer": layer}
    return Chart(title=title, note=note, rows=[[*names, "value"], *cells], spec=spec)


def map_over_time(
    title: str,
    values_RT: np.ndarray,
    rows: Sequence[str],
    steps: Sequence[float],
    *,
    note: str = "",
) -> Chart:
    """Draw loads, a row each, over steps.

    Of many rows, each drawn one has the load of a few that is farthest from even.

    Args:
        rows: "group name"; the first of each group is labelled by the group.
    """
    few = -(-len(rows) // _MOST_ROWS)
    if few > 1:
        note = f"{note} Each row is {few} experts: the one farthest from even."
        groups = [slice(start, start + few) for start in range(0, len(rows), few)]
        values_RT = np.stack([farthest_from_even(values_RT[group]) for group in groups])
        rows = [f"{rows[group][0]}…" for group in groups]
    starts = zip([0, *steps[:-1]], steps, values_RT.T.tolist(), strict=True)
    table = [["from", "step", *rows], *([start, step, *values] for start, step, values in starts)]
    by_group = {name.rpartition(" ")[0]: name for name in reversed(rows)}
    marked = {
        "values": list(by_group.values()),
        "grid": True,
        "tickBand": "extent",
        "zindex": 1,
        "labelExpr": _GROUP,
        "labelOffset": -4,
        "labelBaseline": "top",
    }
    axis = {**NO_AXIS, "labelOverlap": True, **(marked if len(by_group) > 1 else {})}
    spec = {
        "height": min(12.0, max(3.0, 420.0 / len(rows)), _MAP_HEIGHT / len(rows)) * len(rows),
        "mark": "rect",
        "transform": [{"fold": list(rows), "as": ["row", "load"]}],
        "encoding": {
            "x": {**steps_axis("step"), "field": "from", "title": "step"},
            "x2": {"field": "step"},
            "y": nominal("row", sort=list(rows), title=None, axis=axis),
            "color": quantitative("load", **LOAD_COLOR),
            "tooltip": tooltip("row", step=",", load=".3~g"),
        },
    }
    return Chart(title=title, note=note, rows=table, spec=spec)


def tile_chart(
    title: str, tiles: dict[str, np.ndarray], *, columns: int = 4, note: str = ""
) -> Chart:
    """Draw small maps of shares in 0 ... 1, all of one size, side by side, each under its name."""
    down, across = next(iter(tiles.values())).shape
    rows: Rows = [["map", "row", "column", "share", "x", "y"]]
    for place, (name, values) in enumerate(tiles.items()):
        left, top = (place % columns) * (across + 1), (place // columns) * (down + 2) + 1
        rows += [[name, r, c, v, left + c, top + r] for (r, c), v in np.ndenumerate(values)]
    wide, tall = columns * (across + 1) - 1, -(-len(tiles) // columns) * (down + 2)
    cells = {
        **plane(wide, tall),
        "x2": {"field": "x2"},
        "y2": {"field": "y2"},
        "color": quantitative("share", scale={"domain": [0, 1], "range": "ramp"}),
        "tooltip": tooltip("map", "row", "column", share=".1%"),
    }
    first = [{"op": "min", "field": axis, "as": axis} for axis in "xy"]
    layer = [
        {
            "transform": [{"calculate": f"datum.{axis} + 1", "as": f"{axis}2"} for axis in "xy"],
            "mark": "rect",
            "encoding": cells,
        },
        {
            "transform": [{"aggregate": first, "groupby": ["map"]}],
            "mark": {
                "type": "text",
                "align": "left",
                "baseline": "bottom",
                "dy": -2,
                "style": "muted",
            },
            "encoding": {**plane(wide, tall), "text": {"field": "map"}},
        },
    ]
    spec = {"width": WIDTH - 20, "height": (WIDTH - 20) * tall / wide, "layer": layer}
    return Chart(title=title, note=note, rows=rows, spec=spec)


def plane(wide: float, tall: float) -> Spec:
    """Return x and y of a plane without axes, y downwards."""
    return {
        "x": quantitative("x", axis=None, scale={"domain": [0, wide], "nice": False}),
        "y": quantitative("y", axis=None, scale={"domain": [tall, 0], "nice": False}),
    }


def farthest_from_even(values_R: np.ndarray) -> np.ndarray:
    """Return, in each column, the load whose logarithm is farthest from even: none before all."""
    distance = np.nan_to_num(np.abs(np.log(np.maximum(values_R, 1e-6))))
    return np.take_along_axis(values_R, distance.argmax(axis=0)[None], axis=0)[0]
