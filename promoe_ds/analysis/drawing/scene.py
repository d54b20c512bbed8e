"""A figure: rectangles, lines, dots, words and pixel maps in a plane, without any library.

Colours go by name ("fg", "muted", "grid", "over", "under", "accent", "good", "warn", "bad"), by a number of a series, or are
written out ("#rrggbb", readable on both), so that one figure serves light and dark. Pixel maps carry a hue and an opacity: the
background shines through in either.
"""

from __future__ import annotations

import base64
import colorsys
import io
from dataclasses import dataclass, field
from html import escape

import numpy as np
from PIL import Image

#: Colours of light and dark pages by name.
THEMES: dict[str, dict[str, str]] = {
    "light": {"bg": "#f5f5f2", "card": "#ffffff", "fg": "#1c1e21", "muted": "#646a73", "grid": "#e3e4e8", "over": "#d65a10",
              "under": "#2b6bc9", "accent": "#0b7d6c", "good": "#1b7d46", "warn": "#a86200", "bad": "#c22f2a"},
    "dark": {"bg": "#121417", "card": "#1b1e23", "fg": "#e9eaec", "muted": "#a0a6af", "grid": "#343940", "over": "#ff8f4a",
             "under": "#72a9ff", "accent": "#44c9b3", "good": "#5bc98a", "warn": "#f0b04b", "bad": "#ff7d76"}}
#: Colours of series, readable on both themes.
SERIES = ("#3f80db", "#e5720f", "#2fa062", "#cc4778", "#8d63d2", "#b58d0c", "#1aa3b8", "#d9594c", "#7a9a2e", "#a8623a", "#6573d6",
          "#8a8f98")
#: Colours through which a ramp goes, from the first of a sequence to the last.
_RAMP = ("#3f80db", "#1aa3b8", "#2fa062", "#b58d0c", "#e5720f", "#cc3b50")
#: Lengths drawn and left out of each kind of line; the first is solid.
DASHES: tuple[tuple[float, ...], ...] = ((), (3.0, 3.0), (1.2, 2.4), (7.0, 2.4, 1.2, 2.4))
#: Hues of pixel maps.
HUES = {"over": (226, 104, 30), "under": (56, 124, 220), "accent": (18, 150, 132)}
FONT_SIZE = 11.0

Color = str | int
Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class Rect:
    """A filled rectangle: x, y, width, height."""

    box: Box
    color: Color
    opacity: float
    tip: str
    radius: float

    def svg(self) -> str:
        """Return it as an SVG element."""
        rounded = f' rx="{_n(self.radius)}"' if self.radius else ""
        return f'<rect {_place(self.box)} {_fill(self.color)}{_faded(self.opacity)}{rounded}{_tip(self.tip, "rect")}'


@dataclass(frozen=True)
class Line:
    """A line through points; dash is a place in DASHES."""

    points: list[Point]
    color: Color
    width: float
    dash: int
    tip: str

    def svg(self) -> str:
        """Return it as an SVG element."""
        stroke = f'stroke="{fixed}"' if (fixed := fixed_color(self.color)) else f'class="s-{self.color}"'
        dash = f' stroke-dasharray="{" ".join(map(_n, DASHES[self.dash]))}"' if self.dash else ""
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in self.points)
        return (f'<polyline points="{path}" fill="none" {stroke} stroke-width="{_n(self.width)}" stroke-linejoin="round"{dash}'
                f'{_tip(self.tip, "polyline")}')


@dataclass(frozen=True)
class Dot:
    """A filled circle."""

    center: Point
    radius: float
    color: Color
    opacity: float
    tip: str

    def svg(self) -> str:
        """Return it as an SVG element."""
        place = f'cx="{_n(self.center[0])}" cy="{_n(self.center[1])}" r="{_n(self.radius)}"'
        return f'<circle {place} {_fill(self.color)}{_faded(self.opacity)}{_tip(self.tip, "circle")}'


@dataclass(frozen=True)
class Text:
    """Words whose base line begins, is centred or ends at a point."""

    at: Point
    words: str
    color: str
    anchor: str
    size: float

    def svg(self) -> str:
        """Return it as an SVG element."""
        anchor = "" if self.anchor == "start" else f' text-anchor="{self.anchor}"'
        place = f'x="{_n(self.at[0])}" y="{_n(self.at[1])}" font-size="{_n(self.size)}"'
        return f"<text {place} {_fill(self.color)}{anchor}>{escape(self.words)}</text>"


@dataclass(frozen=True)
class Pixels:
    """A map of pixels (rows, columns, 4), uint8, stretched without smoothing."""

    box: Box
    rgba: np.ndarray

    def svg(self) -> str:
        """Return it as an SVG element."""
        buffer = io.BytesIO()
        Image.fromarray(self.rgba, "RGBA").save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<image {_place(self.box)} preserveAspectRatio="none" class="px" href="data:image/png;base64,{data}"/>'


Shape = Rect | Line | Dot | Text | Pixels


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
    shapes: list[Shape] = field(default_factory=list)

    def rect(self, box: Box, color: Color, *, opacity: float = 1.0, tip: str = "", radius: float = 0.0) -> None:
        """Add a filled rectangle; `tip` shows under the pointer."""
        self.shapes.append(Rect(box, color, opacity, tip, radius))

    def line(self, points: list[Point], color: Color, *, width: float = 1.0, dash: int = 0, tip: str = "") -> None:
        """Add a line through points."""
        self.shapes.append(Line(points, color, width, dash, tip))

    def dot(self, center: Point, radius: float, color: Color, *, opacity: float = 1.0, tip: str = "") -> None:
        """Add a filled circle."""
        self.shapes.append(Dot(center, radius, color, opacity, tip))

    def text(self, at: Point, words: str, *, color: str = "fg", anchor: str = "start", size: float = FONT_SIZE) -> None:
        """Add words; anchor is start, middle or end."""
        self.shapes.append(Text(at, words, color, anchor, size))

    def pixels(self, box: Box, rgba: np.ndarray) -> None:
        """Add a map of pixels (rows, columns, 4), uint8."""
        self.shapes.append(Pixels(box, rgba))

    def svg(self) -> str:
        """Return the figure as an SVG element without a title of its own."""
        body = "".join(shape.svg() for shape in self.shapes)
        return (f'<svg viewBox="0 0 {_n(self.width)} {_n(self.height)}" role="img" aria-label="{escape(self.title, quote=True)}" '
                f'style="max-width:{_n(1.45 * self.width)}px">{body}</svg>')


def fixed_color(color: Color) -> str:
    """Return the "#rrggbb" of a colour that is the same in light and dark; "" for one that goes by a name."""
    if isinstance(color, int):
        return SERIES[color % len(SERIES)]
    return color if color.startswith("#") else ""


def palette(count: int) -> list[str]:
    """Return so many colours without an order, no two alike."""
    if count <= len(SERIES):
        return list(SERIES[:count])
    # Around the circle of hues, neighbours apart in lightness.
    tints = [colorsys.hls_to_rgb(place / count, (0.40, 0.60, 0.50)[place % 3], 0.62) for place in range(count)]
    return [_hex(tuple(255 * part for part in tint)) for tint in tints]


def ramp(count: int) -> list[str]:
    """Return so many colours for what has an order."""
    anchors = np.array([[int(color[at:at + 2], 16) for at in (1, 3, 5)] for color in _RAMP])
    places = np.linspace(0, len(anchors) - 1, count)
    return [_hex(tint) for tint in np.stack([np.interp(places, range(len(anchors)), part) for part in anchors.T], axis=1)]


def fade(values: np.ndarray, hue: str) -> np.ndarray:
    """Return pixels of a hue whose opacity is the values', clipped to 0 ... 1; NaN is clear."""
    alpha = np.nan_to_num(np.clip(values, 0, 1)) * 255
    return np.dstack([np.broadcast_to(np.array(HUES[hue], np.uint8), (*values.shape, 3)), alpha.round().astype(np.uint8)])


def diverge(values: np.ndarray) -> np.ndarray:
    """Return pixels for values in -1 ... 1: under blue, over orange, 0 and NaN clear."""
    over = (np.nan_to_num(values) > 0)[..., None]
    return np.where(over, fade(values, "over"), fade(-values, "under")).astype(np.uint8)


def _hex(rgb: tuple[float, ...] | np.ndarray) -> str:
    return "#" + "".join(f"{round(part):02x}" for part in rgb)


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _place(box: Box) -> str:
    x, y, width, height = map(_n, box)
    return f'x="{x}" y="{y}" width="{width}" height="{height}"'


def _fill(color: Color) -> str:
    return f'fill="{fixed}"' if (fixed := fixed_color(color)) else f'class="f-{color}"'


def _faded(opacity: float) -> str:
    return "" if opacity >= 1 else f' fill-opacity="{opacity:.2f}"'


def _tip(words: str, element: str) -> str:
    return f"><title>{escape(words)}</title></{element}>" if words else "/>"
