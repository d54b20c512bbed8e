"""FID, sFID, Inception Score, precision and recall with ADM's protocol, on one process or many.

Letters: N images, d features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from promoe_ds.engine.manifest import checksum
from promoe_ds.engine.team import Team
from promoe_ds.engine.versions import versions_of
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.evaluation.features import Extractor, Features, load_extractor
from promoe_ds.evaluation.frechet import Gaussian, frechet_distance
from promoe_ds.evaluation.precision_recall import NEIGHBOURS, precision_recall
from promoe_ds.evaluation.sources import FolderImages, NpzImages, npz_array, open_samples
from promoe_ds.evaluation.statistics import InceptionScore, RunningGaussian

METRICS = ("fid", "sfid", "is", "precision", "recall")


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """What to judge, and how."""

    samples: Path
    reference: Path | None
    metrics: tuple[str, ...] = METRICS
    extractor: str = "inception"
    batch_size: int = 64
    save_reference: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is kept of a set of images: Gaussians of its features, its score, the features themselves where asked for."""

    pool: Gaussian
    spatial: Gaussian | None
    score: float | None
    features_Nd: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are held against."""

    pool: Gaussian
    spatial: Gaussian | None
    features_Nd: np.ndarray | None
    description: dict[str, Any]


def evaluate(request: EvaluateRequest, team: Team) -> dict[str, Any]:
    """Judge samples; all ranks call this together. Return the figures and all that makes them comparable.

    Raises: ConfigError for metrics that the extractor or the reference cannot give; DataError for files.
    """
    wrong = [name for name in request.metrics if name not in METRICS]
    if wrong or not request.metrics:
        raise ConfigError(f"--metrics {','.join(request.metrics)}: choose from {','.join(METRICS)}")
    if request.reference is None and set(request.metrics) != {"is"}:
        raise ConfigError("--reference is needed for all metrics but is")
    samples, settings = open_samples(request.samples)
    extractor = load_extractor(request.extractor, team.device)
    wants_manifold = bool({"precision", "recall"} & set(request.metrics))
    found = summarise(samples, extractor, team, batch_size=request.batch_size, keep=wants_manifold,
                      want_score="is" in request.metrics)
    if "sfid" in request.metrics and found.spatial is None:
        raise ConfigError(f"--metrics sfid: extractor {request.extractor} returns no spatial features")
    figures, reference = {}, None
    if request.reference is not None:
        reference = read_reference(request.reference, extractor, team, size=samples.height, batch_size=request.batch_size,
                                   keep=wants_manifold)
        figures = _compare(found, reference, request, team)
    if "is" in request.metrics:
        figures["is"] = found.score
    if request.save_reference is not None and reference is not None and team.is_main:
        save_statistics(request.save_reference, reference.pool, reference.spatial)
    return {
        "metrics": {name: figures[name] for name in METRICS if name in figures},
        "samples": {"path": str(request.samples), "count": len(samples), "size": samples.height, "settings": settings},
        "reference": None if reference is None else reference.description, "extractor": extractor.identity,
        "protocol": {"statistics": "float64, unbiased covariance", "inception_score_split": InceptionScore.SPLIT,
                     "neighbours": NEIGHBOURS, "distances": "float64", "processes": team.world_size},
        "versions": versions_of("numpy", "scipy", "torch-fidelity", "pillow")}


def _compare(found: Summary, reference: Reference, request: EvaluateRequest, team: Team) -> dict[str, float]:
    figures: dict[str, float] = {}
    if "fid" in request.metrics:
        figures["fid"] = _distance(found.pool, reference.pool, request.reference, "mu")
    if "sfid" in request.metrics:
        if reference.spatial is None:
            raise ConfigError(f"--metrics sfid: {request.reference} holds neither mu_s and sigma_s nor images")
        figures["sfid"] = _distance(found.spatial, reference.spatial, request.reference, "mu_s")
    if found.features_Nd is not None:
        if reference.features_Nd is None:
            raise ConfigError(f"--metrics precision, recall: {request.reference} holds no images (arr_0)")
        try:
            precision, recall = precision_recall(reference.features_Nd, found.features_Nd, team)
        except ValueError as error:
            raise ConfigError(f"--metrics precision, recall: {error}") from None
        figures |= {name: value for name, value in (("precision", precision), ("recall", recall)) if name in request.metrics}
    return figures


def summarise(images: NpzImages | FolderImages, extractor: Extractor, team: Team, *, batch_size: int, keep: bool = False,
              want_score: bool = False) -> Summary:
    """Extract features batch by batch, each rank a share of the batches, and summarise them; all call this together.

    Args:
        keep: return all features, on every rank, too: N x d x 8 bytes of memory.
        want_score: compute the Inception Score.
    Raises: ConfigError if the extractor gives no logits for it; DataError for fewer than two images.
    """
    if len(images) < 2:
        raise DataError(f"{images.path}: {len(images)} image, a covariance needs at least 2")
    pool = spatial = score = kept = None
    for rows, features in _features_of(images, extractor, team, batch_size):
        if pool is None:
            pool = RunningGaussian(features.pool.shape[1])
            spatial = None if features.spatial is None else RunningGaussian(features.spatial.shape[1])
            if want_score and features.probabilities is None:
                raise ConfigError(f"--metrics is: extractor {extractor.identity['name']} returns no logits")
            score = InceptionScore(len(images), features.probabilities.shape[1]) if want_score else None
            kept = np.zeros((len(images), features.pool.shape[1])) if keep else None
        pool.add(features.pool[:len(rows)])
        if spatial is not None:
            spatial.add(features.spatial[:len(rows)])
        if score is not None:
            score.add(rows.start, features.probabilities[:len(rows)])
        if kept is not None:
            kept[rows.start:rows.stop] = features.pool[:len(rows)]
    return Summary(pool=pool.gaussian(team), spatial=None if spatial is None else spatial.gaussian(team),
                   score=None if score is None else score.score(team), features_Nd=None if kept is None else team.sum(kept))


def _features_of(images: NpzImages | FolderImages, extractor: Extractor, team: Team,
                 batch_size: int) -> Iterator[tuple[range, Features]]:
    """Yield this rank's batches; at least one, possibly with no rows that count, so that all know the sizes."""
    batches = [range(first, min(first + batch_size, len(images))) for first in range(0, len(images), batch_size)]
    own = batches[team.rank::team.world_size]
    if not own:
        yield range(0), extractor(images.read(range(1)))
    with tqdm(total=len(images), unit="image", disable=None if team.is_main else True) as progress:
        for rows in own:
            yield rows, extractor(images.read(rows))
            progress.update(min(len(rows) * team.world_size, len(images) - progress.n))


def read_reference(path: Path, extractor: Extractor, team: Team, *, size: int, batch_size: int, keep: bool) -> Reference:
    """Read a reference: the statistics it states, as ADM does, or those of its images; and the images' features if `keep`.

    Args:
        size: of the samples; images of a folder are cropped to it.
    Raises: DataError if it holds neither, or statistics of another extractor.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    stated = None if path.is_dir() else _stated(path)
    has_images = path.is_dir() or npz_array(path, "arr_0") is not None
    if stated is None and not has_images:
        raise DataError(f"{path}: holds neither mu and sigma nor images (arr_0)")
    description: dict[str, Any] = {"path": str(path), "statistics": "computed from its images" if stated is None else "as stated"}
    if not path.is_dir():
        description["checksum"] = team.on_main(lambda: f"xxh3_64:{checksum(path)}")
    found = None
    if stated is None or (keep and has_images):
        images = FolderImages(path, size) if path.is_dir() else NpzImages(path)
        description["images"] = len(images)
        found = summarise(images, extractor, team, batch_size=batch_size, keep=keep)
    pool, spatial = stated or (found.pool, found.spatial)
    return Reference(pool=pool, spatial=spatial, features_Nd=None if found is None else found.features_Nd, description=description)


def save_statistics(path: Path, pool: Gaussian, spatial: Gaussian | None) -> None:
    """Write statistics as a reference: `mu`, `sigma`, and `mu_s`, `sigma_s` where there are any."""
    arrays = {"mu": pool.mean, "sigma": pool.covariance}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    try:
        with path.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise ConfigError(f"--save-reference {path}: {error}") from None


def write_metrics(path: Path, figures: dict[str, Any]) -> None:
    """Write `metrics.json`."""
    try:
        path.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path}: {error}") from None


def _stated(path: Path) -> tuple[Gaussian, Gaussian | None] | None:
    pairs = []
    for mean_name, covariance_name in (("mu", "sigma"), ("mu_s", "sigma_s")):
        mean, covariance = npz_array(path, mean_name), npz_array(path, covariance_name)
        if mean is None or covariance is None:
            pairs.append(None)
            continue
        mean, covariance = np.array(mean, dtype=np.float64), np.array(covariance, dtype=np.float64)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise DataError(f"{path}: {mean_name} {mean.shape} and {covariance_name} {covariance.shape} do not fit each other")
        pairs.append(Gaussian(mean, covariance))
    return None if pairs[0] is None else (pairs[0], pairs[1])


def _distance(a: Gaussian, b: Gaussian, path: Path | None, name: str) -> float:
    if a.mean.shape != b.mean.shape:
        raise DataError(f"{path}: {name} has {len(b.mean)} features, the extractor {len(a.mean)}: they are another network's")
    return frechet_distance(a, b)
