"""Pictures from files: one decoder, and one rule for each colour mode, wherever they are read.

Letters: H, W size in pixels, C colour channels.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from promoe_ds.config.model import sides
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


@dataclass(frozen=True)
class Blob:
    """A file inside of another one: what messages call it, and what reads its bytes."""

    path: Path
    content: Callable[[], bytes]


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


def center_crop(image: Image.Image, size: int | tuple[int, int]) -> np.ndarray:
    """Return the centre of an image, (H, W, 3) uint8.

    Source: ADM (Dhariwal & Nichol, 2021), the published code the same for squares: halve by box
    filter while both sides are at least twice too large, then bicubic until the image just covers
    what is wanted, then cut.
    Args:
        size: the side of a square, or (H, W).
    Raises: ValueError for one so thin that it would not fit in memory once enlarged.
    """
    image, (high, wide) = image.convert("RGB"), sides(size)
    while image.width >= 2 * wide and image.height >= 2 * high:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(wide / image.width, high / image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > _MAX_ENLARGED:
        raise ValueError(
            f"{image.width} x {image.height} pixels are too thin to be cut to {wide} x {high}"
        )
    pixels = np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))
    top, left = (height - high) // 2, (width - wide) // 2
    return pixels[top : top + high, left : left + wide]


@contextmanager
def _opened(file: Path | Blob) -> Iterator[Image.Image]:
    with reading(file.path if isinstance(file, Blob) else file, "image"):
        source = io.BytesIO(file.content()) if isinstance(file, Blob) else file
        with Image.open(source, formats=image_formats()) as image:
            yield image


def picture_size(file: Path | Blob) -> tuple[int, int]:
    """Return the height and width of a picture as it is shown, from its header.

    Raises: DataError naming a file that is no image.
    """
    with _opened(file) as image:
        tags = getattr(image, "tag_v2", {})  # of a TIFF, whose size may be as it is shown already
        width = tags.get(ExifTags.Base.ImageWidth, image.width)
        height = tags.get(ExifTags.Base.ImageLength, image.height)
        orientation = None
        with suppress(Exception):  # damaged EXIF data beside a whole picture
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        return (width, height) if orientation in range(5, 9) else (height, width)


def read_picture(
    file: Path | Blob, fit: Callable[[Image.Image], _T], changes: list[str] | None = None
) -> _T:
    """Decode a picture, its first frame where there are several, and return what `fit` makes of it.

    Raises: DataError naming a file that is no whole image, or has more pixels than Pillow allows.
    """
    with _opened(file) as image:
        with _ONE_BIG if image.width * image.height > _BIG_PIXELS else nullcontext():
            return fit(plain_image(image, changes))


def read_image(
    file: Path | Blob, size: int | tuple[int, int], changes: list[str] | None = None
) -> np.ndarray:
    """Return an image's centre, (H, W, 3) uint8: see `center_crop`.

    Raises: DataError naming a file that is no whole image.
    """
    return read_picture(file, lambda image: center_crop(image, size), changes)
