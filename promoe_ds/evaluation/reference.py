"""What samples are compared with: statistics that a file states, or those of its images.

Letters: N images, d features.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """A reference that was opened; nothing is computed yet. `stated` is by output, or empty."""

    path: Path
    stated: dict[str, Gaussian]
    images: NpzImages | FolderImages | None

    def gaussians(self, extractor: Extractor) -> list[str]:
        """Return the outputs whose Gaussians it states, or that its images give."""
        if self.stated:
            return list(self.stated)
        probe = extractor.probe(self.images.size, self.images.channels)
        return [output for output in _STATED if getattr(probe, output) is not None]

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
                f"{flag}: {self.path} states mu and sigma, but neither {mean} nor {covariance}"
            )
        if (found := len(self.stated[output].mean)) != width and width is not None:
            raise DataError(
                f"{self.path}: {mean} has {found} features, the extractor {width}: they are "
                "another network's, or of images of another size"
            )
        return found


def open_reference(path: Path, *, size: int | tuple[int, int], channels: int) -> Reference:
    """Open a reference and see what it holds.

    Args:
        size, channels: of the samples; images of a folder are cropped to them.
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
    return Reference(path=path, stated=stated, images=images)


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
    arrays: dict[str, Any] = {"extractor": _identity_array(extractor), "count": np.array(count)}
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
    probe = extractor.probe(images.size, images.channels)
    outputs = [output for output in _STATED if getattr(probe, output) is not None]
    wanted = [(output, RunningGaussian) for output in outputs]
    known, _ = summarise(images, extractor, team, batch_size=batch_size, wanted=wanted)
    team.on_main(lambda: save_statistics(path, known, extractor, "--features", len(images)))


def _holds_features(path: Path, extractor: Extractor, count: int) -> bool:
    """Whether a file has the statistics of so many of a folder's samples, by this extractor."""
    if not path.is_file():
        return False
    found, identity = npz_array(path, "count"), npz_array(path, "extractor")
    return np.array_equal(found, count) and np.array_equal(identity, _identity_array(extractor))


def _identity_array(extractor: Extractor) -> np.ndarray:
    return np.array(json_text(extractor.identity))


def open_statistics(path: Path, *, alone: bool = True) -> Reference | None:
    """Open a file that states statistics; None if it states none, or is to state them `alone` and
    holds images, too.
    """
    if not path.is_file() or npz_array(path, "mu") is None:
        return None
    if alone and npz_array(path, "arr_0") is not None:
        return None
    return open_reference(path, size=0, channels=0)  # of a folder's images


def compare_statistics(
    samples: Reference, path: Path, outputs: Mapping[str, str]
) -> tuple[dict[str, tuple[Gaussian, Gaussian]], dict[str, Any], Reference]:
    """Find the samples' and the reference's Gaussians, where both are stated.

    Args:
        path: of the reference; outputs: metric -> output of an extractor.
    Returns: by metric, the samples' and the reference's; what a report says of both; the reference.
    Raises: ConfigError if the reference states none; DataError if they are of two networks.
    """
    if (reference := open_statistics(path, alone=False)) is None:
        raise ConfigError(
            f"--reference {path}: states no mu and sigma, as {samples.path} does: make them by"
            " --save-reference"
        )
    pairs = {}
    for name, output in outputs.items():
        width = samples.check_stated(output, None, f"--metrics {name}")
        reference.check_stated(output, width, f"--metrics {name}")
        pairs[name] = samples.stated[output], reference.stated[output]
    said = [text for each in (samples, reference) if (text := _said_extractor(each))]
    if len(set(said)) > 1:
        raise DataError(
            f"{path}: its statistics are of another extractor than those of {samples.path}: make"
            " both with one"
        )
    report = {
        "samples": samples.description(),
        "reference": reference.description(),
        "extractor": json.loads(said[0]) if said else None,
    }
    return pairs, report, reference


def _said_extractor(reference: Reference) -> str:
    said = npz_array(reference.path, "extractor")
    return "" if said is None or said.shape or said.dtype.kind != "U" else str(said)


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
