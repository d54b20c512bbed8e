"""Images on disk: the uint8 rule, PNG folders, ADM's npz, grids.

Letters: N images, H, W size, C colour channels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from promoe_ds.config import RunConfig
from promoe_ds.data.reading import reading
from promoe_ds.errors import DataError


def draws_pixels(config: RunConfig) -> bool:
    """Whether a model draws images as they are: of one or three channels, and not trained on latents, which may have as many."""
    return config.model.in_channels in (1, 3) and config.data.dataset not in ("latents", "images")


def to_uint8(images_NCHW: np.ndarray) -> np.ndarray:
    """Map [-1, 1] to uint8: clamp(127.5 * x + 128, 0, 255), truncated, as published; returns (N, H, W, C)."""
    return np.clip(127.5 * images_NCHW + 128.0, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def image_name(index: int, label: int) -> str:
    """Return the published file name, e.g. img000123_class45.png."""
    return f"img{index:06d}_class{label}.png"


def save_png(path: Path, image_HWC: np.ndarray) -> None:
    """Write one uint8 image, grey for a single channel."""
    Image.fromarray(image_HWC.squeeze(-1) if image_HWC.shape[-1] == 1 else image_HWC).save(path, format="PNG")


def make_grid(images_NHWC: np.ndarray, labels: np.ndarray, *, columns: int, zoom: int, gap: int = 2) -> np.ndarray:
    """Lay out up to `columns` images of each class, one row a class in ascending order; returns (H, W, C)."""
    classes = sorted(set(labels.tolist()))
    height, width, channels = images_NHWC.shape[1:]
    cell_h, cell_w = height * zoom + gap, width * zoom + gap
    grid = np.full((len(classes) * cell_h + gap, columns * cell_w + gap, channels), 255, dtype=np.uint8)
    for row, label in enumerate(classes):
        for column, image in enumerate(images_NHWC[labels == label][:columns]):
            top, left = row * cell_h + gap, column * cell_w + gap
            grid[top:top + height * zoom, left:left + width * zoom] = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return grid


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, H, W, C) uint8 and labels (N,) of a samples.npz or of the folder that holds it.

    Raises: DataError if it is missing or no such file.
    """
    file = path / "samples.npz" if path.is_dir() else path
    with reading(file, "npz of samples with labels"), np.load(file, allow_pickle=False) as data:
        images, labels = data["arr_0"], data["labels"]
    if images.dtype != np.uint8 or images.ndim != 4 or labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(f"{file}: arr_0 is {images.dtype} {images.shape} and labels {labels.dtype} {labels.shape}, expected uint8 "
                        "(N, H, W, C) and integers (N,)")
    return images, labels
