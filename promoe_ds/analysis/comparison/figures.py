"""The report's figures: SVG texts for embedding, in the page's own text colour, legible without colour vision.

A contender has one colour (Okabe and Ito, 2008), one line style and one marker in all figures. Titles are the page's, which
breaks their lines where the screen ends. `comparison` is the content of comparison.json everywhere.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Stand-ins, replaced by CSS in the finished SVG, so that a figure follows the page into the dark.
_INK, _GRID = "#010203", "#040506"
_CSS = {_INK: "currentColor", _GRID: "var(--line)"}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")  # one more than colours: pairs repeat late
_WIDTH, _LEGEND_ROW = 5.4, 0.19  # inches
_RC = {"font.size": 10, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK,
       "ytick.color": _INK, "grid.color": _GRID, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
       "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
       "legend.frameon": False, "svg.fonttype": "path", "text.parse_math": False}
#: Points of a curve that one drawn point averages: single batches scatter more than contenders differ.
_RUNNING_SHARE = 20
#: A landmark further from the points than this many times their spread would press them together: it is left out.
_LANDMARK_REACH = 3.0

Curve = list[tuple[int, float]]


def running_window(comparison: Mapping[str, Any]) -> int:
    """Return how many log lines a drawn point of a curve averages."""
    lengths = [len(result["loss_curve"]) for entry in comparison["contenders"] for result in entry["seeds"].values()]
    return max(1, min(lengths, default=0) // _RUNNING_SHARE)


def draw_loss_curves(comparison: Mapping[str, Any]) -> str | None:
    """Draw every contender's loss over the steps: mean over seeds, band of one standard deviation."""
    window = running_window(comparison)
    curves = [[running_mean(result["loss_curve"], window) for result in entry["seeds"].values()]
              for entry in comparison["contenders"]]
    return _draw_curves(comparison, curves, unit="diffusion loss (logarithmic)", is_logarithmic=True)


def draw_loss_differences(comparison: Mapping[str, Any]) -> str | None:
    """Draw every other contender's loss minus the first one's of the same seed and step."""
    window, first = running_window(comparison), comparison["contenders"][0]
    curves: list[list[Curve]] = [[]]
    for entry in comparison["contenders"][1:]:
        pairs = [(result["loss_curve"], first["seeds"][seed]["loss_curve"]) for seed, result in entry["seeds"].items()
                 if seed in first["seeds"]]
        curves.append([running_mean(difference(mine, base), window) for mine, base in pairs])
    return _draw_curves(comparison, curves, unit="difference of diffusion losses")


def running_mean(curve: Sequence[Sequence[float]], window: int) -> Curve:
    """Return a curve's trailing means over `window` points, placed at the last of them."""
    return [(int(curve[i][0]), statistics.fmean(value for _, value in curve[i - window + 1:i + 1]))
            for i in range(window - 1, len(curve))]


def difference(curve: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Curve:
    """Return curve - base at the steps that both have."""
    values = {int(step): value for step, value in base}
    return [(int(step), value - values[int(step)]) for step, value in curve if int(step) in values]


def mean_and_spread(curves: Sequence[Curve]) -> list[tuple[int, float, float]]:
    """Return (step, mean, standard deviation or 0) at the steps that all curves have."""
    by_step = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(values) for values in by_step))) if by_step else []
    columns = [(step, [values[step] for values in by_step]) for step in steps]
    return [(step, statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for step, v in columns]


def _draw_curves(comparison: Mapping[str, Any], curves: Sequence[Sequence[Curve]], *, unit: str,
                 is_logarithmic: bool = False) -> str | None:
    spreads = [mean_and_spread(of_contender) for of_contender in curves]
    if not any(spreads):
        return None

    def _plot(figure: Figure, axes: Axes) -> None:
        for index, points in enumerate(spreads):
            if points:
                steps, means, sds = (list(column) for column in zip(*points, strict=True))
                axes.plot(steps, means, color=_colour(index), linestyle=_STYLES[index % len(_STYLES)], linewidth=1.8,
                          label=comparison["contenders"][index]["name"], marker=_MARKERS[index % len(_MARKERS)],
                          markevery=(index * len(steps) // 20, max(1, len(steps) // 5)), markersize=4.5)
                axes.fill_between(steps, [m - s for m, s in zip(means, sds, strict=True)],
                                  [m + s for m, s in zip(means, sds, strict=True)], color=_colour(index), alpha=0.18, linewidth=0)
        if is_logarithmic:
            _set_logarithmic(axes)
        else:
            axes.axhline(0.0, color=_INK, linewidth=1)
        axes.set(xlabel="optimizer step", ylabel=unit)
        _legend(figure, axes)

    return _render(_plot, height=3.0)


def _set_logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_points(comparison: Mapping[str, Any], metric: str, *, unit: str, landmark: float | None = None,
                factor: float = 1.0) -> str | None:
    """Draw one row a contender: a point for every seed, the mean as a bar across, its standard deviation as a line.

    Args:
        landmark: value to mark with a dotted line, if it lies near the points.
        factor: from the metric to the unit.
    """
    entries = comparison["contenders"]
    if not any(entry["summary"][metric] for entry in entries):
        return None

    def _plot(figure: Figure, axes: Axes) -> None:
        for index, entry in enumerate(entries):
            values = [factor * result[metric] for result in entry["seeds"].values() if result.get(metric) is not None]
            summary = entry["summary"][metric]
            if summary is not None:
                mean, sd = factor * summary["mean"], factor * (summary["sd"] or 0.0)
                axes.plot([mean - sd, mean + sd], [index, index], color=_colour(index), linewidth=1.5)
                axes.plot([mean, mean], [index - 0.28, index + 0.28], color=_colour(index), linewidth=3)
                axes.plot(values, [index] * len(values), linestyle="none", marker=_MARKERS[index % len(_MARKERS)], markersize=6,
                          markerfacecolor="none", markeredgecolor=_colour(index), markeredgewidth=1.5)
        if landmark is not None and is_near(landmark, entries, metric):
            axes.axvline(factor * landmark, color=_INK, linewidth=1.3, linestyle=":")
        axes.set_yticks(range(len(entries)), [entry["name"] for entry in entries])
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.set(xlabel=unit)
        axes.grid(axis="y", visible=False)

    return _render(_plot, height=0.9 + 0.36 * len(entries))


def is_near(landmark: float, entries: Sequence[Mapping[str, Any]], metric: str) -> bool:
    """Return whether a landmark leaves the points of a metric some room when drawn with them."""
    summaries = [entry["summary"][metric] for entry in entries if entry["summary"][metric]]
    low, high = min(s["min"] for s in summaries), max(s["max"] for s in summaries)
    spread = max(high - low, 0.02 * abs(high))
    return low - _LANDMARK_REACH * spread <= landmark <= high + _LANDMARK_REACH * spread


def draw_load_per_layer(comparison: Mapping[str, Any]) -> str | None:
    """Draw max/mean load of every MoE block: mean over seeds, standard deviation as a bar."""
    series = {index: load_by_layer(entry) for index, entry in enumerate(comparison["contenders"])}
    series = {index: layers for index, layers in series.items() if layers}
    if not series:
        return None

    def _plot(figure: Figure, axes: Axes) -> None:
        layers = sorted({layer for values in series.values() for layer in values})
        for place, (index, values) in enumerate(series.items()):
            shift = 0.5 * ((place + 0.5) / len(series) - 0.5)
            axes.errorbar([layers.index(layer) + shift for layer in values], [mean for mean, _ in values.values()],
                          yerr=[sd for _, sd in values.values()], color=_colour(index), linestyle="none", capsize=3,
                          marker=_MARKERS[index % len(_MARKERS)], markersize=6, label=comparison["contenders"][index]["name"])
        axes.axhline(1.0, color=_INK, linewidth=1)
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set(xlabel="transformer block", ylabel="largest load / mean load")
        axes.set_xlim(-0.6, len(layers) - 0.4)
        axes.grid(axis="x", visible=False)
        _legend(figure, axes)

    return _render(_plot, height=2.8)


def load_by_layer(entry: Mapping[str, Any]) -> dict[int, tuple[float, float]]:
    """Return (mean over seeds, standard deviation or 0) of the load's max/mean by layer; empty without experts."""
    values: dict[int, list[float]] = {}
    for result in entry["seeds"].values():
        for layer in result["layers"] or ():
            if layer["max_over_mean"] is not None:
                values.setdefault(layer["layer"], []).append(layer["max_over_mean"])
    return {layer: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for layer, v in sorted(values.items())}


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 2 if max(map(len, labels)) < 32 else 1
        # The page grows for a long legend, the axes keep their height.
        figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, fontsize=9, handlelength=3, markerscale=1.0)


def _render(plot: Callable[[Figure, Axes], None], *, height: float) -> str:
    """Return the SVG element of a figure that `plot` fills."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_RC, "svg.hashsalt": plot.__qualname__}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        plot(figure, figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    for stand_in, css in _CSS.items():
        text = text.replace(stand_in, css)
    return text[text.index("<svg"):]
