"""A figure: rectangles, lines, dots, words and pixel maps in a plane, without any library.

Colours go by name ("fg", "muted", "grid", "over", "under", "accent", "good", "warn", "bad", or a number of a series), so that
one figure serves light and dark. Pixel maps carry a hue and an opacity: the background shines through in either.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

#: Colours of light and dark pages by name.
THEMES: dict[str, dict[str, str]] = {
    "light": {"bg": "#f5f5f2", "card": "#ffffff", "fg": "#1c1e21", "muted": "#646a73", "grid": "#e3e4e8", "over": "#d65a10",
              "under": "#2b6bc9", "accent": "#0b7d6c", "good": "#1b7d46", "warn": "#a86200", "bad": "#c22f2a"},
    "dark": {"bg": "#121417", "card": "#1b1e23", "fg": "#e9eaec", "muted": "#a0a6af", "grid": "#343940", "over": "#ff8f4a",
             "under": "#72a9ff", "accent": "#44c9b3", "good": "#5bc98a", "warn": "#f0b04b", "bad": "#ff7d76"}}
#: Colours of series, readable on both themes.
SERIES = ("#3f80db", "#e5720f", "#2fa062", "#cc4778", "#8d63d2", "#b58d0c", "#1aa3b8", "#d9594c", "#7a9a2e", "#a8623a", "#6573d6",
          "#8a8f98")
#: Hues of pixel maps.
HUES = {"over": (226, 104, 30), "under": (56, 124, 220), "accent": (18, 150, 132)}
_FONT_SIZE = 11
#: Pillow's own font, which every installation has, lacks these.
_PNG_LETTERS = str.maketrans({"×": "x", "σ": "sigma", "–": "-", "“": '"', "”": '"'})
_PNG_ZOOM = 3


@dataclass
class Scene:
    """One figure of a size in its own units.

    title: what it shows; note: how to read it; numbers: what its CSV holds, a heading and rows.
    """

    width: float
    height: float
    title: str
    note: str = ""
    numbers: list[list[object]] = field(default_factory=list)
    _items: list[tuple] = field(default_factory=list)

    def rect(self, x: float, y: float, width: float, height: float, color: str | int, *, opacity: float = 1.0, tip: str = "",
             radius: float = 0.0) -> None:
        """Add a filled rectangle; `tip` shows under the pointer."""
        self._items.append(("rect", x, y, width, height, color, opacity, tip, radius))

    def line(self, points: list[tuple[float, float]], color: str | int, *, width: float = 1.0, dashed: bool = False,
             tip: str = "") -> None:
        """Add a line through points."""
        self._items.append(("line", points, color, width, dashed, tip))

    def dot(self, x: float, y: float, radius: float, color: str | int, *, opacity: float = 1.0, tip: str = "") -> None:
        """Add a filled circle."""
        self._items.append(("dot", x, y, radius, color, opacity, tip))

    def text(self, x: float, y: float, words: str, *, color: str = "fg", anchor: str = "start", size: float = _FONT_SIZE,
             bold: bool = False) -> None:
        """Add words whose base line stands at y; anchor is start, middle or end."""
        self._items.append(("text", x, y, words, color, anchor, size, bold))

    def pixels(self, x: float, y: float, width: float, height: float, rgba: np.ndarray) -> None:
        """Add a map of pixels (rows, columns, 4), uint8, stretched without smoothing."""
        self._items.append(("pixels", x, y, width, height, rgba))

    def svg(self) -> str:
        """Return the figure as an SVG element without a title of its own."""
        body = "".join(getattr(self, f"_svg_{kind}")(*rest) for kind, *rest in self._items)
        return (f'<svg viewBox="0 0 {_n(self.width)} {_n(self.height)}" role="img" aria-label="{escape(self.title, quote=True)}" '
                f'style="max-width:{_n(1.45 * self.width)}px">{body}</svg>')

    def png(self, path: Path, theme: str = "light") -> None:
        """Write the figure with its title as PNG."""
        colors, zoom, top = THEMES[theme], _PNG_ZOOM, 24
        image = Image.new("RGBA", (round(self.width * zoom), round((self.height + top) * zoom)), colors["card"])
        shifted = [("text", 6.0, 15.0 - top, self.title, "fg", "start", 12.0, True), *self._items]
        for kind, *rest in shifted:
            layer = Image.new("RGBA", image.size, (0, 0, 0, 0)) if kind in ("rect", "dot") else image
            getattr(self, f"_png_{kind}")(layer, ImageDraw.Draw(layer), colors, zoom, top, *rest)
            if layer is not image:
                image.alpha_composite(layer)
        image.convert("RGB").save(path, optimize=True)

    @staticmethod
    def _svg_rect(x, y, width, height, color, opacity, tip, radius) -> str:
        fade = "" if opacity >= 1 else f' fill-opacity="{opacity:.2f}"'
        rounded = f' rx="{_n(radius)}"' if radius else ""
        place = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
        return f'<rect {place} {_fill(color)}{fade}{rounded}{_tip(tip, "rect")}'

    @staticmethod
    def _svg_line(points, color, width, dashed, tip) -> str:
        stroke = f'stroke="{SERIES[color % len(SERIES)]}"' if isinstance(color, int) else f'class="s-{color}"'
        dash = ' stroke-dasharray="3 3"' if dashed else ""
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        return f'<polyline points="{path}" fill="none" {stroke} stroke-width="{_n(width)}" stroke-linejoin="round"{dash}' \
               f'{_tip(tip, "polyline")}'

    @staticmethod
    def _svg_dot(x, y, radius, color, opacity, tip) -> str:
        fade = "" if opacity >= 1 else f' fill-opacity="{opacity:.2f}"'
        return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" {_fill(color)}{fade}{_tip(tip, "circle")}'

    @staticmethod
    def _svg_text(x, y, words, color, anchor, size, bold) -> str:
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        heavy = ' font-weight="600"' if bold else ""
        return f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" {_fill(color)}{place}{heavy}>{escape(words)}</text>'

    @staticmethod
    def _svg_pixels(x, y, width, height, rgba) -> str:
        buffer = io.BytesIO()
        Image.fromarray(rgba, "RGBA").save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<image x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" preserveAspectRatio="none" ' \
               f'class="px" href="data:image/png;base64,{data}"/>'

    @staticmethod
    def _png_rect(layer, draw, colors, zoom, top, x, y, width, height, color, opacity, tip, radius) -> None:
        box = [x * zoom, (y + top) * zoom, (x + width) * zoom, (y + height + top) * zoom]
        draw.rounded_rectangle(box, radius * zoom, fill=_rgba(color, colors, opacity))

    @staticmethod
    def _png_line(layer, draw, colors, zoom, top, points, color, width, dashed, tip) -> None:
        path = [(x * zoom, (y + top) * zoom) for x, y in points]
        for start, end in _dashes(path, 9.0) if dashed else ():
            draw.line([start, end], fill=_rgba(color, colors), width=round(width * zoom))
        if not dashed:
            draw.line(path, fill=_rgba(color, colors), width=max(1, round(width * zoom)), joint="curve")

    @staticmethod
    def _png_dot(layer, draw, colors, zoom, top, x, y, radius, color, opacity, tip) -> None:
        draw.ellipse([(x - radius) * zoom, (y - radius + top) * zoom, (x + radius) * zoom, (y + radius + top) * zoom],
                     fill=_rgba(color, colors, opacity))

    @staticmethod
    def _png_text(layer, draw, colors, zoom, top, x, y, words, color, anchor, size, bold) -> None:
        font = ImageFont.load_default(size * zoom)
        place = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
        draw.text((x * zoom, (y + top) * zoom), words.translate(_PNG_LETTERS), fill=_rgba(color, colors), font=font, anchor=place,
                  stroke_width=1 if bold else 0)

    @staticmethod
    def _png_pixels(layer, draw, colors, zoom, top, x, y, width, height, rgba) -> None:
        size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
        scaled = Image.fromarray(rgba, "RGBA").resize(size, Image.Resampling.NEAREST)
        layer.alpha_composite(scaled, (round(x * zoom), round((y + top) * zoom)))


def fade(values: np.ndarray, hue: str) -> np.ndarray:
    """Return pixels of a hue whose opacity is the values', clipped to 0 ... 1; NaN is clear."""
    alpha = np.nan_to_num(np.clip(values, 0, 1)) * 255
    return np.dstack([np.broadcast_to(np.array(HUES[hue], np.uint8), (*values.shape, 3)), alpha.round().astype(np.uint8)])


def diverge(values: np.ndarray) -> np.ndarray:
    """Return pixels for values in -1 ... 1: under blue, over orange, 0 and NaN clear."""
    over = (np.nan_to_num(values) > 0)[..., None]
    return np.where(over, fade(values, "over"), fade(-values, "under")).astype(np.uint8)


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _fill(color: str | int) -> str:
    return f'fill="{SERIES[color % len(SERIES)]}"' if isinstance(color, int) else f'class="f-{color}"'


def _tip(words: str, element: str) -> str:
    return f"><title>{escape(words)}</title></{element}>" if words else "/>"


def _rgba(color: str | int, colors: dict[str, str], opacity: float = 1.0) -> tuple[int, int, int, int]:
    text = SERIES[color % len(SERIES)] if isinstance(color, int) else colors[color]
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16), round(255 * opacity)


def _dashes(path: list[tuple[float, float]], length: float) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    pieces = []
    for (x0, y0), (x1, y1) in pairwise(path):
        distance = max(1e-9, float(np.hypot(x1 - x0, y1 - y0)))
        for start in np.arange(0, distance, 2 * length):
            a, b = start / distance, min(1.0, (start + length) / distance)
            pieces.append(((x0 + a * (x1 - x0), y0 + a * (y1 - y0)), (x0 + b * (x1 - x0), y0 + b * (y1 - y0))))
    return pieces
