"""The charts of a run's report that show all layers. Formulas are in
docs/reference/routing_stats.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.filesize import decimal

from promoe_ds.load_stats import divide, entropy, known_mean, max_over_mean, relative, variation
from promoe_ds.reports.charts import Chart, bar_chart, finite, line_chart
from promoe_ds.reports.load.run import RunView
from promoe_ds.reports.maps import heat_chart, map_over_time

RELATIVE = "1 is an even share; blue has less, orange more."
#: What each exchange is called in a chart, in the order of the log.
_EXCHANGE_NAMES = ("counts", "rows out", "results back", "their gradients", "rows' gradients")


#: Of each curve, what to know, where a dashed line is, and values that the axis has room for.
_CURVES: dict[str, tuple[Any, ...]] = {
    "Largest over mean load": (
        "1 is even (dashed), {experts} is all on one expert.",
        1.0,
        1.0,
    ),
    "Coefficient of variation": (
        "Standard deviation of the loads over their mean: 0 is even.",
        None,
        0.0,
    ),
    "Entropy of the load": (
        "Over log E: 1 is even (dashed), 0 is all on one expert.",
        1.0,
        0.5,
        1.0,
    ),
    "Mean gate": (
        "Of all assignments: the weight with which an expert's output enters. Near 0 the routed "
        "experts hardly count.",
        None,
    ),
    "Similarity of prototypes": (
        "Mean cosine between different prototypes of a layer: low is well apart.",
        None,
    ),
    "Prototype to its own tokens": (
        "Mean cosine with the centroid of the tokens that an expert got: what the contrastive "
        "loss raises.",
        None,
    ),
}


def overview_charts(view: RunView, peers: Sequence[RunView]) -> dict[str, list[Chart | None]]:
    """Return the charts of every section; None for what the run did not log.

    Args:
        peers: the runs shown side by side, whose curves have one scale.
    """
    per_layer = partial(_per_layer, view, peers)
    has_centroids = not np.isnan(view.log.to_centroid_TLE).all()
    return {
        "Load": [load_now(view), load_over_time(view), bins_now(view), unconditional(view)],
        "Evenness over training": [
            per_layer("Largest over mean load", lambda run: max_over_mean(run.tokens_PLE)),
            per_layer("Coefficient of variation", lambda run: variation(run.tokens_PLE)),
            per_layer("Entropy of the load", lambda run: entropy(run.tokens_PLE)),
        ],
        "Gates and prototypes": [
            per_layer("Mean gate", lambda run: run.mean_over_time(run.log.gate_mean_TL)),
            per_layer(
                "Similarity of prototypes", lambda run: run.mean_over_time(run.log.similarity_TL)
            ),
            per_layer(
                "Prototype to its own tokens",
                lambda run: known_mean(run.mean_over_time(run.log.to_centroid_TLE), axis=2),
            )
            if has_centroids
            else None,
        ],
        "Ranks, exchange, placement": [
            rank_load(view),
            placements(view),
            waiting(view),
            traffic(view),
        ],
    }


def _per_layer(
    view: RunView, peers: Sequence[RunView], title: str, values: Callable[[RunView], np.ndarray]
) -> Chart:
    """Draw a curve a layer."""
    note, even, *also = _CURVES[title]
    columns = zip(view.log.layers, values(view).T, strict=True)
    return line_chart(
        title,
        ("step", view.steps_P.tolist()),
        {f"layer {layer}": values_P for layer, values_P in columns},
        note=note.format(experts=view.log.experts),
        even=even,
        domain=finite([*map(values, peers), np.array([np.nan, *also])]),
        is_ordered=True,
    )


def load_now(view: RunView) -> Chart:
    """Layer by expert, in the window."""
    return heat_chart(
        "Load of each expert",
        relative(view.tokens_LE),
        _layers(view),
        experts_of(view),
        names=("layer", "expert"),
        note=f"Tokens over an even share, last {view.window_steps:,} steps. {RELATIVE}",
    )


def load_over_time(view: RunView) -> Chart:
    """All experts of all layers over training."""
    values = relative(view.tokens_PLE)
    names = [f"layer {layer} {expert}" for layer in view.log.layers for expert in experts_of(view)]
    return map_over_time(
        "Load over training",
        values.reshape(len(values), -1).T,
        names,
        view.steps_P.tolist(),
        note=(
            f"A row an expert, e0 on top of each layer. {RELATIVE} The deepest blue is"
            " a third of an even share, or less: the findings name experts that starve."
        ),
    )


def bins_now(view: RunView) -> Chart | None:
    """Largest over mean load by layer and noise level, in the window."""
    if view.log.bins == 1:
        return None
    return heat_chart(
        "Largest over mean load by noise level",
        max_over_mean(view.tokens_LQE),
        _layers(view),
        bins_of(view),
        names=("layer", "sigma from"),
        note=(
            "Sigma goes from data (0) to noise (1). Orange: one expert has much of that noise"
            " level."
        ),
    )


def unconditional(view: RunView) -> Chart:
    """Share of unconditional tokens over training."""
    routed, null = (
        view.over_time(values[:, 0]) for values in (view.log.routed_TL, view.log.null_TL)
    )
    share = divide(null, routed + null)
    return line_chart(
        "Unconditional tokens",
        ("step", view.steps_P.tolist()),
        {"share": share},
        domain=finite([np.array([0.0, 0.2]), share]),
        percent=True,
        note=(
            "Share of all tokens that are of samples under the null label, which go to the"
            " unconditional expert: near diffusion.label_dropout; 0 if null samples are routed."
        ),
    )


def rank_load(view: RunView) -> Chart | None:
    """Load of each rank of a group by layer, in the window."""
    log, size = view.log, view.log.ep_size
    if size == 1:
        return None
    placed_LE = np.take_along_axis(view.tokens_LE, log.order_LE, axis=1)
    measured = _measured(view, " Pass by pass the fullest rank has {:.2f} times the mean.")
    return heat_chart(
        "Load of each rank",
        relative(placed_LE.reshape(len(log.layers), size, -1).sum(axis=2)),
        _layers(view),
        [f"r{rank}" for rank in range(size)],
        names=("layer", "rank"),
        note=f"Rows that a rank's experts compute, over an even share.{measured}",
    )


def _measured(view: RunView, words: str) -> str:
    """Return the measured unevenness in words, nothing if it was not logged."""
    values_L = view.measured_uneven
    return "" if np.isnan(values_L).all() else words.format(np.nanmean(values_L))


def placements(view: RunView) -> Chart | None:
    """What other numbers of ranks and placements would give."""
    if not view.tokens_LE.any() or not (others := view.candidates[1:]):
        return None
    lost = [view.time_lost(each.uneven_L) for each in others]
    means = [float(np.nanmean(each.uneven_L)) for each in others]
    bars = [
        (
            f"{each.ep_size} × {each.name.removesuffix(' order')}",
            mean,
            f"{mean:.2f}" + ("" if x is None else f", {x:.1%}"),
        )
        for each, mean, x in zip(others, means, lost, strict=True)
    ]
    present = float(np.nanmean(view.present.uneven_L))
    return bar_chart(
        "Other placements",
        bars,
        mark=(present, f"present {present:.2f}"),
        columns={
            "ep_size": [each.ep_size for each in others],
            "worst layer": [float(np.nanmax(each.uneven_L)) for each in others],
            "time lost": [np.nan if x is None else x for x in lost],
        },
        note=(
            "Fullest rank over the mean, average of layers, by parallel.ep_size, summed interval"
            " by interval from the log; and the share of a step lost, an estimate for this batch"
            f" size. Single passes are less even{_measured(view, ': {:.2f} at present')}."
        ),
    )


def traffic(view: RunView) -> Chart | None:
    """Bytes exchanged a step, by layer."""
    bytes_L = view.log.bytes_TL[view.window].sum(axis=0)
    if not bytes_L.any() or not view.window_steps:
        return None
    per_step = (bytes_L / view.window_steps).tolist()
    return bar_chart(
        "Exchanged a step",
        [
            (f"layer {layer}", x, decimal(round(x)))
            for layer, x in zip(view.log.layers, per_step, strict=True)
        ],
        note=(
            "Token rows between ranks, forward and backward, all ranks: "
            f"{decimal(round(sum(per_step)))} a step over all layers."
        ),
    )


def waiting(view: RunView) -> Chart | None:
    """Milliseconds that a rank waits for each exchange, a step."""
    values = view.log.wait_TLX[view.window]
    if view.log.ep_size == 1 or np.isnan(values).all() or not view.window_steps:
        return None
    per_step = 1e3 * np.nansum(values, axis=(0, 1)) / view.window_steps
    measured = ~np.isnan(values).all(axis=(0, 1))
    share = ""
    if view.config and view.images_per_second:
        step = 1e3 * view.config.train.global_batch_size / view.images_per_second
        share = f" Together {per_step.sum():.1f} ms of a step of {step:.0f} ms."
    return bar_chart(
        "Waiting for exchanges",
        [
            (name, float(x), f"{x:.2f} ms")
            for name, x, known in zip(_EXCHANGE_NAMES, per_step, measured, strict=True)
            if known
        ],
        style="over",
        note=(
            "Milliseconds a step for which a rank's computation waited, mean of ranks; what"
            " overlaps with computation takes none. Waiting for a slower rank counts, mostly in"
            f" “counts”.{share}"
        ),
    )


def _layers(view: RunView) -> list[str]:
    return [str(layer) for layer in view.log.layers]


def experts_of(view: RunView) -> list[str]:
    """Return the experts' names."""
    return [f"e{expert}" for expert in range(view.log.experts)]


def bins_of(view: RunView) -> list[str]:
    """Return where each noise level's bin begins."""
    return [f"{bin_ / view.log.bins:.2g}" for bin_ in range(view.log.bins)]
