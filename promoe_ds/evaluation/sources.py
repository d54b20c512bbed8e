"""Images to be judged: ADM's npz, or a folder of image files.

Letters: N images, H, W size, C colour channels.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from promoe_ds.data.images import IMAGE_SUFFIXES, UNREADABLE, center_crop
from promoe_ds.errors import DataError
from promoe_ds.evaluation.store import NPZ_FILE, SETTINGS_FILE

_LOCAL_HEADER = 30


class NpzImages:
    """`arr_0` of an npz; mapped where it is stored uncompressed, as numpy and ADM write it, else read whole."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises: DataError if it holds no uint8 images.
        """
        self.path = path
        self._images = npz_array(path, "arr_0")
        if self._images is None or self._images.dtype != np.uint8 or self._images.ndim != 4:
            found = "no arr_0" if self._images is None else f"{self._images.dtype} {self._images.shape}"
            raise DataError(f"{path}: {found}, expected uint8 images (N, H, W, C) as arr_0")

    def __len__(self) -> int:
        return len(self._images)

    @property
    def height(self) -> int:
        """H."""
        return self._images.shape[1]

    @property
    def channels(self) -> int:
        """C."""
        return self._images.shape[3]

    def read(self, rows: range) -> np.ndarray:
        """Return images (n, H, W, C) uint8."""
        return np.array(self._images[rows.start:rows.stop])


class FolderImages:
    """Image files at any depth, in the order of their names; those of another size are cropped as ADM does.

    Where colour is wanted, grey files count as colour; where grey is wanted, files in colour are refused.
    """

    def __init__(self, path: Path, size: int | None = None, channels: int | None = None) -> None:
        """List the folder.

        Args:
            size: pixels a side of what is read; that of the first file if left out, which all must share then.
            channels: 1 or 3; those of the first file if left out.
        Raises: DataError if it holds no image, or samples of a job that did not end.
        """
        self.path = path
        self._files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.name != "grid.png")
        if not self._files:
            raise DataError(f"{path}: no image below it")
        self._crop = size is not None
        first = self._open(self._files[0])
        self.height = size or first.height
        self.channels = channels or (1 if first.mode == "L" else 3)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, rows: range) -> np.ndarray:
        """Return images (n, H, W, C) uint8.

        Raises: DataError naming a file that cannot be read, is of another size, or in colour where grey is wanted.
        """
        return np.stack([self._read(self._files[row]) for row in rows])

    def _read(self, file: Path) -> np.ndarray:
        image = self._open(file)
        if self.channels == 1 and image.mode != "L":
            raise DataError(f"{file}: is {image.mode}, expected grey (L) as the first file or the samples")
        if image.size == (self.height, self.height):
            pixels = np.asarray(image.convert("RGB"))
        elif self._crop:
            pixels = center_crop(image, self.height)
        else:
            raise DataError(f"{file}: {image.width} x {image.height} pixels, expected {self.height} a side as the first file")
        return pixels[:, :, :self.channels]

    @staticmethod
    def _open(file: Path) -> Image.Image:
        try:
            image = Image.open(file)
            image.load()
            return image
        except UNREADABLE as error:
            raise DataError(f"{file}: not a readable image ({error})") from None


def open_samples(path: Path) -> tuple[NpzImages | FolderImages, dict[str, Any] | None]:
    """Open samples; return them, and how they were drawn where their folder says so.

    Raises: DataError if there are none, or a job has not drawn all of them.
    """
    settings = _settings_beside(path)
    if path.is_dir() and (path / NPZ_FILE).is_file():
        images: NpzImages | FolderImages = NpzImages(path / NPZ_FILE)
    elif path.is_dir():
        images = FolderImages(path)
    else:
        images = NpzImages(path)
    if settings is not None and settings.get("num") != len(images):
        raise DataError(f"{path}: {len(images)} of {settings.get('num')} samples are there: run the sampling again, it goes on "
                        "where it stopped")
    return images, settings


def npz_array(path: Path, name: str) -> np.ndarray | None:
    """Return an array of an npz, mapped if possible; None if there is none of that name.

    Raises: DataError if the file cannot be read; nothing in it is ever unpickled.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                with np.load(path, allow_pickle=False) as data:
                    return data[name]
            with archive.open(info) as file:
                version = npy.read_magic(file)
                shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
                header = file.tell()
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        with path.open("rb") as file:
            file.seek(info.header_offset)
            local = file.read(_LOCAL_HEADER)
        name_bytes, extra_bytes = (int.from_bytes(local[at:at + 2], "little") for at in (26, 28))
        start = info.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes + header
        return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
    except (OSError, ValueError, zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DataError(f"{path}: not a readable npz ({error})") from None


def _settings_beside(path: Path) -> dict[str, Any] | None:
    file = (path if path.is_dir() else path.parent) / SETTINGS_FILE
    if not file.is_file() or (path.is_file() and path.name != NPZ_FILE):
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(settings, dict):
        raise DataError(f"{file}: is no record of a sampling job: remove it, or draw the samples anew")
    return settings
