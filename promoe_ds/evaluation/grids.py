"""Pictures of samples: one, many in a grid, many with their captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

#: Of a grid with captions, in pixels.
_CAPTIONED_COLUMNS, _CAPTIONED_SIZE, _LETTER_SIZE, _CAPTION_GAP = 10, 96, 11, 6


def as_picture(image_HWC: np.ndarray) -> Image.Image:
    """Return a uint8 image as Pillow's, grey for a single channel."""
    return Image.fromarray(image_HWC.squeeze(-1) if image_HWC.shape[-1] == 1 else image_HWC)


def make_grid(
    images_NHWC: np.ndarray, labels: np.ndarray, *, columns: int, zoom: int, gap: int = 2
) -> np.ndarray:
    """Lay out up to `columns` images of each class, one row a class, ascending; (H, W, C)."""
    rows = []
    for label in np.unique(labels):
        cells = images_NHWC[labels == label][:columns].repeat(zoom, axis=1).repeat(zoom, axis=2)
        missing = columns - len(cells)
        edges = (0, missing), (gap, 0), (gap, 0), (0, 0)
        rows.append(np.concatenate(np.pad(cells, edges, constant_values=255), axis=1))
    return np.pad(np.vstack(rows), ((0, gap), (0, gap), (0, 0)), constant_values=255)


def captioned_grid(images_NHWC: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """Lay out images row by row, each above its caption, which is cut behind three lines."""
    zoom = max(1, _CAPTIONED_SIZE // max(images_NHWC.shape[1:3]))
    high, wide = images_NHWC.shape[1] * zoom, images_NHWC.shape[2] * zoom
    font, columns = ImageFont.load_default(_LETTER_SIZE), min(_CAPTIONED_COLUMNS, len(captions))
    cell = wide + _CAPTION_GAP, high + 3 * (_LETTER_SIZE + 3) + _CAPTION_GAP
    rows = -(-len(captions) // columns)
    grid = Image.new("RGB", (columns * cell[0] + _CAPTION_GAP, rows * cell[1]), "white")
    draw = ImageDraw.Draw(grid)
    letters = max(4, int(wide / font.getlength("n")))
    for place, (image, caption) in enumerate(zip(images_NHWC, captions, strict=True)):
        corner = place % columns * cell[0] + _CAPTION_GAP, place // columns * cell[1] + _CAPTION_GAP
        picture = as_picture(image).resize((wide, high), Image.Resampling.NEAREST)
        grid.paste(picture, corner)
        lines = textwrap.wrap(caption, letters, max_lines=3, placeholder=" ...")
        below = corner[0], corner[1] + high
        draw.multiline_text(below, "\n".join(lines), "black", font, spacing=2)
    return grid
