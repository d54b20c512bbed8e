"""Figures of samples with ADM's protocol, on one process or many; `METRICS` lists them.

`clip_score` apart, a new metric is an entry of `METRICS`: which statistic of which output of the
extractor it needs, and how the samples' and the reference's become a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from promoe_ds.data.reading import warn_once
from promoe_ds.data.vae import TF32
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.evaluation.clip_score import CLIP_SCORE, ClipScorer, clip_score
from promoe_ds.evaluation.features import PIXELS, Extractor, load_extractor
from promoe_ds.evaluation.frechet import Gaussian, frechet_distance, warn_of_few
from promoe_ds.evaluation.images import (
    FEATURES_FILE,
    open_samples,
    read_record,
    read_sample_prompts,
)
from promoe_ds.evaluation.precision_recall import NEIGHBOURS, share_in_manifold
from promoe_ds.evaluation.reference import (
    Reference,
    check_fits,
    gaussians_of,
    open_reference,
    open_statistics,
    read_reference,
    save_statistics,
)
from promoe_ds.evaluation.sources import FolderImages, NpzImages
from promoe_ds.evaluation.statistics import (
    AllFeatures,
    InceptionScore,
    RunningGaussian,
    Statistic,
    Wanted,
    summarise,
)
from promoe_ds.versions import device_name, versions_of

#: The extractor's outputs, as a message calls them.
_OUTPUTS = {"pool": "pooled features", "spatial": "spatial features", "probabilities": "logits"}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure."""

    #: Attribute of `Features`.
    output: str
    statistic: type[Statistic]
    #: Of the samples' statistic, the reference's (None where it needs none), the team, and whether
    #: distances may be in half precision.
    figure: Callable[[Any, Any, DistributedContext, bool], float]
    #: What it needs of the reference: statistics may be stated by a file, images may not.
    reference: Literal["", "statistics", "images"] = "statistics"

    @property
    def wanted(self) -> Wanted:
        """What to keep of the images."""
        return self.output, self.statistic


def _frechet(samples: Gaussian, real: Gaussian, team: DistributedContext, half: bool) -> float:
    return frechet_distance(samples, real)


#: By the name that `--metrics` takes, in the order of the report.
METRICS = {
    "fid": Metric(output="pool", statistic=RunningGaussian, figure=_frechet),
    "sfid": Metric(output="spatial", statistic=RunningGaussian, figure=_frechet),
    "is": Metric(
        output="probabilities",
        statistic=InceptionScore,
        figure=lambda score, real, team, half: score,
        reference="",
    ),
    "precision": Metric(
        output="pool",
        statistic=AllFeatures,
        figure=lambda samples, real, team, half: share_in_manifold(samples, real, team, half=half),
        reference="images",
    ),
    "recall": Metric(
        output="pool",
        statistic=AllFeatures,
        figure=lambda samples, real, team, half: share_in_manifold(real, samples, team, half=half),
        reference="images",
    ),
}


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """What to evaluate, and how."""

    samples: Path
    reference: Path | None
    metrics: tuple[str, ...] = tuple(METRICS)
    extractor: str = "inception"
    batch_size: int = 64
    save_reference: Path | None = None
    half_precision_manifold: bool = False
    image_size: int | tuple[int, int] | None = None
    num: int | None = None
    #: Folder or hub id of the CLIP that `clip_score` needs.
    clip: str | None = None

    @property
    def chosen(self) -> dict[str, Metric]:
        """The metrics of features that are asked for, in the order of the report."""
        return {name: metric for name, metric in METRICS.items() if name in self.metrics}


def evaluate(request: EvaluateRequest, team: DistributedContext) -> dict[str, Any]:
    """Evaluate samples; all ranks call this together. Return the figures and all that makes them
    comparable.

    Whatever can be wrong with the request is found before the first batch.
    Raises: ConfigError for metrics that the extractor or the reference cannot give; DataError for
        files.
    """
    _check_request(request)
    if (stated := open_statistics(request.samples)) is not None:
        return _evaluate_statistics(stated, request, team)
    samples, settings = open_samples(request.samples, size=request.image_size, num=request.num)
    reference = None
    if request.reference is not None:
        reference = open_reference(request.reference, size=samples.size, channels=samples.channels)
    scorer, prompts = None, []
    if CLIP_SCORE in request.metrics:
        scorer = ClipScorer(request.clip, team.device)
        prompts = read_sample_prompts(request.samples, len(samples))
    # Without metrics of features, only the checksum of the pixels is wanted.
    extractor = load_extractor(request.extractor if request.chosen else PIXELS, team.device)
    _check_possible(request, samples, reference, extractor)
    _warn_of_labels(request, settings, reference)
    chosen = request.chosen
    # Dictionaries keep an order, which all ranks share.
    wanted = dict.fromkeys(metric.wanted for metric in chosen.values())
    found, checksum = summarise(
        samples, extractor, team, batch_size=request.batch_size, wanted=wanted
    )
    known, description = _known(request, reference, extractor, team)
    half = request.half_precision_manifold
    figures = {
        name: metric.figure(found[metric.wanted], known.get(metric.wanted), team, half)
        for name, metric in chosen.items()
    }
    if scorer is not None:
        figures[CLIP_SCORE] = clip_score(
            samples, prompts, scorer, team, batch_size=request.batch_size
        )
    _check_finite(figures)
    if request.save_reference is not None and team.is_main:
        save_statistics(request.save_reference, known, extractor, "--save-reference")
    return {
        "metrics": figures,
        "samples": {
            "path": str(request.samples),
            "count": len(samples),
            "size": samples.size,
            "resized": request.image_size is not None,
            "pixels": checksum,
            "settings": settings,
        },
        "reference": description,
        "extractor": extractor.identity,
        "clip": scorer and scorer.identity,
        "protocol": _protocol(request, team),
        "versions": versions_of("numpy", "scipy", "torch-fidelity", "pillow"),
    }


def _evaluate_statistics(
    samples: Reference, request: EvaluateRequest, team: DistributedContext
) -> dict[str, Any]:
    """Evaluate samples of which a file states statistics alone; no network is needed."""
    wrong = [f"metrics {name}" for name in request.metrics if name not in ("fid", "sfid")]
    fields = ("image_size", "num", "save_reference")
    wrong += [name.replace("_", "-") for name in fields if getattr(request, name)]
    if wrong:
        raise ConfigError(
            f"--{wrong[0]}: {request.samples} states statistics alone, which give the metrics fid"
            " and sfid, of all images"
        )
    reference = open_reference(request.reference)
    reference.check_extractor(samples.extractor, str(samples.path))
    figures = {}
    for name, metric in request.chosen.items():
        width = samples.check_stated(metric.output, None, f"--metrics {name}")
        reference.check_stated(metric.output, width, f"--metrics {name}")
        pair = samples.stated[metric.output], reference.stated[metric.output]
        figures[name] = metric.figure(*pair, team, False)
    _check_finite(figures)
    is_of_job = request.samples.name == FEATURES_FILE
    settings = read_record(request.samples.parent) if is_of_job else None
    _warn_of_labels(request, settings, reference)
    return {
        "metrics": figures,
        "samples": {**samples.description(), "settings": settings},
        "reference": reference.description(),
        "extractor": samples.extractor or reference.extractor,
        "versions": versions_of("numpy", "scipy"),
    }


def _check_finite(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        if np.isnan(value):
            raise DataError(
                f"--metrics {name}: the statistics are too large for a finite figure: scale the "
                "extractor's features"
            )


def _warn_of_labels(
    request: EvaluateRequest, settings: dict[str, Any] | None, reference: Reference | None
) -> None:
    """Say where a figure is none to compare with a paper's, whose reference states statistics."""
    is_balanced = (settings or {}).get("labels") == "balanced"
    if "fid" in request.metrics and is_balanced and reference is not None and reference.stated:
        warn_once(
            "the samples' labels are balanced; the published protocol draws them at random, and its"
            " FID is about 0.1 higher: sample with --labels random to compare with a paper's row"
        )


def _known(
    request: EvaluateRequest,
    reference: Reference | None,
    extractor: Extractor,
    team: DistributedContext,
) -> tuple[dict[Wanted, Any], dict[str, Any] | None]:
    """Return the reference's statistics and its description."""
    if reference is None:
        return {}, None
    wanted = dict.fromkeys(each.wanted for each in request.chosen.values() if each.reference)
    if request.save_reference is not None and not reference.stated:
        wanted |= dict.fromkeys(gaussians_of(extractor, reference.images))
    return read_reference(reference, extractor, team, batch_size=request.batch_size, wanted=wanted)


def _protocol(request: EvaluateRequest, team: DistributedContext) -> dict[str, Any]:
    return {
        "statistics": "float64, unbiased covariance",
        "inception_score_split": InceptionScore.SPLIT,
        "neighbours": NEIGHBOURS,
        "processes": team.world_size,
        "distances": "float16 where finite" if request.half_precision_manifold else "float64",
        "batch_size": request.batch_size,
        "device": device_name(team.device),
        "tf32": TF32,
    }


def _check_request(request: EvaluateRequest) -> None:
    known = (*METRICS, CLIP_SCORE)
    if not request.metrics or set(request.metrics) - set(known):
        raise ConfigError(f"--metrics {','.join(request.metrics)}: choose from {','.join(known)}")
    if (CLIP_SCORE in request.metrics) != (request.clip is not None):
        raise ConfigError(
            f"--metrics {CLIP_SCORE} and --clip, a folder or hub id of a CLIP, need each other"
        )
    if request.reference is None:
        if needing := [name for name, metric in request.chosen.items() if metric.reference]:
            raise ConfigError(f"--reference is needed for {', '.join(needing)}")
        if request.save_reference is not None:
            raise ConfigError(
                f"--save-reference {request.save_reference}: there is no --reference whose "
                "statistics to save"
            )


def _check_possible(
    request: EvaluateRequest,
    samples: NpzImages | FolderImages,
    reference: Reference | None,
    extractor: Extractor,
) -> None:
    """Compare the metrics with what the extractor returns for a blank image and with the reference.

    Raises: ConfigError or DataError for what does not fit.
    """
    chosen = request.chosen
    if reference is not None:
        features = check_fits(
            reference,
            extractor,
            size=samples.size,
            channels=samples.channels,
            need_images=any(metric.reference == "images" for metric in chosen.values()),
        )
        if any(metric.statistic is RunningGaussian for metric in chosen.values()):
            warn_of_few(request.samples, len(samples), features)
            if not reference.stated:
                warn_of_few(reference.path, len(reference.images), features)
    probe = extractor.probe(samples.size, samples.channels)
    for name, metric in chosen.items():
        values = getattr(probe, metric.output)
        if values is None:
            raise ConfigError(
                f"--metrics {name}: extractor {request.extractor} returns no "
                f"{_OUTPUTS[metric.output]}"
            )
        if metric.reference == "statistics" and reference.stated:
            reference.check_stated(metric.output, values.shape[1], f"--metrics {name}")
        if metric.reference == "images":
            if reference.images is None:
                raise ConfigError(f"--metrics {name}: {reference.path} holds no images (arr_0)")
            if (fewest := min(len(samples), len(reference.images))) <= NEIGHBOURS:
                raise ConfigError(
                    f"--metrics {name}: needs at least {NEIGHBOURS + 1} images on both sides, got"
                    f" {fewest}"
                )
