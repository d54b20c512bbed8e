"""The figures of a run's report: of all layers together, and of one layer. Formulas in docs/routing_stats.md."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from promoe_ds.analysis.drawing import Scene
from promoe_ds.analysis.drawing.charts import (
    Axes,
    Cells,
    Rows,
    bar_chart,
    cell_chart,
    image_chart,
    line_chart,
    map_over_time,
    number,
    short,
)
from promoe_ds.analysis.expert_load import stats
from promoe_ds.analysis.expert_load.columns import EXCHANGES
from promoe_ds.analysis.expert_load.view import RunView

Draw = Callable[[RunView], Scene | None]
#: Loads of this many times the mean, or of its inverse, get the full colour.
_FULL_COLOUR = 3.0
_LOAD_ENDS, _COSINE_ENDS = (f"1/{_FULL_COLOUR:g} or less", f"{_FULL_COLOUR:g} or more"), ("-1", "1")
#: Lines of more experts than these cannot be told apart: they are drawn as rows.
_MOST_LINES = 24
_RELATIVE = "1 is an even share; blue has less, orange more."


def relative(tokens: np.ndarray) -> np.ndarray:
    """Return loads over an even share, along the last dimension; NaN without tokens."""
    return stats.shares(tokens) * tokens.shape[-1]


def shade_relative(values: np.ndarray) -> np.ndarray:
    """Return loads over an even share as shades in -1 ... 1, by their logarithm; no tokens at all is -1."""
    logs = np.log(np.maximum(values, 1e-6), out=np.full(values.shape, np.nan), where=~np.isnan(values))
    return np.clip(logs / np.log(_FULL_COLOUR), -1, 1)


def experts_of(view: RunView) -> list[str]:
    """Return the experts' names."""
    return [f"e{expert}" for expert in range(view.log.experts)]


def load_now(view: RunView) -> Scene:
    """Layer by expert, in the window."""
    return cell_chart(f"Load of each expert, last {view.window_steps:,} steps", relative(view.tokens_LE),
                      _cells(_layers(view), experts_of(view), "layer", "expert"), note=f"Tokens over an even share. {_RELATIVE}")


def load_over_time(view: RunView) -> Scene:
    """All experts of all layers over training."""
    values = relative(view.tokens_PLE)
    names = [f"layer {layer} e{expert}" for layer in view.log.layers for expert in range(view.log.experts)]
    rows = Rows(names=names, shade=shade_relative, groups=[(f"layer {layer}", view.log.experts) for layer in view.log.layers],
                ends=_LOAD_ENDS)
    return map_over_time("Load over training", values.reshape(len(values), -1).T, rows, view.steps_P.tolist(),
                         note=f"A row an expert, e0 on top; layers named. {_RELATIVE} A row that turns deep blue has died.")


def _per_layer(title: str, note: str, values: Callable[[RunView], np.ndarray], view: RunView, **options) -> Scene:
    """Draw a curve a layer; runs side by side share the scale."""
    values_PL = values(view)
    series = [(f"layer {layer}", view.steps_P.tolist(), values_PL[:, row].tolist()) for row, layer in enumerate(view.log.layers)]
    ends = [x for peer in view.peers if peer is not view and not np.isnan(shown := values(peer)).all()
            for x in (np.nanmin(shown), np.nanmax(shown))]
    return line_chart(title, series, Axes(also=ends, is_ordered=True, **options), note=note)


def max_over_mean(view: RunView) -> Scene:
    """Largest over mean load of each layer, over training."""
    return _per_layer("Largest over mean load", f"1 is even (dashed), {view.log.experts} is all on one expert.",
                      lambda each: stats.max_over_mean(each.tokens_PLE), view, y_from=1.0, even=1.0)


def variation(view: RunView) -> Scene:
    """Coefficient of variation of each layer, over training."""
    return _per_layer("Coefficient of variation", "Standard deviation of the loads over their mean: 0 is even.",
                      lambda each: stats.variation(each.tokens_PLE), view)


def entropy(view: RunView) -> Scene:
    """Normalised entropy of each layer, over training."""
    return _per_layer("Entropy of the load", "Over log E: 1 is even (dashed), 0 is all on one expert.",
                      lambda each: stats.entropy(each.tokens_PLE), view, y_from=0.5, y_to=1.0, even=1.0)


def bins_now(view: RunView) -> Scene | None:
    """Largest over mean load by layer and noise level, in the window."""
    if view.log.bins == 1:
        return None
    return cell_chart("Largest over mean load by noise level", stats.max_over_mean(view.tokens_LQE),
                      _cells(_layers(view), _bins(view), "layer", "sigma from"),
                      note="Columns: sigma, from data (0) to noise (1). Orange: one expert has much of that noise level.")


def conditional(view: RunView) -> Scene:
    """Routed and unconditional tokens over training."""
    routed, null = (view.over_time(values[:, 0]) for values in (view.log.routed_TL, view.log.null_TL))
    part = np.divide(null, routed + null, out=np.full(len(routed), np.nan), where=routed + null > 0)
    return line_chart("Unconditional tokens", [("share of all tokens", view.steps_P.tolist(), part.tolist())],
                      Axes(percent=True, y_to=max(0.2, float(np.nanmax(part, initial=0)))),
                      note="Tokens of samples under the null label, which go to the unconditional expert: near "
                           "diffusion.label_dropout; 0 where null samples are routed.")


def gates(view: RunView) -> Scene:
    """Mean gate of each layer over training."""
    return _per_layer("Mean gate", "Of all assignments: the weight with which an expert's output enters. Near 0 the routed "
                      "experts hardly count.", lambda each: each.mean_over_time(each.log.gate_mean_TL), view)


def prototypes(view: RunView) -> Scene:
    """Mean prototype similarity of each layer over training."""
    return _per_layer("Similarity of prototypes", "Mean cosine between different prototypes of a layer: low is well apart.",
                      lambda each: each.mean_over_time(each.log.similarity_TL), view)


def centroids(view: RunView) -> Scene | None:
    """How near prototypes are to the centroids of their own tokens, over training."""
    if np.isnan(view.log.to_centroid_TLE).all():
        return None

    def _mean(each: RunView) -> np.ndarray:
        values = each.mean_over_time(each.log.to_centroid_TLE)
        known = ~np.isnan(values)
        return np.divide(np.where(known, values, 0).sum(axis=2), known.sum(axis=2), out=np.full(values.shape[:2], np.nan),
                         where=known.any(axis=2))

    return _per_layer("Prototype to its own tokens", "Mean cosine with the centroid of the tokens that an expert got: what the "
                      "contrastive loss raises.", _mean, view)


def rank_load(view: RunView) -> Scene | None:
    """Load of each rank of a group by layer, in the window."""
    log = view.log
    if log.ep_size == 1:
        return None
    placed = np.take_along_axis(view.tokens_LE, log.order_LE, axis=1).reshape(len(log.layers), log.ep_size, -1).sum(axis=2)
    measured = view.measured_uneven()
    tail = "" if np.isnan(measured).all() else f" Pass by pass the fullest rank has {np.nanmean(measured):.2f} times the mean."
    return cell_chart("Load of each rank", relative(placed),
                      _cells(_layers(view), [f"r{rank}" for rank in range(log.ep_size)], "layer", "rank"),
                      note=f"Rows that a rank's experts compute, over an even share.{tail}")


def placements(view: RunView) -> Scene | None:
    """What other numbers of ranks and placements would give."""
    if not view.tokens_LE.any():
        return None
    bars, rows = [], []
    for each in view.outlooks[1:]:
        lost, mean = view.time_lost(each.uneven_L), float(np.nanmean(each.uneven_L))
        words = f"{mean:.2f}" + ("" if lost is None else f", {lost:.1%} of time")
        bars.append((f"{each.ep_size} × {each.name.removesuffix(' order')}", mean, words,
                     "accent" if each.name == "advised" else "under"))
        rows.append([each.ep_size, each.name, number(mean), number(np.nanmax(each.uneven_L)), "" if lost is None else number(lost)])
    present, measured = float(np.nanmean(view.present.uneven_L)), view.measured_uneven()
    passes = "" if np.isnan(measured).all() else f": {np.nanmean(measured):.2f} at present"
    scene = bar_chart("Other placements", bars, mark=present, mark_name=f"present {present:.2f}",
                      note="Fullest rank over the mean, average of layers, by parallel.ep_size; summed interval by interval from "
                           f"the log. Single passes are less even{passes}. The time is an estimate for this batch size.")
    scene.numbers = [["ep_size", "placement", "max/mean", "worst layer", "time lost"],
                     [view.log.ep_size, "present", number(present), number(np.nanmax(view.present.uneven_L)), ""], *rows]
    return scene


def traffic(view: RunView) -> Scene | None:
    """Bytes exchanged a step, by layer."""
    if not view.log.bytes_TL[view.window].any() or not view.window_steps:
        return None
    per_step = view.log.bytes_TL[view.window].sum(axis=0) / view.window_steps
    bars = [(f"layer {layer}", float(x), f"{short(x)}B", "under") for layer, x in zip(view.log.layers, per_step, strict=True)]
    return bar_chart("Exchanged a step", bars, note=f"Token rows between ranks, forward and backward, all ranks: "
                                                    f"{short(per_step.sum())}B a step over all layers.")


def waiting(view: RunView) -> Scene | None:
    """Seconds that a rank waits for each exchange, a step."""
    values = view.log.wait_TLX[view.window]
    if view.log.ep_size == 1 or np.isnan(values).all() or not view.window_steps:
        return None
    per_step = 1e3 * np.nansum(values, axis=(0, 1)) / view.window_steps
    words = {"counts": "counts", "dispatch": "rows out", "combine": "results back", "combine_backward": "their gradients",
             "dispatch_backward": "rows' gradients"}
    measured = ~np.isnan(values).all(axis=(0, 1))
    bars = [(words[name], float(x), f"{x:.2f} ms", "over") for name, x, known in zip(EXCHANGES, per_step, measured, strict=True)
            if known]
    config, speed = view.facts.config, view.facts.images_per_second
    share = f" Together {per_step.sum():.1f} ms of a step of {1e3 * config.train.global_batch_size / speed:.0f} ms." \
        if config is not None and speed else ""
    note = ("Milliseconds a step for which a rank's computation stood still, mean of ranks; what hides behind computation takes "
            f"none. Waiting for a slower rank counts, mostly in “counts”.{share}")
    return bar_chart("Waiting for exchanges", bars, note=note)


#: Sections of the page and their figures.
OVERVIEW: tuple[tuple[str, tuple[Draw, ...]], ...] = (
    ("Load", (load_now, load_over_time, bins_now, conditional)),
    ("Evenness over training", (max_over_mean, variation, entropy)),
    ("Gates and prototypes", (gates, prototypes, centroids)),
    ("Ranks, exchange, placement", (rank_load, placements, waiting, traffic)),
)


def layer_figures(view: RunView, layer: int) -> list[Scene]:
    """Return the figures of one layer."""
    row, log = view.log.layers.index(layer), view.log
    parts = [_lines_of(view, row, layer), _bins_of(view, row, layer), _classes_of(view, row, layer), _patches_of(view, row, layer),
             _gates_of(view, row, layer), _matrix_of(view, row, layer)]
    if not np.isnan(log.to_centroid_TLE[view.window, row]).all():
        parts.append(_centroids_of(view, row, layer))
    return [part for part in parts if part is not None]


def _lines_of(view: RunView, row: int, layer: int) -> Scene:
    values, names, title = relative(view.tokens_PLE[:, row]), experts_of(view), f"Layer {layer}: experts over training"
    if len(names) > _MOST_LINES:
        return map_over_time(title, values.T, Rows(names=names, shade=shade_relative, ends=_LOAD_ENDS), view.steps_P.tolist(),
                             note=f"Tokens over an even share. {_RELATIVE}")
    series = [(name, view.steps_P.tolist(), values[:, expert].tolist()) for expert, name in enumerate(names)]
    return line_chart(title, series, Axes(even=1.0), note="Tokens over an even share (dashed).")


def _bins_of(view: RunView, row: int, layer: int) -> Scene | None:
    if view.log.bins == 1:
        return None
    return cell_chart(f"Layer {layer}: load by noise level", relative(view.tokens_LQE[row]).T,
                      _cells(experts_of(view), _bins(view), "expert", "sigma from", "{:.1f}"),
                      note="Tokens over an even share of that noise level; columns: sigma, from data to noise.")


def _classes_of(view: RunView, row: int, layer: int) -> Scene | None:
    counts = view.log.table("tokens_per_class", layer, view.window)
    if counts is None:
        return None
    names = [*map(str, range(len(counts) - 1)), "null"]
    if not counts[-1].any():
        counts, names = counts[:-1], names[:-1]
    return cell_chart(f"Layer {layer}: load by class", relative(counts),
                      _cells(names, experts_of(view), "class", "expert", "{:.1f}"),
                      note=f"Tokens of a class over an even share. {_RELATIVE}")


def _patches_of(view: RunView, row: int, layer: int) -> Scene | None:
    counts = view.log.table("tokens_per_position", layer, view.window)
    if counts is None:
        return None
    side = round(len(counts) ** 0.5)
    part = stats.shares(counts)
    images = [(name, part[:, expert].reshape(side, side)) for expert, name in enumerate(experts_of(view))]
    return image_chart(f"Layer {layer}: load by patch", images, note="The image's patches as they lie: how much of a patch's "
                       "tokens an expert gets, from none (clear) to all (full colour).")


def _gates_of(view: RunView, row: int, layer: int) -> Scene | None:
    sums, tokens = view.log.gates_TLE[view.window, row].sum(axis=0), view.tokens_LE[row]
    if np.isnan(sums).all():
        return None
    means = np.divide(sums, tokens, out=np.full(len(tokens), np.nan), where=tokens > 0)
    bars = [(name, float(x), "no tokens" if np.isnan(x) else f"{x:+.3f}", expert)
            for expert, (name, x) in enumerate(zip(experts_of(view), means, strict=True))]
    return bar_chart(f"Layer {layer}: mean gate", bars, label_width=40.0,
                     note="The weight with which each expert's output enters, mean of its tokens.")


def _matrix_of(view: RunView, row: int, layer: int) -> Scene | None:
    if np.isnan(view.log.matrix_LEE[row]).all():
        return None
    names = experts_of(view)
    return cell_chart(f"Layer {layer}: similarity of prototypes", view.log.matrix_LEE[row],
                      Cells(rows=names, columns=names, show="{:.2f}".format, shade=lambda x: x, column_name="and",
                            ends=_COSINE_ENDS),
                      note="Newest cosines in the log: orange alike, blue opposed, clear at right angles.")


def _centroids_of(view: RunView, row: int, layer: int) -> Scene:
    own, others = (view.newest(values)[row] for values in (view.log.to_centroid_TLE, view.log.to_others_TLE))
    names = experts_of(view)
    bars = [(name, float(x), "no tokens" if np.isnan(x) else f"{x:+.2f} (others {y:+.2f})", expert)
            for expert, (name, x, y) in enumerate(zip(names, own, others, strict=True))]
    scene = bar_chart(f"Layer {layer}: prototypes and tokens", bars, label_width=40.0,
                      note="Cosine of each prototype with the centroid of its own tokens, and the mean with the other experts'.")
    scene.numbers = [["expert", "own tokens", "others' tokens"],
                     *([name, number(x), number(y)] for name, x, y in zip(names, own, others, strict=True))]
    return scene


def _cells(rows: list[str], columns: list[str], row_name: str, column_name: str, form: str = "{:.2f}") -> Cells:
    return Cells(rows=rows, columns=columns, row_name=row_name, column_name=column_name, show=form.format, shade=shade_relative,
                 ends=_LOAD_ENDS)


def _layers(view: RunView) -> list[str]:
    return [str(layer) for layer in view.log.layers]


def _bins(view: RunView) -> list[str]:
    return [f"{bin_ / view.log.bins:.2g}" for bin_ in range(view.log.bins)]
