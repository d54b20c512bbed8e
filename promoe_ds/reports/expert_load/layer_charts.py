"""The charts of one layer of a run."""

from __future__ import annotations

import numpy as np

from promoe_ds.load_stats import divide, relative, shares
from promoe_ds.reports.charts import Chart, bar_chart, line_chart
from promoe_ds.reports.expert_load.charts import RELATIVE, bins_of, experts_of
from promoe_ds.reports.expert_load.run import RunView
from promoe_ds.reports.maps import heat_chart, map_over_time, tile_chart
from promoe_ds.reports.theme import linear_color

#: Lines of more experts than these look alike: they are drawn as rows.
_MOST_LINES = 24


def layer_charts(view: RunView, layer: int) -> list[Chart]:
    """Return the charts of one layer; none if the run does not have it."""
    if layer not in view.log.layers:
        return []
    row = view.log.layers.index(layer)
    charts = [
        _over_training(view, row),
        _by_bin(view, row),
        _by_class(view, row),
        _by_patch(view, row),
        _gates(view, row),
        _similarity(view, row),
        _centroids(view, row),
    ]
    return [chart for chart in charts if chart is not None]


def _over_training(view: RunView, row: int) -> Chart:
    values, names, title = (
        relative(view.tokens_PLE[:, row]),
        experts_of(view),
        f"{_layer(view, row)}: experts over training",
    )
    if len(names) > _MOST_LINES:
        return map_over_time(
            title,
            values.T,
            names,
            view.steps_P.tolist(),
            note=f"Tokens over an even share. {RELATIVE}",
        )
    return line_chart(
        title,
        ("step", view.steps_P.tolist()),
        dict(zip(names, values.T, strict=True)),
        even=1.0,
        note="Tokens over an even share (dashed).",
    )


def _by_bin(view: RunView, row: int) -> Chart | None:
    if view.log.bins == 1:
        return None
    return heat_chart(
        f"{_layer(view, row)}: load by noise level",
        relative(view.tokens_LQE[row]).T,
        experts_of(view),
        bins_of(view),
        names=("expert", "sigma from"),
        form=".1f",
        note="Tokens over an even share of that noise level; sigma goes from data to noise.",
    )


def _by_class(view: RunView, row: int) -> Chart | None:
    counts = view.log.table("tokens_per_class", view.log.layers[row], view.window)
    if counts is None:
        return None
    names = [*map(str, range(len(counts) - 1)), "null"]
    shown = len(counts) if counts[-1].any() else len(counts) - 1
    return heat_chart(
        f"{_layer(view, row)}: load by class",
        relative(counts[:shown]),
        names[:shown],
        experts_of(view),
        names=("class", "expert"),
        form=".1f",
        note=f"Tokens of a class over an even share. {RELATIVE}",
    )


def _by_patch(view: RunView, row: int) -> Chart | None:
    counts = view.log.table("tokens_per_position", view.log.layers[row], view.window)
    if counts is None:
        return None
    side, part = round(len(counts) ** 0.5), shares(counts)
    tiles = {
        name: part[:, expert].reshape(side, side) for expert, name in enumerate(experts_of(view))
    }
    return tile_chart(
        f"{_layer(view, row)}: load by patch",
        tiles,
        note="The image's patches in their places: how much of a patch's tokens an expert gets.",
    )


def _gates(view: RunView, row: int) -> Chart | None:
    sums = view.log.gates_TLE[view.window, row].sum(axis=0)
    if np.isnan(sums).all():
        return None
    bars = [
        (name, float(x), "no tokens" if np.isnan(x) else f"{x:+.3f}")
        for name, x in zip(experts_of(view), divide(sums, view.tokens_LE[row]), strict=True)
    ]
    return bar_chart(
        f"{_layer(view, row)}: mean gate",
        bars,
        by_name=True,
        note="The weight with which each expert's output enters, mean of its tokens.",
    )


def _similarity(view: RunView, row: int) -> Chart | None:
    if np.isnan(view.log.matrix_LEE[row]).all():
        return None
    return heat_chart(
        f"{_layer(view, row)}: similarity of prototypes",
        view.log.matrix_LEE[row],
        experts_of(view),
        experts_of(view),
        names=("expert", "and"),
        color=linear_color(-1, 1),
        note="Newest cosines in the log: orange is alike, blue opposed.",
    )


def _centroids(view: RunView, row: int) -> Chart | None:
    if np.isnan(view.log.to_centroid_TLE[view.window, row]).all():
        return None
    own, others = (
        view.newest(values)[row] for values in (view.log.to_centroid_TLE, view.log.to_others_TLE)
    )
    bars = [
        (name, float(x), "no tokens" if np.isnan(x) else f"{x:+.2f} (others {y:+.2f})")
        for name, x, y in zip(experts_of(view), own, others, strict=True)
    ]
    return bar_chart(
        f"{_layer(view, row)}: prototypes and tokens",
        bars,
        by_name=True,
        columns={"with others": others.tolist()},
        note=(
            "Cosine of each prototype with the centroid of its own tokens, and the mean with the"
            " other experts'."
        ),
    )


def _layer(view: RunView, row: int) -> str:
    return f"Layer {view.log.layers[row]}"
