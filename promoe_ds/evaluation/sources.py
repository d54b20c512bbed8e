"""Images to evaluate: ADM's npz, or a folder of image files.

Letters: N images, H, W size, C colour channels.
"""

from __future__ import annotations

import math
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from promoe_ds.config.model import read_size, sides
from promoe_ds.data.images import center_crop, read_picture
from promoe_ds.data.listing import FileList
from promoe_ds.data.reading import reading, shown
from promoe_ds.data.trees import refuse_splits
from promoe_ds.errors import DataError

_LOCAL_HEADER = 30


class NpzImages:
    """`arr_0` of an npz; mapped where it is stored uncompressed, as numpy and ADM write it."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises: DataError if it holds no uint8 images, channels last, grey or in colour.
        """
        self.path = path
        images = npz_array(path, "arr_0")
        fits = images is not None and images.dtype == np.uint8 and images.ndim == 4 and images.size
        if not fits or images.shape[3] not in (1, 3):
            found = "no arr_0" if images is None else f"{images.dtype} {images.shape}"
            raise DataError(
                f"{path}: {found}, expected uint8 images (N, H, W, C) of 1 or 3 channels as arr_0"
                f"{_remedy(images)}"
            )
        self._images, self.channels = images, images.shape[3]
        self.size = read_size(images.shape[1:3])

    def __len__(self) -> int:
        return len(self._images)

    def keep(self, count: int) -> None:
        """Leave the first images only."""
        self._images = self._images[:count]

    def read(self, rows: range) -> np.ndarray:
        """Return images (n, H, W, C) uint8."""
        return np.array(self._images[rows.start : rows.stop])


class FolderImages:
    """Image files at any depth, in the order of their names.

    Those of another size are cropped as ADM does. Where colour is wanted, grey files count as
    colour; where grey is wanted, files in colour are refused.
    """

    def __init__(
        self,
        path: Path,
        size: int | tuple[int, int] | None = None,
        channels: int | None = None,
    ) -> None:
        """List the folder.

        Args:
            size: side in pixels, or (H, W), of what is read; that of the first file if left out,
                which all must share then.
            channels: 1 or 3; those of the first file if left out.
        Raises: DataError if it holds no image or splits of a data set.
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
        self.size = size or read_size((height, width))
        self.channels = channels or (1 if mode == "L" else 3)

    def __len__(self) -> int:
        return len(self._files)

    def keep(self, count: int) -> None:
        """Leave the first images only."""
        self._files = self._files[:count]

    def read(self, rows: range) -> np.ndarray:
        """Return images (n, H, W, C) uint8.

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
        height, width = sides(self.size)
        if image.size == (width, height):
            pixels = np.asarray(image.convert("RGB"))
        elif self._crop:
            pixels = center_crop(image, self.size)
        else:
            raise DataError(
                f"{shown(file)}: {image.width} x {image.height} pixels, expected {width} x {height}"
                f" as {shown(self._files[0])}"
            )
        return pixels[:, :, : self.channels]


def _remedy(array: np.ndarray | None) -> str:
    if array is None or array.ndim != 4:
        return ""
    if array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):
        return ": the channels come first, transpose them with arr_0.transpose(0, 2, 3, 1)"
    if array.shape[3] == 4:
        return ": leave the fourth channel out"
    return "" if array.dtype == np.uint8 else ": scale them to 0 ... 255 and convert them to uint8"


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
