"""Figures as PNG, painted by Pillow with the font that it carries."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from promoe_ds.analysis.drawing.scene import DASHES, THEMES, Color, Dot, Line, Pixels, Point, Rect, Scene, Shape, Text, fixed_color

_ZOOM = 3
#: Room above the figure for its title.
_TOP = 24.0
#: Pillow's own font, which every installation has, lacks these.
_LETTERS = str.maketrans({"×": "x", "σ": "sigma", "–": "-", "“": '"', "”": '"'})


def write_png(scene: Scene, path: Path, theme: str = "light") -> None:
    """Write a figure with its title."""
    colors = THEMES[theme]
    image = Image.new("RGBA", (round(scene.width * _ZOOM), round((scene.height + _TOP) * _ZOOM)), colors["card"])
    for shape in [Text((6.0, 15.0 - _TOP), scene.title, "fg", "start", 13.0), *scene.shapes]:
        _paint(image, shape, colors)
    image.convert("RGB").save(path, optimize=True)


def _paint(image: Image.Image, shape: Shape, colors: dict[str, str]) -> None:
    if isinstance(shape, Pixels):
        x, y, width, height = shape.box
        size = (max(1, round(width * _ZOOM)), max(1, round(height * _ZOOM)))
        scaled = Image.fromarray(shape.rgba, "RGBA").resize(size, Image.Resampling.NEAREST)
        image.alpha_composite(scaled, tuple(map(round, _at((x, y)))))
        return
    if isinstance(shape, (Rect, Dot)):
        _paint_filled(image, shape, colors)
        return
    draw, color = ImageDraw.Draw(image), _rgba(shape.color, colors)
    if isinstance(shape, Text):
        anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
        draw.text(_at(shape.at), shape.words.translate(_LETTERS), fill=color, font=ImageFont.load_default(shape.size * _ZOOM),
                  anchor=anchor)
    else:
        _paint_line(draw, shape, color)


def _paint_filled(image: Image.Image, shape: Rect | Dot, colors: dict[str, str]) -> None:
    if shape.opacity == 0:
        return
    if isinstance(shape, Rect):
        x, y, width, height = shape.box
    else:
        (x, y), width, height = (shape.center[0] - shape.radius, shape.center[1] - shape.radius), 2 * shape.radius, 2 * shape.radius
    left, top = map(round, _at((x, y)))
    right, bottom = map(round, _at((x + width, y + height)))
    # On a layer of its own: Pillow replaces what lies below, where it should shine through.
    layer = Image.new("RGBA", (max(1, right - left), max(1, bottom - top)), (0, 0, 0, 0))
    draw, color = ImageDraw.Draw(layer), _rgba(shape.color, colors, shape.opacity)
    whole = [0, 0, layer.width - 1, layer.height - 1]
    if isinstance(shape, Rect):
        draw.rounded_rectangle(whole, shape.radius * _ZOOM, fill=color)
    else:
        draw.ellipse(whole, fill=color)
    image.alpha_composite(layer, (max(0, left), max(0, top)))


def _paint_line(draw: ImageDraw.ImageDraw, line: Line, color: tuple[int, ...]) -> None:
    path = [_at(point) for point in line.points]
    width = max(1, round(line.width * _ZOOM))
    if line.dash:
        for start, end in _dashes(path, [length * _ZOOM for length in DASHES[line.dash]]):
            draw.line([start, end], fill=color, width=width)
    else:
        draw.line(path, fill=color, width=width, joint="curve")


def _at(point: Point) -> Point:
    return point[0] * _ZOOM, (point[1] + _TOP) * _ZOOM


def _rgba(color: Color, colors: dict[str, str], opacity: float = 1.0) -> tuple[int, int, int, int]:
    text = fixed_color(color) or colors[color]
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16), round(255 * opacity)


def _dashes(path: list[Point], lengths: list[float]) -> list[tuple[Point, Point]]:
    """Cut a path into the pieces to draw: lengths drawn and left out take turns, on from one segment to the next."""
    pieces, turn, left = [], 0, lengths[0]
    for (x0, y0), (x1, y1) in pairwise(path):
        distance, done = float(np.hypot(x1 - x0, y1 - y0)), 0.0
        while done < distance:
            end = min(distance, done + left)
            if turn % 2 == 0:
                a, b = done / distance, end / distance
                pieces.append(((x0 + a * (x1 - x0), y0 + a * (y1 - y0)), (x0 + b * (x1 - x0), y0 + b * (y1 - y0))))
            left -= end - done
            done = end
            if left <= 1e-9:
                turn = (turn + 1) % len(lengths)
                left = lengths[turn]
    return pieces
