"""Pictures from files: one decoder, and one rule for each colour mode, wherever they are read.

Letters: H, W size in pixels, C colour channels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from promoe_ds.data.listing import image_formats
from promoe_ds.data.reading import reading

_T = TypeVar("_T")

#: What `plain_image` notes of a picture that it changed.
COMPOSED, TURNED = "composed", "turned"
_GREY = {"1", "L", "LA", "La"}
#: Largest values of the ranges that integers and floats of 32 bits are taken for: the first that
#: holds all of a picture's.
_RANGES = {"I": (255, 65535), "F": (1, 255)}
#: By how much of the range floats may leave it: resizing overshoots.
_OVERSHOOT = 0.01
#: Pixels from which pictures are decoded one at a time, whatever the number of threads: 4 bytes
#: each, and as many while resized.
_BIG_PIXELS = 2**24
#: Pixels of a picture enlarged before its square is cut: a thin one would take gigabytes.
_MAX_ENLARGED = 2**26
_ONE_BIG = threading.Lock()


def plain_image(image: Image.Image, changes: list[str] | None = None) -> Image.Image:
    """Return a picture as grey (L) or colour (RGB), upright, by the rule of its mode.

    docs/reference/inputs.md lists the rules.
    Args:
        changes: takes `COMPOSED` if pixels let a white ground through, `TURNED` if EXIF says how
            the camera was held.
    Raises: ValueError for values that fit no range; whatever the decoder raises.
    """
    image.load()
    notes = [] if changes is None else changes
    with suppress(Exception):  # damaged EXIF data beside a whole picture
        if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
            notes.append(TURNED)
            ImageOps.exif_transpose(image, in_place=True)
    if image.mode in _RANGES or image.mode.startswith("I;16"):
        image = _scaled(image)
    elif image.has_transparency_data:
        grey, image = image.mode in _GREY, image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            notes.append(COMPOSED)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if grey else "RGB")
    elif image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode in _GREY else "RGB")
    return image


def _scaled(image: Image.Image) -> Image.Image:
    """Return grey of 8 bits from integers of 16 and 32 bits and from floats."""
    values, ranges = np.asarray(image).astype(np.float64), _RANGES.get(image.mode, (65535,))
    slack, least, most = _OVERSHOOT if image.mode == "F" else 0.0, values.min(), values.max()
    top = next((top for top in ranges if -slack * top <= least and most <= top + slack * top), None)
    if top is None:
        raise ValueError(
            f"{image.mode} values {least:g} ... {most:g} fit no range from 0 to "
            f"{' or '.join(map(str, ranges))}"
        )
    grey = np.rint(values.clip(0, top) * (255 / top)).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Return the central square of an image, (size, size, 3) uint8.

    Source: ADM (Dhariwal & Nichol, 2021), the published code the same: halve by box filter while at
    least twice too large, then bicubic to the shorter side, then cut.
    Raises: ValueError for one so thin that it would not fit in memory once enlarged.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > _MAX_ENLARGED:
        raise ValueError(
            f"{image.width} x {image.height} pixels are too thin to be cut to {size} x {size}"
        )
    pixels = np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def read_picture(
    path: Path, fit: Callable[[Image.Image], _T], changes: list[str] | None = None
) -> _T:
    """Decode a picture, its first frame where there are several, and return what `fit` makes of it.

    Raises: DataError naming a file that is no whole image, or has more pixels than Pillow allows.
    """
    with reading(path, "image"), Image.open(path, formats=image_formats()) as image:
        with _ONE_BIG if image.width * image.height > _BIG_PIXELS else nullcontext():
            return fit(plain_image(image, changes))


def read_image(path: Path, size: int, changes: list[str] | None = None) -> np.ndarray:
    """Return an image's central square, (size, size, 3) uint8.

    Raises: DataError naming a file that is no whole image.
    """
    return read_picture(path, lambda image: center_crop(image, size), changes)
