"""How charts and pages look: colours for light and dark, palettes, words for numbers."""

from __future__ import annotations

import base64
import colorsys
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

Spec = dict[str, Any]

#: Colours of light and dark pages and charts.
THEMES: dict[str, dict[str, str]] = {
    "light": {
        "bg": "#f5f5f2",
        "card": "#ffffff",
        "fg": "#1c1e21",
        "muted": "#5f656e",
        "grid": "#e3e4e8",
        "over": "#ee9758",
        "under": "#6d9fe6",
        "even": "#f4f4f1",
        "accent": "#0b7d6c",
        "good": "#1b7d46",
        "warn": "#a86200",
        "bad": "#c22f2a",
    },
    "dark": {
        "bg": "#121417",
        "card": "#1b1e23",
        "fg": "#e9eaec",
        "muted": "#a0a6af",
        "grid": "#343940",
        "over": "#b65c20",
        "under": "#2f66ba",
        "even": "#23272d",
        "accent": "#44c9b3",
        "good": "#5bc98a",
        "warn": "#f0b04b",
        "bad": "#ff7d76",
    },
}
#: Colours of series, readable on both themes; of more series the hues go around.
_SERIES = (
    "#3f80db #e5720f #2fa062 #cc4778 #8d63d2 #b58d0c #1aa3b8 #d9594c #7a9a2e #a8623a #6573d6"
    " #8a8f98"
).split()
#: Colours through which an ordered sequence goes.
_RAMP = "#3f80db #1aa3b8 #2fa062 #b58d0c #e5720f #cc3b50".split()
#: Of a chart in a narrow card.
WIDTH = 340
#: Opacity of a series that a legend shows alone, and of the others.
PICKED: Spec = {"condition": {"param": "shown", "value": 1}, "value": 0.04}
_LOAD_WORDS = "datum.value < 0.5 ? '1/3 or less' : datum.value > 2 ? '3 or more' : '1'"
#: Loads over an even share: three times that, or a third, has the full colour.
LOAD_COLOR: Spec = {
    "scale": {
        "type": "log",
        "domain": [1 / 3, 3],
        "clamp": True,
        "range": "diverging",
        "interpolate": "rgb",
    },
    "legend": {"title": None, "values": [1 / 3, 1, 3], "labelExpr": _LOAD_WORDS},
}


def vega_config(theme: str) -> Spec:
    """Return the look of charts on a light or dark page."""
    color = THEMES[theme]
    words = {
        "labelColor": color["muted"],
        "titleColor": color["muted"],
        "titleFontWeight": "normal",
    }
    lines = {f"{part}Color": color["grid"] for part in ("grid", "domain", "tick")}
    styles: dict[str, Any] = {name: {"color": color[name]} for name in ("over", "under", "muted")}
    styles["reference"] = {"color": color["fg"], "strokeDash": [4, 3]}
    diverging = [color[name] for name in ("under", "even", "over")]
    legend = {"orient": "bottom", "symbolLimit": 0, "labelLimit": 280, "gradientLength": 120}
    return {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "style": styles,
        "axis": {**words, **lines},
        "legend": {**words, **legend},
        "mark": {"color": color["under"]},
        "text": {"color": color["fg"], "fontSize": 10},
        "title": {"color": color["fg"], "subtitleColor": color["muted"]},
        "range": {"diverging": diverging, "ramp": [color["even"], color["accent"]]},
    }


def palette(count: int, *, is_ordered: bool = False) -> list[str]:
    """Return so many different colours, "#rrggbb", readable on both themes."""
    if count <= len(_SERIES) and not is_ordered:
        return _SERIES[:count]
    if is_ordered:
        ramp = np.array([[int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in _RAMP])
        at = np.linspace(0, len(_RAMP) - 1, count)
        parts = np.stack([np.interp(at, range(len(_RAMP)), channel) for channel in ramp.T], axis=1)
    else:
        hues = [(place / count, 0.5 if place % 2 else 0.62) for place in range(count)]
        parts = 255 * np.array([colorsys.hls_to_rgb(hue, light, 0.6) for hue, light in hues])
    return ["#" + "".join(f"{round(part):02x}" for part in color) for color in parts]


def color_of(column: str, names: Sequence[str], *, is_ordered: bool = False) -> Spec:
    """Return the colours of a column's names, with a legend as wide as the chart."""
    in_a_row = max(1, int(WIDTH / (26 + 6.2 * max(map(len, names), default=1))))
    scale = {"domain": list(names), "range": palette(len(names), is_ordered=is_ordered)}
    return nominal(
        column, scale=scale, legend={"title": None, "columns": in_a_row, "symbolOpacity": 1}
    )


def mark_of(column: str, names: Sequence[str]) -> Spec:
    """Return the "strokeDash" or "shape" of a column's names, to tell them apart without colours:
    Vega's own, in turn.
    """
    return {**color_of(column, names), "scale": {"domain": list(names)}}


def linear_color(low: float, high: float) -> Spec:
    """Return a scale of shades whose middle is between two values."""
    scale = {"domain": [low, high], "clamp": True, "range": "diverging", "interpolate": "rgb"}
    return {"scale": scale, "legend": {"title": None, "values": [low, (low + high) / 2, high]}}


def quantitative(column: str, **options: Any) -> Spec:
    """Return the encoding of a column of numbers."""
    return {"field": column, "type": "quantitative", **options}


def nominal(column: str, **options: Any) -> Spec:
    """Return the encoding of a column of names."""
    return {"field": column, "type": "nominal", **options}


def tooltip(*names: str, **numbers: str) -> list[Spec]:
    """Return what the pointer shows: columns of names, and columns of numbers with their form."""
    shown = [quantitative(column, format=form) for column, form in numbers.items()]
    return [*({"field": column} for column in names), *shown]


def number(value: Any) -> Any:
    """Return a table's cell: numbers in six digits, nothing for NaN."""
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else float(f"{value:.6g}")
    return value


def slug(words: str) -> str:
    """Return words as part of a file's name or a page's address."""
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


def png_url(image: Image.Image) -> str:
    """Return an image as an address that holds it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
