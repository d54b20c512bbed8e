"""Images to be judged: ADM's npz, or a folder of image files.

Letters: N images, H, W size, C colour channels.
"""

from __future__ import annotations

import json
import math
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from promoe_ds.data.images import center_crop, read_picture
from promoe_ds.data.listing import FileList
from promoe_ds.data.reading import reading, shown
from promoe_ds.data.trees import refuse_splits
from promoe_ds.errors import DataError
from promoe_ds.evaluation.store import NPZ_FILE, SETTINGS_FILE

_LOCAL_HEADER = 30


class NpzImages:
    """`arr_0` of an npz; mapped where it is stored uncompressed, as numpy and ADM write it."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises: DataError if it holds no square uint8 images, channels last, grey or in colour.
        """
        self.path = path
        self._images = npz_array(path, "arr_0")
        expected = "expected uint8 images (N, H, H, C) of 1 or 3 channels as arr_0"
        if self._images is None:
            raise DataError(f"{path}: no arr_0, {expected}")
        shape, remedy = self._images.shape, ""
        if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
            remedy = ": the channels come first, transpose them with arr_0.transpose(0, 2, 3, 1)"
        elif len(shape) == 4 and shape[3] == 4:
            remedy = ": leave the fourth channel out"
        elif self._images.dtype != np.uint8:
            remedy = ": scale them to 0 ... 255 and convert them to uint8"
        if (
            self._images.dtype != np.uint8
            or len(shape) != 4
            or shape[1] != shape[2]
            or shape[3] not in (1, 3)
            or 0 in shape
        ):
            raise DataError(f"{path}: {self._images.dtype} {shape}, {expected}{remedy}")

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
        """Return images (n, H, H, C) uint8."""
        return np.array(self._images[rows.start : rows.stop])


class FolderImages:
    """Image files at any depth, in the order of their names.

    Those of another size are cropped as ADM does. Where colour is wanted, grey files count as
    colour; where grey is wanted, files in colour are refused.
    """

    def __init__(self, path: Path, size: int | None = None, channels: int | None = None) -> None:
        """List the folder.

        Args:
            size: pixels a side of what is read; that of the first file if left out, which all must
                share then.
            channels: 1 or 3; those of the first file if left out.
        Raises: DataError if it holds no image or splits of a data set, or its first file is not
            square where all must share its size.
        """
        self.path = path
        refuse_splits(path)
        # By folder, then by name.
        self._files = sorted(
            file for name in FileList(path).names if (file := path / name).name != "grid.png"
        )
        if not self._files:
            raise DataError(f"{path}: no image below it")
        self._crop = size is not None
        mode, (width, height) = read_picture(self._files[0], lambda image: (image.mode, image.size))
        if not self._crop and width != height:
            raise DataError(
                f"{shown(self._files[0])}: {width} x {height} pixels, expected square images"
            )
        self.height = size or height
        self.channels = channels or (1 if mode == "L" else 3)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, rows: range) -> np.ndarray:
        """Return images (n, H, H, C) uint8.

        Raises: DataError naming a file that cannot be read, is of another size, or in colour where
            grey is wanted.
        """
        return np.stack(
            [
                read_picture(file, partial(self._fit, file=file))
                for file in self._files[rows.start : rows.stop]
            ]
        )

    def _fit(self, image: Image.Image, file: Path) -> np.ndarray:
        if self.channels == 1 and image.mode != "L":
            raise DataError(
                f"{shown(file)}: is in colour, expected grey as the first file or the samples"
            )
        if image.size == (self.height, self.height):
            pixels = np.asarray(image.convert("RGB"))
        elif self._crop:
            pixels = center_crop(image, self.height)
        else:
            raise DataError(
                f"{shown(file)}: {image.width} x {image.height} pixels, expected {self.height} x "
                f"{self.height} as {shown(self._files[0])}"
            )
        return pixels[:, :, : self.channels]


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
        raise DataError(
            f"{path}: {len(images)} of {settings.get('num')} samples are there: run the sampling "
            "again, it resumes where it stopped"
        )
    return images, settings


def npz_array(path: Path, name: str) -> np.ndarray | None:
    """Return an array of an npz, mapped if possible; None if there is none of that name.

    Raises: DataError if the file cannot be read; nothing in it is ever unpickled.
    """
    with reading(path, "npz"), zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            return None
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as file:
            version = npy.read_magic(file)
            shape, fortran, dtype = (
                npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            )(file)
            header = file.tell()
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        if header + dtype.itemsize * math.prod(shape) != info.file_size:
            raise ValueError(f"{name} is {dtype} {shape}, but {info.file_size - header} bytes long")
        if info.compress_type != zipfile.ZIP_STORED or 0 in shape:
            with np.load(path, allow_pickle=False) as data:
                return data[name]
        with path.open("rb") as file:
            file.seek(info.header_offset)
            local = file.read(_LOCAL_HEADER)
        name_bytes, extra_bytes = (int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
        start = info.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes + header
        return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")


def _settings_beside(path: Path) -> dict[str, Any] | None:
    file = (path if path.is_dir() else path.parent) / SETTINGS_FILE
    if not file.is_file() or (path.is_file() and path.name != NPZ_FILE):
        return None
    with reading(file, "record of a sampling job"):
        settings = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise DataError(
            f"{file}: is no record of a sampling job: remove it, or draw the samples anew"
        )
    return settings
