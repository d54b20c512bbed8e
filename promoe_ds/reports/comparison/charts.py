"""The comparison's charts: a candidate has one colour, dash and shape in all of them.

`comparison` is the content of comparison.json everywhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from promoe_ds.evaluation.judges.table import figures_of
from promoe_ds.reports.charts import NO_AXIS, Chart, Rows, lines, rule, steps_axis
from promoe_ds.reports.theme import (
    PICKED,
    Spec,
    color_of,
    mark_of,
    nominal,
    quantitative,
    tooltip,
)

#: Points of a curve that one drawn point averages: single batches vary more than candidates differ.
_RUNNING_SHARE = 20
#: A landmark farther from the points than this many times their spread is left out, or it would
#: press them together.
_LANDMARK_REACH = 3.0

Comparison = Mapping[str, Any]
Curve = list[tuple[int, float]]


def charts(comparison: Comparison) -> list[Chart | None]:
    """Return all charts; None for what no run has."""
    first, *others = comparison["contenders"]
    window = running_window(comparison)
    losses = {
        entry["name"]: [
            running_mean(each["loss_curve"], window) for each in entry["seeds"].values()
        ]
        for entry in (first, *others)
    }
    differences = {
        entry["name"]: [
            running_mean(
                difference(result["loss_curve"], first["seeds"][seed]["loss_curve"]), window
            )
            for seed, result in entry["seeds"].items()
            if seed in first["seeds"]
        ]
        for entry in others
    }
    minus = f"Diffusion loss minus that of {first['name']}, same seed and step"
    time = "milliseconds, median of a run"
    return [
        _curves(comparison, "Diffusion loss", losses, "diffusion loss (logarithmic)", is_log=True),
        _curves(comparison, minus, differences, "difference of diffusion losses"),
        *_of_images(comparison),
        points(comparison, "step_ms", "Time of a training step", unit=time),
        load_per_block(comparison),
    ]


def _of_images(comparison: Comparison) -> list[Chart | None]:
    results = [result for entry in comparison["contenders"] for result in entry["seeds"].values()]
    images = next((result["images"] for result in results if result["images"]), None)
    if images is None:
        return []
    return [
        points(
            comparison,
            figure.name,
            figure.title,
            unit=figure.unit,
            factor=figure.factor,
            landmark=figure.landmark and (figure.landmark[0], images[figure.landmark[1]]),
        )
        for figure in figures_of(comparison["dataset"])
    ]


def running_window(comparison: Comparison) -> int:
    """Return how many log lines a drawn point of a curve averages."""
    lengths = [
        len(result["loss_curve"])
        for entry in comparison["contenders"]
        for result in entry["seeds"].values()
    ]
    return max(1, min(lengths, default=0) // _RUNNING_SHARE)


def running_mean(curve: Sequence[Sequence[float]], window: int) -> Curve:
    """Return a curve's trailing means over `window` points, placed at the last of them."""
    return [
        (int(curve[end - 1][0]), statistics.fmean(value for _, value in curve[end - window : end]))
        for end in range(window, len(curve) + 1)
    ]


def difference(curve: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Curve:
    """Return curve - base at the steps that both have."""
    values = {int(step): value for step, value in base}
    return [(int(step), value - values[int(step)]) for step, value in curve if int(step) in values]


def _band(values: Sequence[float]) -> list[float]:
    """Return the mean, and it minus and plus one standard deviation, which is 0 of one value."""
    mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return [mean, mean - spread, mean + spread]


def _curves(
    comparison: Comparison,
    title: str,
    curves: Mapping[str, Sequence[Curve]],
    unit: str,
    *,
    is_log: bool = False,
) -> Chart | None:
    """Draw the mean over seeds and a band of one standard deviation, at the steps that all seeds
    have.
    """
    names, rows = _names(comparison), []
    for name, of_seeds in curves.items():
        by_step = [dict(curve) for curve in of_seeds]
        for step in sorted(set.intersection(*map(set, by_step))) if by_step else ():
            rows.append([step, name, *_band([values[step] for values in by_step])])
    scale = {"type": "log", "nice": False} if is_log else {"zero": False}
    y = quantitative("mean", title=unit, axis={"tickCount": 5, "format": "~g"}, scale=scale)
    encoding: Spec = {"x": steps_axis("step"), "color": color_of("candidate", names)}
    faint: Spec = {"condition": {**PICKED["condition"], "value": 0.2}, "value": 0.0}
    line = {**encoding, "y": y, "strokeDash": mark_of("candidate", names)}
    layer: list[Spec] = [
        *([] if is_log else [rule("y", 0.0)]),
        {"mark": "area", "encoding": {**encoding, **_spread("y", y), "opacity": faint}},
        *lines(line, tooltip("candidate", "step", mean=".4~g"), "candidate"),
    ]
    return _chart(title, ["step", "candidate", "mean", "low", "high"], rows, 210, layer)


def _spread(axis: str, encoding: Spec) -> Spec:
    """Return the encoding of what goes from `low` to `high`."""
    return {axis: {**encoding, "field": "low"}, f"{axis}2": {"field": "high"}}


def _chart(
    title: str, head: list[str], rows: Rows, height: float, layer: list[Spec], note: str = ""
) -> Chart | None:
    spec = {"height": height, "layer": layer}
    return Chart(title=title, rows=[head, *rows], spec=spec, note=note) if rows else None


def points(
    comparison: Comparison,
    metric: str,
    title: str,
    *,
    unit: str,
    factor: float = 1.0,
    landmark: tuple[str, float] | None = None,
) -> Chart | None:
    """Draw one row a candidate: a point for every seed, the mean as a bar across, its standard
    deviation as a line.

    Args:
        factor: from the metric to the unit; landmark: a value to mark, if it is near the points.
    """
    entries, names, rows = comparison["contenders"], _names(comparison), []
    for entry in entries:
        if summary := entry["summary"][metric]:
            mean, sd = factor * summary["mean"], factor * (summary["sd"] or 0.0)
            rows += [
                [entry["name"], seed, factor * result[metric], mean, mean - sd, mean + sd]
                for seed, result in entry["seeds"].items()
                if result.get(metric) is not None
            ]
    x = quantitative(
        "value", title=unit, scale={"zero": False, "padding": 10}, axis={"tickCount": 5}
    )
    axis = {**NO_AXIS, "labelLimit": 130}
    y = nominal("candidate", sort=names, scale={"domain": names}, title=None, axis=axis)
    encoding: Spec = {"y": y, "color": {**color_of("candidate", names), "legend": None}}
    seeds = {
        **encoding,
        "x": x,
        "shape": {**mark_of("candidate", names), "legend": None},
        "tooltip": tooltip("candidate", "seed", value=".4~g", mean=".4~g"),
    }
    layer: list[Spec] = [
        {
            "mark": {"type": "rule", "strokeWidth": 1.5},
            "encoding": {**encoding, **_spread("x", x)},
        },
        {
            "mark": {"type": "tick", "thickness": 3, "bandSize": 18},
            "encoding": {**encoding, "x": {**x, "field": "mean"}},
        },
        {"mark": {"type": "point", "size": 45, "strokeWidth": 1.5}, "encoding": seeds},
    ]
    note = ""
    if rows and landmark and is_near(landmark[1], entries, metric):
        layer.append(rule("x", factor * landmark[1]))
        note = f"Dashed: {landmark[0]}, {factor * landmark[1]:.3g}."
    head = ["candidate", "seed", "value", "mean", "low", "high"]
    return _chart(title, head, rows, 26 * len(names), layer, note)


def is_near(landmark: float, entries: Sequence[Mapping[str, Any]], metric: str) -> bool:
    """Return whether a landmark leaves the points of a metric some room when drawn with them."""
    summaries = [entry["summary"][metric] for entry in entries if entry["summary"][metric]]
    low, high = min(s["min"] for s in summaries), max(s["max"] for s in summaries)
    reach = _LANDMARK_REACH * max(high - low, 0.02 * abs(high))
    return low - reach <= landmark <= high + reach


def load_per_block(comparison: Comparison) -> Chart | None:
    """Draw max/mean load of every MoE block: mean over seeds, standard deviation as a line."""
    rows = []
    for entry in comparison["contenders"]:
        values: dict[int, list[float]] = {}
        for block in (each for run in entry["seeds"].values() for each in run["layers"] or ()):
            if block["max_over_mean"] is not None:
                values.setdefault(block["layer"], []).append(block["max_over_mean"])
        rows += [[place, entry["name"], *_band(values[place])] for place in sorted(values)]
    names, shown = _names(comparison), {row[1] for row in rows}
    ours = [name for name in names if name in shown]
    color, shape = color_of("candidate", names), mark_of("candidate", names)
    legend = {**color["legend"], "values": ours}
    y = quantitative("mean", title="largest load / mean load", scale={"zero": False})
    encoding: Spec = {
        "x": nominal("block", title="transformer block", axis={"labelAngle": 0}),
        "xOffset": {"field": "candidate", "sort": ours},
        "color": {**color, "legend": legend},
    }
    point = {
        **encoding,
        "y": y,
        "shape": {**shape, "legend": legend},
        "tooltip": tooltip("candidate", "block", mean=".3~g"),
    }
    layer: list[Spec] = [
        {"mark": "rule", "encoding": {**encoding, **_spread("y", y)}},
        {"mark": {"type": "point", "size": 45}, "encoding": point},
        rule("y", 1.0),
    ]
    title = "Expert load by block, largest over mean (1 is even)"
    return _chart(title, ["block", "candidate", "mean", "low", "high"], rows, 190, layer)


def _names(comparison: Comparison) -> list[str]:
    return [entry["name"] for entry in comparison["contenders"]]
