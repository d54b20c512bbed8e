"""The charts of a run's report that show all layers. Formulas in docs/routing_stats.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from promoe_ds.load_stats import divide, entropy, max_over_mean, relative, variation
from promoe_ds.reports.charts import Chart, bar_chart, finite, line_chart
from promoe_ds.reports.expert_load.run import RunView
from promoe_ds.reports.log import EXCHANGES
from promoe_ds.reports.maps import heat_chart, map_over_time
from promoe_ds.reports.theme import short

RELATIVE = "1 is an even share; blue has less, orange more."
#: What each exchange is called in a chart.
_EXCHANGE_NAMES = dict(
    zip(
        EXCHANGES,
        ("counts", "rows out", "results back", "their gradients", "rows' gradients"),
        strict=True,
    )
)


def overview_charts(view: RunView, peers: Sequence[RunView]) -> dict[str, list[Chart | None]]:
    """Return the charts of every section; None for what the run did not log.

    Args:
        peers: the runs shown side by side, whose curves have one scale.
    """
    evenness = [
        _per_layer(
            "Largest over mean load",
            f"1 is even (dashed), {view.log.experts} is all on one expert.",
            lambda each: max_over_mean(each.tokens_PLE),
            view,
            peers,
            [1.0],
            even=1.0,
        ),
        _per_layer(
            "Coefficient of variation",
            "Standard deviation of the loads over their mean: 0 is even.",
            lambda each: variation(each.tokens_PLE),
            view,
            peers,
            [0.0],
        ),
        _per_layer(
            "Entropy of the load",
            "Over log E: 1 is even (dashed), 0 is all on one expert.",
            lambda each: entropy(each.tokens_PLE),
            view,
            peers,
            [0.5, 1.0],
            even=1.0,
        ),
    ]
    return {
        "Load": [load_now(view), load_over_time(view), bins_now(view), unconditional(view)],
        "Evenness over training": evenness,
        "Gates and prototypes": _gates_and_prototypes(view, peers),
        "Ranks, exchange, placement": [
            rank_load(view),
            placements(view),
            waiting(view),
            traffic(view),
        ],
    }


def _gates_and_prototypes(view: RunView, peers: Sequence[RunView]) -> list[Chart | None]:
    gates = _per_layer(
        "Mean gate",
        "Of all assignments: the weight with which an expert's output enters. Near 0 the routed "
        "experts hardly count.",
        lambda each: each.mean_over_time(each.log.gate_mean_TL),
        view,
        peers,
    )
    similarity = _per_layer(
        "Similarity of prototypes",
        "Mean cosine between different prototypes of a layer: low is well apart.",
        lambda each: each.mean_over_time(each.log.similarity_TL),
        view,
        peers,
    )
    if np.isnan(view.log.to_centroid_TLE).all():
        return [gates, similarity, None]
    return [
        gates,
        similarity,
        _per_layer(
            "Prototype to its own tokens",
            "Mean cosine with the centroid of the tokens that an expert got: what the contrastive "
            "loss raises.",
            _to_centroid,
            view,
            peers,
        ),
    ]


def _per_layer(
    title: str,
    note: str,
    values: Callable[[RunView], np.ndarray],
    view: RunView,
    peers: Sequence[RunView],
    also: Sequence[float] = (),
    **options: Any,
) -> Chart:
    """Draw a curve a layer.

    Args:
        also: values that the axis has room for.
    """
    series = {f"layer {layer}": values(view)[:, row] for row, layer in enumerate(view.log.layers)}
    domain = finite([values(each) for each in peers] + [np.array([x]) for x in also])
    return line_chart(
        title,
        ("step", view.steps_P.tolist()),
        series,
        note=note,
        domain=domain or None,
        is_ordered=True,
        **options,
    )


def _to_centroid(view: RunView) -> np.ndarray:
    values = view.mean_over_time(view.log.to_centroid_TLE)
    return divide(np.nansum(values, axis=2), (~np.isnan(values)).sum(axis=2))


def load_now(view: RunView) -> Chart:
    """Layer by expert, in the window."""
    return heat_chart(
        f"Load of each expert, last {view.window_steps:,} steps",
        relative(view.tokens_LE),
        _layers(view),
        experts_of(view),
        names=("layer", "expert"),
        note=f"Tokens over an even share. {RELATIVE}",
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
            f"A row an expert, e0 on top of each layer. {RELATIVE} A row that turns deep blue has"
            " died."
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
    return line_chart(
        "Unconditional tokens",
        ("step", view.steps_P.tolist()),
        {"share": divide(null, routed + null)},
        domain=finite([np.array([0.0, 0.2]), divide(null, routed + null)]),
        percent=True,
        note=(
            "Share of all tokens that are of samples under the null label, which go to the"
            " unconditional expert: near diffusion.label_dropout; 0 if null samples are routed."
        ),
    )


def rank_load(view: RunView) -> Chart | None:
    """Load of each rank of a group by layer, in the window."""
    log = view.log
    if log.ep_size == 1:
        return None
    placed = (
        np.take_along_axis(view.tokens_LE, log.order_LE, axis=1)
        .reshape(len(log.layers), log.ep_size, -1)
        .sum(axis=2)
    )
    measured = view.measured_uneven
    tail = (
        ""
        if np.isnan(measured).all()
        else f" Pass by pass the fullest rank has {np.nanmean(measured):.2f} times the mean."
    )
    return heat_chart(
        "Load of each rank",
        relative(placed),
        _layers(view),
        [f"r{rank}" for rank in range(log.ep_size)],
        names=("layer", "rank"),
        note=f"Rows that a rank's experts compute, over an even share.{tail}",
    )


def placements(view: RunView) -> Chart | None:
    """What other numbers of ranks and placements would give."""
    if not view.tokens_LE.any():
        return None
    others, measured = view.candidates[1:], view.measured_uneven
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
    passes = "" if np.isnan(measured).all() else f": {np.nanmean(measured):.2f} at present"
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
            f" size. Single passes are less even{passes}."
        ),
    )


def traffic(view: RunView) -> Chart | None:
    """Bytes exchanged a step, by layer."""
    if not view.log.bytes_TL[view.window].any() or not view.window_steps:
        return None
    per_step = view.log.bytes_TL[view.window].sum(axis=0) / view.window_steps
    bars = [
        (f"layer {layer}", float(x), f"{short(x)}B")
        for layer, x in zip(view.log.layers, per_step, strict=True)
    ]
    return bar_chart(
        "Exchanged a step",
        bars,
        note=(
            "Token rows between ranks, forward and backward, all ranks: "
            f"{short(per_step.sum())}B a step over all layers."
        ),
    )


def waiting(view: RunView) -> Chart | None:
    """Milliseconds that a rank waits for each exchange, a step."""
    values = view.log.wait_TLX[view.window]
    if view.log.ep_size == 1 or np.isnan(values).all() or not view.window_steps:
        return None
    per_step = 1e3 * np.nansum(values, axis=(0, 1)) / view.window_steps
    measured = ~np.isnan(values).all(axis=(0, 1))
    bars = [
        (_EXCHANGE_NAMES[name], float(x), f"{x:.2f} ms")
        for name, x, known in zip(EXCHANGES, per_step, measured, strict=True)
        if known
    ]
    step = (
        1e3 * view.config.train.global_batch_size / view.images_per_second
        if view.config and view.images_per_second
        else 0
    )
    share = f" Together {per_step.sum():.1f} ms of a step of {step:.0f} ms." if step else ""
    return bar_chart(
        "Waiting for exchanges",
        bars,
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
