"""The report of one run, or of two side by side: HTML, and every figure as PNG and CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from promoe_ds.analysis.drawing import Scene
from promoe_ds.analysis.drawing import page as html
from promoe_ds.analysis.drawing.png import write_png
from promoe_ds.analysis.expert_load import findings, stats
from promoe_ds.analysis.expert_load.figures import OVERVIEW, layer_figures
from promoe_ds.analysis.expert_load.view import RunView
from promoe_ds.errors import DataError

#: Layers whose figures are open at first.
_OPEN_LAYERS = 3
#: Of a count in a table of the log, about.
_BYTES_A_COUNT = 5


def render(views: Sequence[RunView]) -> str:
    """Return the page for one run, or for several side by side."""
    title = " and ".join(view.name for view in views)
    parts = [_head(views), *(_summary(view, len(views) > 1) for view in views)]
    labels = [view.name for view in views]
    for section, draws in OVERVIEW:
        groups = [[draw(view) for view in views] for draw in draws]
        if any(scene for group in groups for scene in group):
            parts.append(f'<h2 id="{_slug(section)}">{escape(section)}</h2>' + html.figures(groups, labels))
    parts += ['<h2 id="layers">Layer by layer</h2>', *_layers(views, labels), '<h2 id="numbers">Numbers</h2>',
              *(_table(view, len(views) > 1) for view in views),
              '<p class="muted">Formulas and fields: docs/routing_stats.md. What to do about each pathology: '
              "docs/profiling.md.</p>"]
    return html.page(f"Expert load of {title}", "\n".join(parts))


def write_report(path: Path, views: Sequence[RunView]) -> int:
    """Write the page; return its bytes.

    Raises: DataError if it cannot be written.
    """
    text = render(views)
    try:
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}: name another place with --out") from None
    return path.stat().st_size


def export(folder: Path, views: Sequence[RunView]) -> int:
    """Write every figure as PNG and its numbers as CSV; return how many figures.

    Raises: DataError if the folder cannot be written.
    """
    count = 0
    try:
        for view in views:
            target = folder if len(views) == 1 else folder / view.name.replace("/", "_")
            target.mkdir(parents=True, exist_ok=True)
            scenes = [scene for _, draws in OVERVIEW for draw in draws if (scene := draw(view)) is not None]
            for scene in [*scenes, *(scene for layer in view.log.layers for scene in layer_figures(view, layer))]:
                export_figure(target, scene)
                count += 1
            _write_csv(target / "layers.csv", layer_rows(view))
    except OSError as error:
        raise DataError(f"--export {folder} cannot be written: {error.strerror}") from None
    return count


def export_figure(folder: Path, scene: Scene) -> None:
    """Write a figure as PNG and CSV under a name made of its title."""
    name = _slug(re.sub(r", last [\d,]+ steps", "", scene.title))
    write_png(scene, folder / f"{name}.png")
    _write_csv(folder / f"{name}.csv", scene.numbers)


def layer_rows(view: RunView) -> list[list[object]]:
    """Return the numbers of every layer in the window, under a heading."""
    log, window = view.log, view.window
    rows: list[list[object]] = [["layer", *(f"e{expert} share" for expert in range(log.experts)), "max/mean", "CV", "entropy",
                                 "dead", "starving", "conditional tokens", "unconditional tokens", "mean gate", "prototype cosine",
                                 "bytes exchanged", "fullest rank / mean"]]
    tokens, uneven = view.tokens_LE, view.present_uneven()
    part, scalars = stats.shares(tokens), (stats.max_over_mean(tokens), stats.variation(tokens), stats.entropy(tokens))
    gates, similarity = view.mean_over_time(log.gate_mean_TL)[-1], view.newest(log.similarity_TL)
    for row, layer in enumerate(log.layers):
        lacks = [lack for lack in view.lacks if lack.layer == layer]
        rows.append([layer, *(_round(x) for x in part[row]), *(_round(values[row]) for values in scalars),
                     sum(lack.is_dead for lack in lacks), sum(not lack.is_dead for lack in lacks),
                     int(log.routed_TL[window, row].sum()), int(log.null_TL[window, row].sum()), _round(gates[row]),
                     _round(similarity[row]), int(log.bytes_TL[window, row].sum()), _round(uneven[row])])
    return rows


def _head(views: Sequence[RunView]) -> str:
    links = " ".join(f'<a href="#{_slug(name)}">{escape(name)}</a>'
                     for name in [*(section for section, _ in OVERVIEW), "Layers", "Numbers"])
    names = " <span class=muted>and</span> ".join(escape(view.name) for view in views)
    facts = "".join(_facts(view, len(views) > 1) for view in views)
    return f"<header><p class=muted>Expert load</p><h1>{names}</h1>{facts}<nav>{links}</nav></header>"


def _facts(view: RunView, is_named: bool) -> str:
    log, config = view.log, view.facts.config
    words = [f"{int(log.steps_T[-1]):,} steps", f"{len(log.layers)} layers × {log.experts} experts"]
    if config is not None:
        words = [config.name, f"{config.routing.method}, top {config.routing.top_k}", *words]
    words += [f"{log.ranks} rank{'s' if log.ranks > 1 else ''}, ep_size {log.ep_size}",
              f"“now” is the last {view.window_steps:,} steps"]
    notes = "".join(f"<li>{escape(note)}</li>" for note in view.notes)
    said = f'<ul class="notes">{notes}</ul>' if notes else ""
    return f'<p class="muted facts">{escape(f"{view.name}: " if is_named else "")}{escape(" · ".join(words))}</p>{said}'


def _summary(view: RunView, is_named: bool) -> str:
    name = f"<h2>{escape(view.name)}</h2>" if is_named else ""
    found = "".join(
        f'<li class="{each.level}"><strong><span class="tag {each.level}">{_WORDS[each.level]}</span>{escape(each.title)}</strong>'
        f"{escape(each.text)}</li>" for each in findings.find(view))
    return f'{name}<div class="cards">{"".join(_stats(view))}</div><ul class="found">{found}</ul>'


_WORDS = {"bad": "act", "warn": "watch", "good": "fine"}


def _stats(view: RunView) -> list[str]:
    log = view.log
    uneven = stats.max_over_mean(view.tokens_LE)
    tokens = log.routed_TL[view.window].sum() + log.null_TL[view.window].sum()
    if np.isnan(uneven).all():
        return [html.stat("Tokens routed", "0", "none in the window", "bad")]
    worst = int(np.nanargmax(uneven))
    dead, starving = (sum(lack.is_dead is kind for lack in view.lacks) for kind in (True, False))
    level = "bad" if uneven[worst] > findings.VERY_UNEVEN else "warn" if uneven[worst] > findings.UNEVEN else "good"
    cards = [
        html.stat("Most uneven layer", f"{uneven[worst]:.2f}×",
                  f"of the mean, layer {log.layers[worst]}; average {np.nanmean(uneven):.2f}", level),
        html.stat("Entropy", f"{np.nanmean(stats.entropy(view.tokens_LE)):.3f}", "mean of layers, 1 is even"),
        html.stat("Dead experts", str(dead), f"of {log.experts * len(log.layers)}; {starving} starving",
                  "bad" if dead else "warn" if starving else "good")]
    lost = view.time_lost(view.present_uneven())
    if log.ep_size == 1:
        cards.append(html.stat("Lost to imbalance", "none", "every rank has all experts", "good"))
    elif lost is not None:
        level = "bad" if lost > findings.MUCH_TIME_LOST else "warn" if lost > findings.TIME_LOST else "good"
        cards.append(html.stat("Lost to imbalance", f"{lost:.1%}", "of a step's time, estimated", level))
    if view.window_steps and log.bytes_TL.any():
        traffic = log.bytes_TL[view.window].sum() / view.window_steps
        cards.append(html.stat("Exchanged a step", f"{traffic / 1e6:,.2f} MB", "all layers and ranks, both ways"))
    null = log.null_TL[view.window].sum() / max(1, tokens)
    return [*cards, html.stat("Unconditional", f"{null:.1%}", f"of {tokens / 1e6:,.1f} M tokens now")]


def _layers(views: Sequence[RunView], labels: Sequence[str]) -> list[str]:
    layers = sorted({layer for view in views for layer in view.log.layers})
    uneven = {layer: [float(stats.max_over_mean(view.tokens_LE)[view.log.layers.index(layer)]) for view in views
                      if layer in view.log.layers] for layer in layers}
    worst = sorted(layers, key=lambda layer: -max(np.nan_to_num(uneven[layer])))[:_OPEN_LAYERS]
    blocks = [_unlogged_tables(view, len(views) > 1) for view in views]
    for layer in layers:
        by_title = [{scene.title: scene for scene in layer_figures(view, layer)} if layer in view.log.layers else {}
                    for view in views]
        titles = dict.fromkeys(title for scenes in by_title for title in scenes)
        groups = [[scenes.get(title) for scenes in by_title] for title in titles]
        words = "largest over mean " + ", ".join(f"{value:.2f}" for value in uneven[layer])
        blocks.append(f'<details{" open" if layer in worst else ""}><summary>Layer {layer}<span>{words}</span></summary>'
                      f"{html.figures(groups, labels)}</details>")
    return blocks


def _unlogged_tables(view: RunView, is_named: bool) -> str:
    """Say which tables the run does not log, how to get them and what they take."""
    log, config = view.log, view.facts.config
    words = []
    for name, what, setting in (("tokens_per_class", "class", "class_counts"), ("tokens_per_position", "patch", "position_counts")):
        if name not in log.tables:
            rows = 0 if config is None else config.model.num_classes if what == "class" else config.model.tokens_per_image
            size = f", about {rows * log.experts * _BYTES_A_COUNT / 1e3:.2g} kB a layer and table" if rows else ""
            words.append(f"load by {what} (logging.{setting}=true{size})")
    if not words:
        return ""
    head = f"{view.name}: not" if is_named else "Not"
    return (f'<p class="muted">{escape(head)} logged: {escape(" and ".join(words))}. Large tables must be asked for; '
            "logging.counts_every sets how many log intervals share one.</p>")


def _table(view: RunView, is_named: bool) -> str:
    head, *rows = layer_rows(view)
    shown = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    return (f"<h3>{escape(view.name)}</h3>" if is_named else "") + html.table([head, *shown])


def _write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _round(value: float) -> object:
    return "" if np.isnan(value) else float(f"{value:.4g}")


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")
