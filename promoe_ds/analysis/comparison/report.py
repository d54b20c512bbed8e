"""comparison.html: one self-contained page, readable offline, on a phone and in the dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from promoe_ds.analysis.comparison import figures
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.evaluation.images import make_grid, read_samples

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_GRID_COLUMNS = 10
_GRID_ZOOM = 3
#: Column: metric of the results, heading, decimals, factor to its unit.
_COLUMNS = (
    ("final_loss", "final loss", 4, 1.0),
    ("heldout_loss", "held-out loss", 4, 1.0),
    ("frechet", "Fréchet", 3, 1.0),
    ("accuracy", "accuracy, %", 1, 100.0),
    ("load_max_over_mean", "load max/mean", 2, 1.0),
    ("load_entropy", "load entropy", 3, 1.0),
    ("dead_experts", "dead experts", 2, 1.0),
    ("step_ms", "ms a step", 1, 1.0),
)


def render_report(comparison: Mapping[str, Any], folder: Path) -> str:
    """Return the page for the content of comparison.json.

    Args:
        folder: of the comparison; samples are taken from its runs where they are.
    Raises: ConfigError if a library of the extra `report` is missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise ConfigError("jinja2 is not installed, the report needs it: pip install 'promoe_ds[report]'") from None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = lambda name: Markup("_<wbr>").join(name.split("_"))  # joining escapes every part
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    columns = [column for column in _COLUMNS if any(entry["summary"][column[0]] for entry in comparison["contenders"])]
    entries = comparison["contenders"]
    title = f"Comparison of {len(entries)} contender{'s' if len(entries) > 1 else ''} on {comparison['dataset']}"
    return template.render(
        title=title, comparison=comparison, settings=comparison["settings"],
        headings=[heading for _, heading, _, _ in columns], rows=_rows(comparison, columns),
        differences=_difference_rows(comparison, columns), window=figures.running_window(comparison),
        figures=[{"title": title, "svg": Markup(svg)} for title, svg in _figures(comparison) if svg is not None],
        grids=_grids(comparison, folder), guidance=_guidance(comparison), environments=_environments(comparison),
        overrides=_overrides(comparison), has_experts=any(entry["summary"]["load_entropy"] for entry in entries),
        without_experts=[entry["name"] for entry in entries if entry["seeds"] and not entry["summary"]["load_entropy"]])


def show(summary: Mapping[str, Any] | None, decimals: int, factor: float, *, signed: bool = False) -> str:
    """Return `mean ± sd`, the mean alone of one value, a dash of none."""
    if summary is None:
        return "–"
    mean = f"{factor * summary['mean']:{'+' if signed else ''}.{decimals}f}".replace("-", "−")
    return mean if summary["sd"] is None else f"{mean} ± {factor * summary['sd']:.{decimals}f}"


def _rows(comparison: Mapping[str, Any], columns: list[tuple]) -> list[dict[str, Any]]:
    return [{"name": entry["name"], "seeds": len(entry["seeds"]), "gflops": f"{entry['training_gflops_per_image']:.3g}",
             "parameters": " / ".join(f"{entry['parameters'][kind] / 1e6:.4g}" for kind in ("activated", "total")),
             "cells": [show(entry["summary"][metric], decimals, factor) for metric, _, decimals, factor in columns]}
            for entry in comparison["contenders"]]


def _difference_rows(comparison: Mapping[str, Any], columns: list[tuple]) -> list[dict[str, Any]]:
    rows = []
    for entry in comparison["contenders"][1:]:
        paired = entry["difference_to_first"]
        pairs = max((summary["n"] for summary in paired.values() if summary), default=0)
        rows.append({"name": entry["name"], "seeds": pairs, "cells": [
            show(paired[metric], decimals, factor, signed=True) for metric, _, decimals, factor in columns]})
    return rows


def _figures(comparison: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    first = comparison["contenders"][0]["name"]
    drawn = [("Diffusion loss", figures.draw_loss_curves(comparison))]
    if len(comparison["contenders"]) > 1:
        drawn.append((f"Diffusion loss minus that of {first}, same seed and step", figures.draw_loss_differences(comparison)))
    if comparison["judges_images"]:
        drawn += _image_figures(comparison)
    return [*drawn, ("Time of a training step", figures.draw_points(comparison, "step_ms", unit="milliseconds, median of a run")),
            ("Expert load by block, largest over mean (1 is even)", figures.draw_load_per_layer(comparison))]


def _image_figures(comparison: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    judged = [result["images"] for entry in comparison["contenders"] for result in entry["seeds"].values()]
    if not judged:
        return []
    training, real = judged[0]["frechet_of_training_digits"], judged[0]["accuracy_on_real"]
    return [
        ("Diffusion loss of the averaged weights on held-out digits, lower is better",
         figures.draw_points(comparison, "heldout_loss", unit="squared error, equal noise for all")),
        (f"Fréchet distance of pixels to held-out digits, lower is better (training digits, dotted where near: {training:.3f})",
         figures.draw_points(comparison, "frechet", unit="squared distance, pixels in [0, 1]", landmark=training)),
        (f"Samples recognised as their label, higher is better (real digits, dotted where near: {real:.1%})",
         figures.draw_points(comparison, "accuracy", unit="% of samples", factor=100.0, landmark=real)),
    ]


def _grids(comparison: Mapping[str, Any], folder: Path) -> list[dict[str, str]]:
    """Return each contender's samples of its first seed, as PNG in base64."""
    grids = []
    for entry in comparison["contenders"]:
        seed = next(iter(entry["seeds"]), None)
        try:
            images, labels = read_samples(folder / "runs" / f"{entry['name']}-seed{seed}" / "samples")
        except DataError:
            continue  # not judged, or cleared away: the figures stand without
        per_class = int(np.bincount(labels).max())
        grid = make_grid(images, labels, columns=min(_GRID_COLUMNS, per_class), zoom=_GRID_ZOOM)
        buffer = io.BytesIO()
        Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid).save(buffer, format="PNG", optimize=True)
        grids.append({"name": entry["name"], "seed": seed, "width": grid.shape[1], "height": grid.shape[0],
                      "png": base64.b64encode(buffer.getvalue()).decode("ascii")})
    return grids


def _environments(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the different conditions under which results were made; times compare within one of them."""
    different: list[dict[str, Any]] = []
    for entry in comparison["contenders"]:
        for seed, result in entry["seeds"].items():
            environment = {**result["environment"], "device": result["device"]}
            known = next((e for e in different if e["environment"] == environment), None)
            if known is None:
                different.append(known := {"environment": environment, "runs": []})
            known["runs"].append(f"{entry['name']}, seed {seed}")
    return different


def _overrides(comparison: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"name": e["name"], "recipe": e["recipe"], "overrides": " ".join(e["overrides"])} for e in comparison["contenders"]]


def _guidance(comparison: Mapping[str, Any]) -> str:
    scales = {e["name"]: e["config"]["sampling"]["cfg_scale"] for e in comparison["contenders"]}
    if len(set(scales.values())) == 1:
        return f"{next(iter(scales.values())):g}"
    return ", ".join(f"{scale:g} ({name})" for name, scale in scales.items())
