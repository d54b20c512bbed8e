"""What samples are compared with: statistics that a file states, or those of its images.

Letters: N images, d features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from promoe_ds.checkpoint.manifest import checksum
from promoe_ds.config.model import size_name
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.evaluation.features import Extractor
from promoe_ds.evaluation.frechet import Gaussian
from promoe_ds.evaluation.sources import FolderImages, NpzImages, npz_array
from promoe_ds.evaluation.statistics import RunningGaussian, Wanted, summarise
from promoe_ds.files import json_text, replacing

#: The names that ADM gives mean and covariance, by output of the extractor.
_STATED = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference that was opened; nothing is computed yet.

    stated: its Gaussians by output, or empty; extractor: whose they are, where the file says it.
    """

    path: Path
    stated: dict[str, Gaussian]
    images: NpzImages | FolderImages | None
    extractor: dict[str, Any] | None = None

    def description(self) -> dict[str, Any]:
        """Return what a report says of it."""
        how = "as stated" if self.stated else "computed from its images"
        digest = {} if self.path.is_dir() else {"checksum": f"xxh3_64:{checksum(self.path)}"}
        return {"path": str(self.path), "statistics": how, **digest}

    def check_stated(self, output: str, width: int | None, flag: str) -> int:
        """Compare a stated Gaussian with an output's number of features; return its own.

        Raises: ConfigError if it states none; DataError if it is of another size.
        """
        mean, covariance = _STATED[output]
        if output not in self.stated:
            raise ConfigError(
                f"{flag}: {self.path} states no {mean} and {covariance}: leave the metric out, or"
                " make a reference by --save-reference"
            )
        if (found := len(self.stated[output].mean)) != width and width is not None:
            raise DataError(
                f"{self.path}: {mean} has {found} features, the extractor {width}: they are "
                "another network's, or of images of another size"
            )
        return found

    def check_extractor(self, other: Mapping[str, Any] | None, whose: str) -> None:
        """Compare the network that gave the statistics with another, as far as both are known.

        Raises: DataError if weights or files differ.
        """
        said, other = self.extractor or {}, other or {}
        known = said.keys() & other.keys() & {"weights", "checksum"}
        if any(said[key] != other[key] for key in known):
            raise DataError(
                f"{self.path}: its statistics are of another extractor than {whose}: make both"
                " with one"
            )


def open_reference(
    path: Path, *, size: int | tuple[int, int] | None = None, channels: int | None = None
) -> Reference:
    """Open a reference and see what it holds.

    Args:
        size, channels: of the samples; images of a folder are cropped to them. See `FolderImages`.
    Raises: DataError if it holds neither statistics, as ADM states them, nor images, or what it
        states is no Gaussian.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        return Reference(path=path, stated={}, images=FolderImages(path, size, channels))
    found = {output: _gaussian(path, *names) for output, names in _STATED.items()}
    stated = {} if found["pool"] is None else {k: v for k, v in found.items() if v is not None}
    images = NpzImages(path) if npz_array(path, "arr_0") is not None else None
    if not stated and images is None:
        raise DataError(f"{path}: holds neither mu and sigma nor images (arr_0)")
    return Reference(path=path, stated=stated, images=images, extractor=_said_extractor(path))


def open_statistics(path: Path) -> Reference | None:
    """Open a file that states statistics and holds no images; None for any other."""
    if not path.is_file() or npz_array(path, "mu") is None or npz_array(path, "arr_0") is not None:
        return None
    return open_reference(path)


def gaussians_of(extractor: Extractor, images: NpzImages | FolderImages) -> list[Wanted]:
    """Return the Gaussians that an extractor gives of some images."""
    probe = extractor.probe(images.size, images.channels)
    outputs = [output for output in _STATED if getattr(probe, output) is not None]
    return [(output, RunningGaussian) for output in outputs]


def read_reference(
    reference: Reference,
    extractor: Extractor,
    team: DistributedContext,
    *,
    batch_size: int,
    wanted: Collection[Wanted],
) -> tuple[dict[Wanted, Any], dict[str, Any]]:
    """Return what is wanted: as the reference states it, as ADM does, or else of its images; and
    what the report says of it. All ranks call this together."""
    description = team.on_main(reference.description)
    known: dict[Wanted, Any] = {
        (output, RunningGaussian): gaussian for output, gaussian in reference.stated.items()
    }
    if rest := [each for each in wanted if each not in known]:
        found, pixels = summarise(
            reference.images, extractor, team, batch_size=batch_size, wanted=rest
        )
        known |= found
        description |= {"images": len(reference.images), "pixels": pixels}
    return known, description


def check_fits(
    reference: Reference,
    extractor: Extractor,
    *,
    size: int | tuple[int, int],
    channels: int,
    need_images: bool,
) -> int:
    """Compare what a reference holds with samples of `size` pixels and `channels`.

    Args:
        need_images: whether its images are used even where it states statistics.
    Returns: the number of features that the extractor gives for the samples.
    Raises: DataError if the reference is another network's, of another size, or of channels that
        the extractor cannot compare.
    """
    features, name = extractor.probe(size, channels).pool.shape[1], extractor.identity["name"]
    if reference.stated:
        reference.check_stated("pool", features, name)
        reference.check_extractor(extractor.identity, name)
    if (images := reference.images) is None or not (need_images or not reference.stated):
        return features
    if images.size != size:
        raise DataError(
            f"{reference.path}: images of {size_name(images.size)} pixels, the samples have"
            f" {size_name(size)}: take a reference of that size, or a folder of its images, which"
            " is cropped to it"
        )
    if extractor.probe(images.size, images.channels).pool.shape[1] != features:
        raise DataError(
            f"{reference.path}: images of {images.channels} channels, the samples have {channels}: "
            f"the extractor {name} cannot compare them"
        )
    return features


def save_statistics(
    path: Path, known: dict[Wanted, Any], extractor: Extractor, flag: str, count: int = 0
) -> None:
    """Write the Gaussians among statistics as a reference: `mu`, `sigma`; `mu_s`, `sigma_s`; whose
    they are as JSON in `extractor`, and of how many images, 0 if that is not known.

    Raises: ConfigError, after `flag`, if it cannot be written.
    """
    arrays: dict[str, Any] = {
        "extractor": np.array(json_text(extractor.identity)),
        "count": np.array(count),
    }
    for output, (mean, covariance) in _STATED.items():
        if (gaussian := known.get((output, RunningGaussian))) is not None:
            arrays |= {mean: gaussian.mean, covariance: gaussian.covariance}
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error}") from None


def save_features(
    path: Path, images: NpzImages, extractor: Extractor, team: DistributedContext, batch_size: int
) -> None:
    """Write the statistics of samples' features, of all that the extractor returns, unless the file
    holds them; all ranks call this together.

    Raises: ConfigError if they cannot be written; DataError as `summarise`.
    """
    if team.on_main(lambda: _holds_features(path, extractor, len(images))):
        return
    wanted = gaussians_of(extractor, images)
    known, _ = summarise(images, extractor, team, batch_size=batch_size, wanted=wanted)
    team.on_main(lambda: save_statistics(path, known, extractor, "--features", len(images)))


def _holds_features(path: Path, extractor: Extractor, count: int) -> bool:
    """Whether a file has the statistics of so many of a folder's samples, by this extractor; a
    damaged one has none.
    """
    with suppress(DataError):
        is_of_all = path.is_file() and np.array_equal(npz_array(path, "count"), count)
        return is_of_all and _said_extractor(path) == extractor.identity
    return False


def _said_extractor(path: Path) -> dict[str, Any] | None:
    """Return what a file says of the extractor that its statistics are of, as `save_statistics`
    writes it; None where it says nothing, or another program's words.
    """
    said = npz_array(path, "extractor")
    if said is not None and not said.shape and said.dtype.kind == "U":
        with suppress(msgspec.MsgspecError, UnicodeError):
            return msgspec.json.decode(str(said), type=dict)
    return None


def _gaussian(path: Path, mean_name: str, covariance_name: str) -> Gaussian | None:
    mean, covariance = npz_array(path, mean_name), npz_array(path, covariance_name)
    if mean is None and covariance is None:
        return None
    if mean is None or covariance is None:
        raise DataError(
            f"{path}: holds one of {mean_name} and {covariance_name}: a reference needs both"
        )
    for name, values in ((mean_name, mean), (covariance_name, covariance)):
        if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            raise DataError(
                f"{path}: {name} ({values.dtype}) is not all finite numbers: make it again"
            )
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(
            f"{path}: {mean_name} {mean.shape} and {covariance_name} {covariance.shape} do not fit "
            "each other"
        )
    return Gaussian(np.array(mean, np.float64), np.array(covariance, np.float64))
