"""ADM's crop, every colour mode, files that cannot be read."""

from __future__ import annotations

import contextlib
import io
import struct
import tempfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageOps

from promoe_ds.config.model import sides
from promoe_ds.data.images import (
    COMPOSED,
    TURNED,
    center_crop,
    picture_size,
    plain_image,
    read_image,
    read_picture,
)
from promoe_ds.data.sources.samples import SampleReader
from promoe_ds.data.trees import scan_tree
from promoe_ds.errors import DataError
from promoe_ds.evaluation.sources import FolderImages

from .made import save_images


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's description, step by step, on a list of sizes."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    factor = size / min(image.size)
    pixels = np.array(
        image.resize(tuple(round(side * factor) for side in image.size), resample=Image.BICUBIC)
    )
    y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[y : y + size, x : x + size]


@pytest.mark.parametrize("size", [(64, 48), (17, 33), (8, 8), (5, 9), (200, 16)])
def test_center_crop_equals_adms(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    cropped = center_crop(image, 8)
    assert cropped.shape == (8, 8, 3)
    assert np.array_equal(cropped, adm_center_crop(image, 8))


@pytest.mark.parametrize(
    ("image_size", "size", "corner"),
    [((20, 8), (8, 8), (0, 6)), ((4, 12), (6, 4), (3, 0)), ((9, 16), (16, 7), (0, 1))],
)
@pytest.mark.parametrize("halved", [0, 1])
def test_center_crop_of_a_rectangle_halves_both_sides_and_cuts_the_centre(
    image_size: tuple[int, int], size: tuple[int, int], corner: tuple[int, int], halved: int
) -> None:
    shape = (image_size[1] << halved, image_size[0] << halved, 3)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))
    pixels = np.array(image.resize(image_size, resample=Image.BOX))
    (top, left), (height, width) = corner, size
    expected = pixels[top : top + height, left : left + width]
    assert np.array_equal(center_crop(image, size), expected)


RAMP = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (16, 1))
GREY, COLOUR = (
    Image.fromarray(RAMP),
    Image.fromarray(np.stack([RAMP, RAMP[:, ::-1], RAMP.T], axis=-1)),
)
MUTED = COLOUR.point(lambda value: 96 + value // 4)
WIDE = RAMP.astype(np.uint16) * 257


def with_alpha(image: Image.Image, alpha: int) -> Image.Image:
    image.putalpha(alpha)
    return image


def lab() -> Image.Image:
    return ImageCms.profileToProfile(
        MUTED, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )


def palette(transparency: bytes | int | None = None) -> Image.Image:
    image = COLOUR.quantize(256)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def over_white(values: np.ndarray, alpha: int) -> np.ndarray:
    return np.rint(values.astype(float) * alpha / 255 + 255 - alpha)


PIXELS = np.asarray(COLOUR)
#: A picture of each mode, what it should look like, and by how much rounding and colour spaces may
# differ.
MODES = {
    "1": (GREY.convert("1", dither=Image.Dither.NONE), (RAMP > 127) * 255, 0),
    "L": (GREY, RAMP, 0),
    "RGB": (COLOUR, PIXELS, 0),
    "I;16": (Image.fromarray(WIDE), RAMP, 0),
    "I;16L": (Image.frombytes("I;16L", (16, 16), WIDE.astype("<u2").tobytes()), RAMP, 0),
    "I;16B": (Image.frombytes("I;16B", (16, 16), WIDE.astype(">u2").tobytes()), RAMP, 0),
    "I of 16 bits": (Image.fromarray(WIDE.astype(np.int32)), RAMP, 0),
    "I of 8 bits": (Image.fromarray(RAMP.astype(np.int32)), RAMP, 0),
    "F to 1": (Image.fromarray(RAMP.astype(np.float32) / 255), RAMP, 0),
    "F to 255": (Image.fromarray(RAMP.astype(np.float32)), RAMP, 0),
    "LA": (with_alpha(GREY.copy(), 100), over_white(RAMP, 100), 1),
    "La": (with_alpha(GREY.copy(), 100).convert("La"), over_white(RAMP, 100), 2),
    "RGBA": (with_alpha(COLOUR.copy(), 100), over_white(PIXELS, 100), 1),
    "RGBA, opaque": (with_alpha(COLOUR.copy(), 255), PIXELS, 0),
    "RGBX": (COLOUR.convert("RGBX"), PIXELS, 0),
    "RGBa": (with_alpha(COLOUR.copy(), 100).convert("RGBa"), over_white(PIXELS, 100), 2),
    "P": (palette(), PIXELS, 0),
    "P, all clear": (palette(bytes(256)), np.full_like(PIXELS, 255), 0),
    "PA": (with_alpha(palette().convert("PA"), 100), over_white(PIXELS, 100), 1),
    "CMYK": (COLOUR.convert("CMYK"), PIXELS, 1),
    "YCbCr": (COLOUR.convert("YCbCr"), PIXELS, 3),
    "HSV": (COLOUR.convert("HSV"), PIXELS, 5),
    "LAB": (lab(), np.asarray(MUTED), 3),
}


@pytest.mark.parametrize("name", MODES)
def test_plain_image_of_every_mode_shows_the_same_picture(name: str) -> None:
    image, expected, tolerance = MODES[name]
    changes: list[str] = []
    plain = plain_image(image, changes)
    assert plain.mode == ("L" if expected.ndim == 2 else "RGB") and plain.size == (16, 16)
    assert np.abs(np.asarray(plain).astype(float) - expected).max() <= tolerance
    assert changes == (
        [COMPOSED] if name in ("LA", "La", "RGBA", "RGBa", "P, all clear", "PA") else []
    )


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("I;16", "png"),
        ("I;16", "tif"),
        ("I of 16 bits", "tif"),
        ("F to 1", "tif"),
        ("LA", "png"),
        ("P, all clear", "png"),
        ("P", "gif"),
        ("RGBA", "webp"),
        ("RGBA", "png"),
        ("CMYK", "tif"),
        ("LAB", "tif"),
        ("1", "png"),
        ("RGB", "jp2"),
        ("RGB", "ppm"),
    ],
)
def test_files_look_alike_in_training_and_evaluation(
    tmp_path: Path, name: str, suffix: str
) -> None:
    image, expected, tolerance = MODES[name]
    image.save(tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    trained, judged = (
        read_image(tmp_path / f"x.{suffix}", 16),
        FolderImages(tmp_path, 16, 3).read(range(1))[0],
    )
    assert np.array_equal(trained, judged)
    expected = np.repeat(expected[..., None], 3, axis=-1) if expected.ndim == 2 else expected
    assert np.abs(trained.astype(float) - expected).max() <= max(tolerance, 1)


@pytest.mark.parametrize("values", [[-1, 5], [0, 70000], [np.nan, 1.0], [0.0, 300.0]])
def test_values_that_fit_no_range_are_refused(tmp_path: Path, values: list) -> None:
    Image.fromarray(
        np.array([values], dtype=np.int32 if isinstance(values[0], int) else np.float32)
    ).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif: not a readable image \(ValueError"):
        read_image(tmp_path / "x.tif", 8)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "L"), ("tif", "RGB"), ("jpg", "RGB"), ("png", "RGBA")]
)
def test_image_is_turned_once_as_exif_says(
    tmp_path: Path, orientation: int, suffix: str, mode: str
) -> None:
    exif, path = Image.Exif(), tmp_path / f"x.{suffix}"
    exif[ExifTags.Base.Orientation] = orientation
    COLOUR.resize((8, 16)).convert(mode).save(path, exif=exif)
    changes: list[str] = []
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = read_picture(path, np.asarray, changes)
    assert np.array_equal(
        np.broadcast_to(found.reshape(*found.shape[:2], -1), expected.shape), expected
    )
    assert (TURNED in changes) == (
        2 <= orientation <= 8 and suffix != "tif"
    )  # Pillow turns these by itself
    assert picture_size(path) == expected.shape[:2]


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: b"no image", lambda data: data[: len(data) // 2]],
    ids=["empty", "garbage", "cut off"],
)
def test_image_damaged_is_named(tmp_path: Path, damage) -> None:
    path = save_images(tmp_path, per_class=1, size=(64, 64), suffix="jpg") / "n01" / "n01_0.jpg"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"n01_0\.jpg: not a readable image"):
        read_image(path, 8)


@pytest.mark.parametrize(
    "kind",
    [
        IndexError,
        RuntimeError,
        SyntaxError,
        struct.error,
        OverflowError,
        MemoryError,
        EOFError,
        AssertionError,
        NotImplementedError,
        RecursionError,
        Image.DecompressionBombError,
    ],
)
def test_whatever_a_decoder_raises_is_an_unreadable_image(
    tmp_path: Path, monkeypatch, kind: type[Exception]
) -> None:
    GREY.save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "load", lambda image: (_ for _ in ()).throw(kind("broken")))
    monkeypatch.setattr(
        "PIL.ImageFile.ImageFile.load", lambda image: (_ for _ in ()).throw(kind("broken"))
    )
    for read in (lambda: read_image(tmp_path / "x.png", 8), lambda: FolderImages(tmp_path)):
        with pytest.raises(DataError, match=rf"x\.png: not a readable image \({kind.__name__}"):
            read()


FILES = {}
for _format in (
    "PNG",
    "GIF",
    "TIFF",
    "WEBP",
    "BMP",
    "JPEG",
    "JPEG2000",
    "AVIF",
    "TGA",
    "ICO",
    "PPM",
    "PCX",
    "SGI",
    "QOI",
    "DDS",
):
    _out = io.BytesIO()
    with contextlib.suppress(OSError, KeyError, ValueError):  # not in every build of Pillow
        COLOUR.save(_out, format=_format)
        FILES[_format] = _out.getvalue()


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6),
    st.floats(0.2, 1.0),
)
def test_any_damage_gives_a_picture_or_names_the_file(
    kind: str, changes: list, kept: float
) -> None:
    data = bytearray(FILES[kind])
    for place, value in changes:
        data[int(place * min(len(data), 400))] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.png"
        path.write_bytes(data[: int(len(data) * kept) + 1])
        try:
            assert read_image(path, 8).shape == (8, 8, 3)
        except DataError as error:
            assert "x.png" in str(error)


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(MODES)),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from((1, 8, 24, (8, 24), (5, 3))),
)
def test_any_mode_and_size_gives_what_is_wanted(
    name: str, width: int, height: int, size: int | tuple[int, int]
) -> None:
    image = MODES[name][0]
    image = image.crop((0, 0, width, height)) if "16" in name else image.resize((width, height))
    assert center_crop(plain_image(image), size).shape == (*sides(size), 3)


@pytest.mark.parametrize("size", [(1, 6000), (6000, 1), (60_000, 2)])
def test_image_too_thin_is_refused_before_it_takes_memory(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    Image.new("L", size).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png: .* too thin"):
        read_image(tmp_path / "x.png", 256)
    assert read_image(tmp_path / "x.png", 4).shape == (4, 4, 3)


def test_image_of_too_many_pixels_and_postscript_are_refused_unread(tmp_path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "huge.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 8) + b"IDAT" + bytes(12)
    )
    (tmp_path / "script.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(DataError, match=r"huge\.png: .*DecompressionBomb"):
        read_image(tmp_path / "huge.png", 8)
    with pytest.raises(DataError, match=r"script\.jpg: .*UnidentifiedImage"):
        read_image(tmp_path / "script.jpg", 8)


def test_unreadable_files_are_counted_once_up_to_the_limit(tmp_path: Path) -> None:
    tree = scan_tree(save_images(tmp_path, per_class=1))
    for name in tree.names:
        (tmp_path / name).write_bytes(b"broken")
    reader = SampleReader(
        tree, partial(read_image, size=8), 2, max_corrupt=2, setting="data.max_corrupt"
    )
    assert reader.read([0, 1, 0]) == reader.read([1]) == {}
    with pytest.raises(DataError, match=r"n03_0\.png: .*3 unreadable .*data\.max_corrupt=2"):
        reader.read([0, 2])
