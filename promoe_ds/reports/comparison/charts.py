"""The comparison's charts: a candidate has one colour, dash and shape in all of them.

`comparison` is the content of comparison.json everywhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from promoe_ds.reports.charts import NO_AXIS, Chart, Rows, lines, rule, steps_axis
from promoe_ds.reports.theme import PICKED, color_of, mark_of, nominal, quantitative, tooltip

#: Points of a curve that one drawn point averages: single batches vary more than candidates differ.
_RUNNING_SHARE = 20
#: A landmark farther from the points than this many times their spread is left out, or it would
# press them together.
_LANDMARK_REACH = 3.0

Curve = list[tuple[int, float]]


def charts(comparison: Mapping[str, Any]) -> list[Chart | None]:
    """Return all charts; None for what no run has."""
    entries, window = comparison["contenders"], running_window(comparison)
    first = entries[0]
    losses = {
        entry["name"]: [
            running_mean(result["loss_curve"], window) for result in entry["seeds"].values()
        ]
        for entry in entries
    }
    differences = {
        entry["name"]: [
            running_mean(
                difference(result["loss_curve"], first["seeds"][seed]["loss_curve"]), window
            )
            for seed, result in entry["seeds"].items()
            if seed in first["seeds"]
        ]
        for entry in entries[1:]
    }
    found = [
        _curves(
            comparison,
            "Diffusion loss",
            losses,
            "diffusion loss (logarithmic)",
            is_logarithmic=True,
        ),
        _curves(
            comparison,
            f"Diffusion loss minus that of {first['name']}, same seed and step",
            differences,
            "difference of diffusion losses",
        ),
    ]
    return [
        *found,
        *_of_images(comparison),
        points(
            comparison, "step_ms", "Time of a training step", unit="milliseconds, median of a run"
        ),
        load_per_block(comparison),
    ]


def _of_images(comparison: Mapping[str, Any]) -> list[Chart | None]:
    results = [result for entry in comparison["contenders"] for result in entry["seeds"].values()]
    images = next((result["images"] for result in results if result["images"]), None)
    if images is None:
        return []
    return [
        points(
            comparison,
            "heldout_loss",
            "Diffusion loss of the averaged weights on held-out digits, lower is better",
            unit="squared error, equal noise for all",
        ),
        points(
            comparison,
            "frechet",
            "Fréchet distance of pixels to held-out digits, lower is better",
            unit="squared distance, pixels in [0, 1]",
            landmark=("training digits", images["frechet_of_training_digits"]),
        ),
        points(
            comparison,
            "accuracy",
            "Samples recognised as their label, higher is better",
            unit="% of samples",
            factor=100.0,
            landmark=("real digits", images["accuracy_on_real"]),
        ),
    ]


def running_window(comparison: Mapping[str, Any]) -> int:
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
        (int(curve[i][0]), statistics.fmean(value for _, value in curve[i - window + 1 : i + 1]))
        for i in range(window - 1, len(curve))
    ]


def difference(curve: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Curve:
    """Return curve - base at the steps that both have."""
    values = {int(step): value for step, value in base}
    return [(int(step), value - values[int(step)]) for step, value in curve if int(step) in values]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation, 0 of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _curves(
    comparison: Mapping[str, Any],
    title: str,
    curves: Mapping[str, Sequence[Curve]],
    unit: str,
    *,
    is_logarithmic: bool = False,
) -> Chart | None:
    """Draw the mean over seeds and a band of one standard deviation, at the steps that all seeds
    have.
    """
    rows: Rows = [["step", "candidate", "mean", "low", "high"]]
    for name, of_seeds in curves.items():
        by_step = [dict(curve) for curve in of_seeds]
        for step in sorted(set.intersection(*map(set, by_step))) if by_step else ():
            mean, spread = mean_and_spread([values[step] for values in by_step])
            rows.append([step, name, mean, mean - spread, mean + spread])
    if len(rows) == 1:
        return None
    names = _names(comparison)
    scale = {"type": "log", "nice": False} if is_logarithmic else {"zero": False}
    y = quantitative("mean", title=unit, axis={"tickCount": 5, "format": "~g"}, scale=scale)
    encoding = {"x": steps_axis("step"), "color": color_of("candidate", names)}
    faint = {"condition": {**PICKED["condition"], "value": 0.2}, "value": 0.0}
    area = {**encoding, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "opacity": faint}
    line = {**encoding, "y": y, "strokeDash": mark_of("strokeDash", "candidate", names)}
    layer = [] if is_logarithmic else [rule("y", 0.0)]
    layer += [
        {"mark": "area", "encoding": area},
        *lines(line, tooltip("candidate", "step", mean=".4~g"), "candidate"),
    ]
    return Chart(title=title, rows=rows, spec={"height": 210, "layer": layer})


def points(
    comparison: Mapping[str, Any],
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
    entries, names = comparison["contenders"], _names(comparison)
    rows: Rows = [["candidate", "seed", "value", "mean", "low", "high"]]
    for entry in entries:
        if summary := entry["summary"][metric]:
            mean, sd = factor * summary["mean"], factor * (summary["sd"] or 0.0)
            values = {
                seed: result[metric]
                for seed, result in entry["seeds"].items()
                if result.get(metric) is not None
            }
            rows += [
                [entry["name"], seed, factor * value, mean, mean - sd, mean + sd]
                for seed, value in values.items()
            ]
    if len(rows) == 1:
        return None
    x = quantitative(
        "value", title=unit, scale={"zero": False, "padding": 10}, axis={"tickCount": 5}
    )
    axis = {**NO_AXIS, "labelLimit": 130}
    y = nominal("candidate", sort=names, scale={"domain": names}, title=None, axis=axis)
    encoding = {"y": y, "color": {**color_of("candidate", names), "legend": None}}
    seeds = {**encoding, "x": x, "shape": {**mark_of("shape", "candidate", names), "legend": None}}
    spread = {**encoding, "x": {**x, "field": "low"}, "x2": {"field": "high"}}
    layer = [
        {"mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": spread},
        {
            "mark": {"type": "tick", "thickness": 3, "bandSize": 18},
            "encoding": {**encoding, "x": {**x, "field": "mean"}},
        },
        {
            "mark": {"type": "point", "size": 45, "strokeWidth": 1.5},
            "encoding": {
                **seeds,
                "tooltip": tooltip("candidate", "seed", value=".4~g", mean=".4~g"),
            },
        },
    ]
    note = ""
    if landmark and is_near(landmark[1], entries, metric):
        layer.append(rule("x", factor * landmark[1]))
        note = f"Dashed: {landmark[0]}, {factor * landmark[1]:.3g}."
    return Chart(
        title=title, rows=rows, note=note, spec={"height": 26 * len(names), "layer": layer}
    )


def is_near(landmark: float, entries: Sequence[Mapping[str, Any]], metric: str) -> bool:
    """Return whether a landmark leaves the points of a metric some room when drawn with them."""
    summaries = [entry["summary"][metric] for entry in entries if entry["summary"][metric]]
    low, high = min(s["min"] for s in summaries), max(s["max"] for s in summaries)
    reach = _LANDMARK_REACH * max(high - low, 0.02 * abs(high))
    return low - reach <= landmark <= high + reach


def load_per_block(comparison: Mapping[str, Any]) -> Chart | None:
    """Draw max/mean load of every MoE block: mean over seeds, standard deviation as a line."""
    rows: Rows = [["block", "candidate", "mean", "low", "high"]]
    for entry in comparison["contenders"]:
        values: dict[int, list[float]] = {}
        for result in entry["seeds"].values():
            for layer in result["layers"] or ():
                if layer["max_over_mean"] is not None:
                    values.setdefault(layer["layer"], []).append(layer["max_over_mean"])
        for block, of_seeds in sorted(values.items()):
            mean, spread = mean_and_spread(of_seeds)
            rows.append([block, entry["name"], mean, mean - spread, mean + spread])
    if len(rows) == 1:
        return None
    names, shown = _names(comparison), {row[1] for row in rows[1:]}
    ours = [name for name in names if name in shown]
    color, shape = color_of("candidate", names), mark_of("shape", "candidate", names)
    legend = {**color["legend"], "values": ours}
    y = quantitative("mean", title="largest load / mean load", scale={"zero": False})
    x = nominal("block", title="transformer block", axis={"labelAngle": 0})
    encoding: dict[str, Any] = {
        "x": x,
        "xOffset": {"field": "candidate", "sort": ours},
        "color": {**color, "legend": legend},
    }
    band = {**encoding, "y": {**y, "field": "low"}, "y2": {"field": "high"}}
    point = {
        **encoding,
        "y": y,
        "shape": {**shape, "legend": legend},
        "tooltip": tooltip("candidate", "block", mean=".3~g"),
    }
    layer = [
        {"mark": "rule", "encoding": band},
        {"mark": {"type": "point", "size": 45}, "encoding": point},
        rule("y", 1.0),
    ]
    title = "Expert load by block, largest over mean (1 is even)"
    return Chart(title=title, rows=rows, spec={"height": 190, "layer": layer})


def _names(comparison: Mapping[str, Any]) -> list[str]:
    return [entry["name"] for entry in comparison["contenders"]]
