"""FID, sFID, Inception Score, precision and recall with ADM's protocol, on one process or many."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promoe_ds.data.vae import TF32
from promoe_ds.distributed.team import Team
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.evaluation.features import Extractor, load_extractor
from promoe_ds.evaluation.frechet import Gaussian, frechet_distance, warn_of_few
from promoe_ds.evaluation.precision_recall import NEIGHBOURS, precision_recall
from promoe_ds.evaluation.reference import (
    OpenReference,
    Reference,
    check_fits,
    open_reference,
    read_reference,
    save_statistics,
)
from promoe_ds.evaluation.sources import FolderImages, NpzImages, open_samples
from promoe_ds.evaluation.statistics import InceptionScore
from promoe_ds.evaluation.summary import Summary, summarise
from promoe_ds.files import json_text
from promoe_ds.versions import device_name, versions_of

METRICS = ("fid", "sfid", "is", "precision", "recall")
_MANIFOLD = {"precision", "recall"}


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """What to judge, and how."""

    samples: Path
    reference: Path | None
    metrics: tuple[str, ...] = METRICS
    extractor: str = "inception"
    batch_size: int = 64
    save_reference: Path | None = None
    half_precision_manifold: bool = False


def evaluate(request: EvaluateRequest, team: Team) -> dict[str, Any]:
    """Judge samples; all ranks call this together. Return the figures and all that makes them comparable.

    Whatever can be wrong with the request is found before the first batch.
    Raises: ConfigError for metrics that the extractor or the reference cannot give; DataError for files.
    """
    _check_request(request, team)
    samples, settings = open_samples(request.samples)
    opened = None if request.reference is None else open_reference(request.reference, size=samples.height,
                                                                   channels=samples.channels)
    extractor = load_extractor(request.extractor, team.device)
    _check_possible(request, samples, opened, extractor, team)
    wants_manifold = bool(_MANIFOLD & set(request.metrics))
    found = summarise(samples, extractor, team, batch_size=request.batch_size, keep=wants_manifold,
                      want_score="is" in request.metrics)
    figures, reference = {}, None
    if opened is not None:
        reference = read_reference(opened, extractor, team, batch_size=request.batch_size, keep=wants_manifold)
        figures = _compare(found, reference, request, team)
    if "is" in request.metrics:
        figures["is"] = found.score
    if request.save_reference is not None and team.is_main:
        save_statistics(request.save_reference, reference.pool, reference.spatial)
    return {
        "metrics": {name: figures[name] for name in METRICS if name in figures},
        "samples": {"path": str(request.samples), "count": len(samples), "size": samples.height, "pixels": found.checksum,
                    "settings": settings},
        "reference": None if reference is None else reference.description, "extractor": extractor.identity,
        "protocol": {"statistics": "float64, unbiased covariance", "inception_score_split": InceptionScore.SPLIT,
                     "neighbours": NEIGHBOURS, "processes": team.world_size,
                     "distances": "float16 where finite" if request.half_precision_manifold else "float64",
                     "batch_size": request.batch_size, "device": device_name(team.device), "tf32": TF32},
        "versions": versions_of("numpy", "scipy", "torch-fidelity", "pillow")}


def check_target(path: Path, flag: str) -> None:
    """See whether a file can be written.

    Raises: ConfigError if not.
    """
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a folder: name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: there is no folder {path.parent}: make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag} {path}: must not be written: choose another place")


def write_metrics(path: Path, figures: dict[str, Any]) -> None:
    """Write `metrics.json`."""
    try:
        path.write_text(json_text(figures, indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path}: {error}") from None


def _check_request(request: EvaluateRequest, team: Team) -> None:
    wrong = [name for name in request.metrics if name not in METRICS]
    if wrong or not request.metrics:
        raise ConfigError(f"--metrics {','.join(request.metrics)}: choose from {','.join(METRICS)}")
    if request.reference is None and set(request.metrics) != {"is"}:
        raise ConfigError("--reference is needed for all metrics but is")
    if request.save_reference is not None:
        if request.reference is None:
            raise ConfigError(f"--save-reference {request.save_reference}: there is no --reference whose statistics to save")
        team.on_main(lambda: check_target(request.save_reference, "--save-reference"))


def _check_possible(request: EvaluateRequest, samples: NpzImages | FolderImages, opened: OpenReference | None,
                    extractor: Extractor, team: Team) -> None:
    """Hold the metrics against what the extractor returns for a blank image, and against what the reference holds."""
    probe = extractor.probe(samples.height, samples.channels)
    if "sfid" in request.metrics and probe.spatial is None:
        raise ConfigError(f"--metrics sfid: extractor {request.extractor} returns no spatial features")
    if "is" in request.metrics and probe.probabilities is None:
        raise ConfigError(f"--metrics is: extractor {request.extractor} returns no logits")
    if opened is None:
        return
    features = check_fits(opened, extractor, size=samples.height, channels=samples.channels,
                          need_images=bool(_MANIFOLD & set(request.metrics)))
    if {"fid", "sfid"} & set(request.metrics) and team.is_main:
        warn_of_few(request.samples, len(samples), features)
        if opened.pool is None:
            warn_of_few(opened.path, len(opened.images), features)
    if "sfid" in request.metrics and opened.pool is not None:
        if opened.spatial is None:
            raise ConfigError(f"--metrics sfid: {opened.path} states mu and sigma, but neither mu_s nor sigma_s")
        if len(opened.spatial.mean) != probe.spatial.shape[1]:
            raise DataError(f"{opened.path}: mu_s has {len(opened.spatial.mean)} features, the extractor {request.extractor} "
                            f"{probe.spatial.shape[1]} for images of {samples.height} pixels: they are another network's")
    if _MANIFOLD & set(request.metrics):
        if opened.images is None:
            raise ConfigError(f"--metrics precision, recall: {opened.path} holds no images (arr_0)")
        if (smallest := min(len(samples), len(opened.images))) <= NEIGHBOURS:
            raise ConfigError(f"--metrics precision, recall: need more than {NEIGHBOURS} images on both sides, got {smallest}")


def _compare(found: Summary, reference: Reference, request: EvaluateRequest, team: Team) -> dict[str, float]:
    figures: dict[str, float] = {}
    if "fid" in request.metrics:
        figures["fid"] = _distance(found.pool, reference.pool, "fid")
    if "sfid" in request.metrics:
        figures["sfid"] = _distance(found.spatial, reference.spatial, "sfid")
    if _MANIFOLD & set(request.metrics):
        precision, recall = precision_recall(reference.features_Nd, found.features_Nd, team,
                                             half=request.half_precision_manifold)
        figures |= {name: value for name, value in (("precision", precision), ("recall", recall)) if name in request.metrics}
    return figures


def _distance(samples: Gaussian, reference: Gaussian, name: str) -> float:
    distance = frechet_distance(samples, reference)
    if distance != distance:  # NaN
        raise DataError(f"--metrics {name}: the statistics are too large for a finite distance: scale the extractor's features")
    return distance
