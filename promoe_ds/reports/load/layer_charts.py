"""The charts of one layer of a run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from promoe_ds.load_stats import divide, relative, shares
from promoe_ds.reports.charts import Chart, bar_chart, line_chart
from promoe_ds.reports.load.charts import RELATIVE, bins_of, experts_of
from promoe_ds.reports.load.run import RunView
from promoe_ds.reports.maps import heat_chart, map_over_time, tile_chart
from promoe_ds.reports.theme import linear_color

#: Lines of more experts than these look alike: they are drawn as rows.
_MOST_LINES = 24


def layer_charts(view: RunView, layer: int) -> list[Chart]:
    """Return the charts of one layer; none if the run does not have it."""
    if layer not in view.log.layers:
        return []
    row = view.log.layers.index(layer)
    return [*_loads(view, row), *_tables(view, row), *_prototypes(view, row)]


def _loads(view: RunView, row: int) -> Iterator[Chart]:
    """Draw loads over training and by noise level."""
    values, names, steps = (
        relative(view.tokens_PLE[:, row]),
        experts_of(view),
        view.steps_P.tolist(),
    )
    title = f"Layer {view.log.layers[row]}: experts over training"
    if len(names) > _MOST_LINES:
        note = f"Tokens over an even share. {RELATIVE}"
        yield map_over_time(title, values.T, names, steps, note=note)
    else:
        yield line_chart(
            title,
            ("step", steps),
            dict(zip(names, values.T, strict=True)),
            even=1.0,
            note="Tokens over an even share (dashed).",
        )
    if view.log.bins > 1:
        yield heat_chart(
            f"Layer {view.log.layers[row]}: load by noise level",
            relative(view.tokens_LQE[row]).T,
            names,
            bins_of(view),
            names=("expert", "sigma from"),
            form=".1f",
            note="Tokens over an even share of that noise level; sigma goes from data to noise.",
        )


def _tables(view: RunView, row: int) -> Iterator[Chart]:
    """Draw loads by class and by patch."""
    layer, names = view.log.layers[row], experts_of(view)
    counts = view.log.table("tokens_per_class", layer, view.window)
    if counts is not None:
        classes = [*map(str, range(len(counts) - 1)), "null"]
        shown = len(counts) if counts[-1].any() else len(counts) - 1
        yield heat_chart(
            f"Layer {layer}: load by class",
            relative(counts[:shown]),
            classes[:shown],
            names,
            names=("class", "expert"),
            form=".1f",
            note=f"Tokens of a class over an even share. {RELATIVE}",
        )
    counts = view.log.table("tokens_per_position", layer, view.window)
    if counts is not None:
        part_PE = shares(counts)
        columns = view.log.patch_columns or round(len(counts) ** 0.5)
        yield tile_chart(
            f"Layer {layer}: load by patch",
            {name: part_PE[:, e].reshape(-1, columns) for e, name in enumerate(names)},
            note=(
                "The image's patches in their places: how much of a patch's tokens an expert gets."
            ),
        )


def _prototypes(view: RunView, row: int) -> Iterator[Chart]:
    """Draw gates, and the prototypes' cosines."""
    log, layer, names = view.log, view.log.layers[row], experts_of(view)
    sums = log.gates_TLE[view.window, row].sum(axis=0)
    if not np.isnan(sums).all():
        gates = divide(sums, view.tokens_LE[row]).tolist()
        yield bar_chart(
            f"Layer {layer}: mean gate",
            [(name, x, _or_none(x, f"{x:+.3f}")) for name, x in zip(names, gates, strict=True)],
            by_name=True,
            note="The weight with which each expert's output enters, mean of its tokens.",
        )
    if not np.isnan(log.matrix_LEE[row]).all():
        yield heat_chart(
            f"Layer {layer}: similarity of prototypes",
            log.matrix_LEE[row],
            names,
            names,
            names=("expert", "and"),
            color=linear_color(-1, 1),
            note="Newest cosines in the log: orange is alike, blue opposed.",
        )
    if not np.isnan(log.to_centroid_TLE[view.window, row]).all():
        own, others = (
            view.newest(values)[row].tolist() for values in (log.to_centroid_TLE, log.to_others_TLE)
        )
        yield bar_chart(
            f"Layer {layer}: prototypes and tokens",
            [
                (name, x, _or_none(x, f"{x:+.2f} (others {y:+.2f})"))
                for name, x, y in zip(names, own, others, strict=True)
            ],
            by_name=True,
            columns={"with others": others},
            note=(
                "Cosine of each prototype with the centroid of its own tokens, and the mean with"
                " the other experts'."
            ),
        )


def _or_none(value: float, words: str) -> str:
    return "no tokens" if np.isnan(value) else words
