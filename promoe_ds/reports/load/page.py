"""The page of one run, or of two side by side; its charts and numbers as files and in notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from promoe_ds.load_stats import entropy, max_over_mean, shares, variation
from promoe_ds.reports.charts import Chart
from promoe_ds.reports.load.charts import overview_charts
from promoe_ds.reports.load.findings import (
    MUCH_TIME_LOST,
    TAGS,
    TIME_LOST,
    UNEVEN,
    VERY_UNEVEN,
    Finding,
    find,
)
from promoe_ds.reports.load.layer_charts import layer_charts
from promoe_ds.reports.load.run import RunView
from promoe_ds.reports.page import Page, Part, figures, part, render, write_charts, write_page
from promoe_ds.reports.theme import number

#: Layers whose charts are open at first.
_OPEN_LAYERS = 3
#: Of a count in a table of the log, about.
_BYTES_A_COUNT = 5


@dataclass(frozen=True)
class ExpertLoad:
    """How one run uses its experts; made by `promoe_ds.reports.expert_load`."""

    view: RunView

    def findings(self) -> list[Finding]:
        """Return what is to be said of the run, the worst first: `level`, `title`, `text` each."""
        return find(self.view)

    def layers(self) -> dict[str, list[object]]:
        """Return the numbers of every MoE layer as columns: `pandas.DataFrame(columns)` takes
        them.
        """
        head, *rows = layer_rows(self.view)
        columns = zip(*rows, strict=True)
        return {str(name): list(cells) for name, cells in zip(head, columns, strict=True)}

    def figures(self) -> dict[str, Chart]:
        """Return the figures by title; a notebook shows one as a picture, with vl-convert."""
        return {chart.title: chart for chart in all_charts(self.view, [self.view])}

    def to_html(self) -> str:
        """Return the page: one document, which opens offline.

        Raises: ConfigError without vl-convert.
        """
        return render(build_page([self.view]))


def write_report(path: Path, views: Sequence[RunView]) -> int:
    """Write the page; return its bytes.

    Raises: DataError if it cannot be written; ConfigError without vl-convert.
    """
    return write_page(path, build_page(views))


def build_page(views: Sequence[RunView]) -> Page:
    """Return the page of one run, or of several side by side."""
    labels, is_several = [view.name for view in views], len(views) > 1
    summaries: list[Part] = []
    numbers: list[Part] = []
    for view in views:
        found = [(each.level, TAGS[each.level], each.title, each.text) for each in find(view)]
        summaries += part("heading", text=view.name if is_several else "Summary")
        summaries += part("cards", items=_cards(view))
        summaries += part("findings", items=found)
        rows = [[f"{x:,}" if isinstance(x, int) else x for x in row] for row in layer_rows(view)]
        numbers += part("text", text=view.name if is_several else "") + part("table", rows=rows)
    sections = [overview_charts(view, views) for view in views]
    figures_of = {
        name: figures(list(zip(*(each[name] for each in sections), strict=True)), labels)
        for name in sections[0]
    }
    words = (
        "Formulas and fields: docs/reference/routing_stats.md. What to do about each finding:"
        " docs/guides/profiling.md."
    )
    return Page(
        "Expert load",
        " and ".join(labels),
        facts=[_facts(view, is_several) for view in views],
        notes=[
            f"{view.name}: {note}" if is_several else note for view in views for note in view.notes
        ],
        parts=[
            *summaries,
            *(
                each
                for name, items in figures_of.items()
                if items
                for each in part("heading", text=name) + part("figures", items=items)
            ),
            *part("heading", text="Layer by layer"),
            *(each for view in views for each in part("text", text=_unlogged(view, is_several))),
            *_layers(views, labels),
            *part("heading", text="Numbers"),
            *numbers,
            *part("text", text=words),
        ],
    )


def export(folder: Path, views: Sequence[RunView]) -> int:
    """Write every chart as PNG and its numbers as CSV; return how many charts.

    Raises: DataError if the folder cannot be written; ConfigError without vl-convert.
    """
    count = 0
    for view in views:
        target = folder if len(views) == 1 else folder / view.name
        count += write_charts(target, all_charts(view, views), {"layers": layer_rows(view)})
    return count


def all_charts(view: RunView, peers: Sequence[RunView]) -> list[Chart]:
    """Return the charts of a run, then those of its layers; peers: as of `overview_charts`."""
    sections = overview_charts(view, peers).values()
    charts = [chart for section in sections for chart in section if chart is not None]
    return charts + [chart for layer in view.log.layers for chart in layer_charts(view, layer)]


def layer_rows(view: RunView) -> list[list[object]]:
    """Return the numbers of every layer in the window, under a heading."""
    log, window, tokens_LE = view.log, view.window, view.tokens_LE
    columns = {
        **{f"e{expert} share": column for expert, column in enumerate(shares(tokens_LE).T)},
        "max/mean": max_over_mean(tokens_LE),
        "CV": variation(tokens_LE),
        "entropy": entropy(tokens_LE),
        "dead": view.starved_L(is_dead=True),
        "starved": view.starved_L(is_dead=False),
        "conditional tokens": log.routed_TL[window].sum(axis=0),
        "unconditional tokens": log.null_TL[window].sum(axis=0),
        "mean gate": view.mean_over_time(log.gate_mean_TL)[-1],
        "prototype cosine": view.newest(log.similarity_TL),
        "bytes exchanged": log.bytes_TL[window].sum(axis=0),
        "fullest rank / mean": view.present_uneven,
    }
    rows = zip(log.layers, *columns.values(), strict=True)
    return [
        ["layer", *columns],
        *(
            [
                number(float(f"{cell:.4g}")) if isinstance(cell, np.floating) else int(cell)
                for cell in row
            ]
            for row in rows
        ),
    ]


def _facts(view: RunView, is_named: bool) -> str:
    log, config = view.log, view.config
    words = (
        []
        if config is None
        else [config.name, f"{config.routing.method}, top {config.routing.top_k}"]
    )
    words += [
        f"{int(log.steps_T[-1]):,} steps",
        f"{len(log.layers)} layers × {log.experts} experts",
        f"{log.ranks} rank{'s' if log.ranks > 1 else ''}, ep_size {log.ep_size}",
        f"“now” is the last {view.window_steps:,} steps",
    ]
    return (f"{view.name}: " if is_named else "") + " · ".join(words)


def _cards(view: RunView) -> list[tuple[str, str, str, str]]:
    log, uneven_L = view.log, max_over_mean(view.tokens_LE)
    if np.isnan(uneven_L).all():
        return [("Tokens routed", "0", "none in the window", "bad")]
    worst, average = int(np.nanargmax(uneven_L)), np.nanmean(uneven_L)
    dead, starved = (sum(view.starved_L(is_dead=is_dead)) for is_dead in (True, False))
    tokens = int(log.routed_TL[view.window].sum() + log.null_TL[view.window].sum())
    null = log.null_TL[view.window].sum() / max(1, tokens)
    cards = {
        "Most uneven layer": (
            f"{uneven_L[worst]:.2f}×",
            f"of the mean, layer {log.layers[worst]}; average {average:.2f}",
            _level(uneven_L[worst], UNEVEN, VERY_UNEVEN),
        ),
        "Entropy": (
            f"{np.nanmean(entropy(view.tokens_LE)):.3f}",
            "mean of layers, 1 is even",
            "",
        ),
        "Dead experts": (
            str(dead),
            f"of {log.experts * len(log.layers)}; {starved} starved",
            "bad" if dead else "warn" if starved else "good",
        ),
    }
    lost = view.time_lost(view.present_uneven)
    if log.ep_size == 1:
        cards["Lost to imbalance"] = ("none", "every rank has all experts", "good")
    elif lost is not None:
        level = _level(lost, TIME_LOST, MUCH_TIME_LOST)
        cards["Lost to imbalance"] = (f"{lost:.1%}", "of a step's time, estimated", level)
    if view.window_steps and log.bytes_TL.any():
        megabytes = log.bytes_TL[view.window].sum() / view.window_steps / 1e6
        cards["Exchanged a step"] = (f"{megabytes:,.2f} MB", "all layers and ranks, both ways", "")
    cards["Unconditional"] = (f"{null:.1%}", f"of {tokens / 1e6:,.1f} M tokens now", "")
    return [(name, *card) for name, card in cards.items()]


def _level(value: float, warn: float, bad: float) -> str:
    return "bad" if value > bad else "warn" if value > warn else "good"


def _layers(views: Sequence[RunView], labels: Sequence[str]) -> list[Part]:
    """Return a part a layer, the least even ones open."""
    uneven: dict[int, list[float]] = {}
    for view in views:
        for layer, value in zip(view.log.layers, max_over_mean(view.tokens_LE), strict=True):
            uneven.setdefault(layer, []).append(float(value))
    worst = sorted(sorted(uneven), key=lambda layer: -max(np.nan_to_num(uneven[layer])))
    parts: list[Part] = []
    for layer, values in sorted(uneven.items()):
        charts = [{chart.title: chart for chart in layer_charts(view, layer)} for view in views]
        titles = dict.fromkeys(title for each in charts for title in each)
        items = figures([[each.get(title) for each in charts] for title in titles], labels)
        parts += part(
            "details",
            title=f"Layer {layer}",
            text="largest over mean " + ", ".join(f"{value:.2f}" for value in values),
            is_open=layer in worst[:_OPEN_LAYERS],
            items=part("figures", items=items),
        )
    return parts


def _unlogged(view: RunView, is_named: bool) -> str:
    """Say which tables the run does not log, how to get them and what they take."""
    model, words = view.config and view.config.model, []
    for name, what, setting, rows in (
        ("tokens_per_class", "class", "class_counts", view.config and view.config.num_groups),
        ("tokens_per_position", "patch", "position_counts", model and model.tokens_per_image),
    ):
        if name not in view.log.tables:
            size = (rows or 0) * view.log.experts * _BYTES_A_COUNT / 1e3
            about = f", about {size:.2g} kB a layer and table" if rows else ""
            words.append(f"load by {what} (logging.{setting}=true{about})")
    head = f"{view.name}: not" if is_named else "Not"
    if not words:
        return ""
    return (
        f"{head} logged: {' and '.join(words)}. Large tables must be asked for;"
        " logging.counts_every sets how many log intervals share one."
    )
