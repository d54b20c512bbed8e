"""What samples are held against: statistics that a file states, or those of its images.

Letters: N images, d features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.checkpoint.manifest import checksum
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.evaluation.features import Extractor
from promoe_ds.evaluation.frechet import Gaussian
from promoe_ds.evaluation.sources import FolderImages, NpzImages, npz_array
from promoe_ds.evaluation.summary import summarise


@dataclass(frozen=True, kw_only=True)
class OpenReference:
    """A reference that was opened; nothing of it is computed yet."""

    path: Path
    pool: Gaussian | None
    spatial: Gaussian | None
    images: NpzImages | FolderImages | None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of a reference, and its images' features where they were asked for."""

    pool: Gaussian
    spatial: Gaussian | None
    features_Nd: np.ndarray | None
    description: dict[str, Any]


def open_reference(path: Path, *, size: int, channels: int) -> OpenReference:
    """Open a reference and see what it holds.

    Args:
        size, channels: of the samples; images of a folder are cropped to them.
    Raises: DataError if it holds neither statistics, as ADM states them, nor images, or what it states is no Gaussian.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        return OpenReference(path=path, pool=None, spatial=None, images=FolderImages(path, size, channels))
    pool, spatial = _stated(path, "mu", "sigma"), _stated(path, "mu_s", "sigma_s")
    images = NpzImages(path) if npz_array(path, "arr_0") is not None else None
    if pool is None and images is None:
        raise DataError(f"{path}: holds neither mu and sigma nor images (arr_0)")
    return OpenReference(path=path, pool=pool, spatial=None if pool is None else spatial, images=images)


def read_reference(
    opened: OpenReference, extractor: Extractor, team: DistributedContext, *, batch_size: int, keep: bool
) -> Reference:
    """Return the statistics that a reference states, as ADM does, or those of its images; and the images' features if `keep`.

    All ranks call this together.
    """
    stated = opened.pool is not None
    description: dict[str, Any] = {"path": str(opened.path), "statistics": "as stated" if stated else "computed from its images"}
    if not opened.path.is_dir():
        description["checksum"] = team.on_main(lambda: f"xxh3_64:{checksum(opened.path)}")
    pool, spatial, features_Nd = opened.pool, opened.spatial, None
    if not stated or (keep and opened.images is not None):
        found = summarise(opened.images, extractor, team, batch_size=batch_size, keep=keep)
        description |= {"images": len(opened.images), "pixels": found.checksum}
        features_Nd = found.features_Nd
        if not stated:
            pool, spatial = found.pool, found.spatial
    return Reference(pool=pool, spatial=spatial, features_Nd=features_Nd, description=description)


def check_fits(
    opened: OpenReference, extractor: Extractor, *, size: int, channels: int, need_images: bool
) -> int:
    """Compare what a reference holds with samples of `size` pixels a side and `channels`.

    Args:
        need_images: whether its images are used even where it states statistics.
    Returns: the number of features that the extractor gives for the samples.
    Raises: DataError if the reference is another network's, of another size, or of channels that
        the extractor cannot compare.
    """
    features, name = extractor.probe(size, channels).pool.shape[1], extractor.identity["name"]
    if opened.pool is not None and len(opened.pool.mean) != features:
        raise DataError(
            f"{opened.path}: mu has {len(opened.pool.mean)} features, the extractor {name} "
            f"{features}: they are another network's"
        )
    if (images := opened.images) is None or not (need_images or opened.pool is None):
        return features
    if images.height != size:
        raise DataError(
            f"{opened.path}: images of {images.height} pixels a side, the samples have {size}: take "
            "a reference of that size, or a folder of its images, which is cropped to it"
        )
    if extractor.probe(images.height, images.channels).pool.shape[1] != features:
        raise DataError(
            f"{opened.path}: images of {images.channels} channels, the samples have {channels}: the "
            f"extractor {name} cannot compare them"
        )
    return features


def save_statistics(path: Path, pool: Gaussian, spatial: Gaussian | None) -> None:
    """Write statistics as a reference: `mu`, `sigma`, and `mu_s`, `sigma_s` where there are any."""
    arrays: dict[str, Any] = {"mu": pool.mean, "sigma": pool.covariance}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    try:
        with path.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise ConfigError(f"--save-reference {path}: {error}") from None


def _stated(path: Path, mean_name: str, covariance_name: str) -> Gaussian | None:
    mean, covariance = npz_array(path, mean_name), npz_array(path, covariance_name)
    if mean is None and covariance is None:
        return None
    if mean is None or covariance is None:
        raise DataError(f"{path}: holds one of {mean_name} and {covariance_name}: a reference needs both")
    for name, values in ((mean_name, mean), (covariance_name, covariance)):
        if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            raise DataError(f"{path}: {name} ({values.dtype}) is not all finite numbers: make the reference anew")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(f"{path}: {mean_name} {mean.shape} and {covariance_name} {covariance.shape} do not fit each other")
    return Gaussian(np.array(mean, dtype=np.float64), np.array(covariance, dtype=np.float64))
