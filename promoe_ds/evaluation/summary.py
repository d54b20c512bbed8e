"""What is kept of a set of images: Gaussians of its features, its score, and its checksum.

Letters: N images, d features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from tqdm import tqdm

from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import DataError
from promoe_ds.evaluation.features import Extractor, Features
from promoe_ds.evaluation.frechet import Gaussian
from promoe_ds.evaluation.sources import FolderImages, NpzImages
from promoe_ds.evaluation.statistics import InceptionScore, RunningGaussian


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Gaussians of the features, the Inception Score and the features themselves where asked for.

    `checksum` is the xxh3_64 of the images' own xxh3_64, of their pixels alone: the same in a folder and in any npz.
    """

    pool: Gaussian
    spatial: Gaussian | None
    score: float | None
    features_Nd: np.ndarray | None
    checksum: str


def summarise(
    images: NpzImages | FolderImages,
    extractor: Extractor,
    team: DistributedContext,
    *,
    batch_size: int,
    keep: bool = False,
    want_score: bool = False,
) -> Summary:
    """Extract features batch by batch, each rank a share of the batches, and summarise them; all call this together.

    Args:
        keep: return all features, on every rank, too: N x d x 8 bytes of memory.
        want_score: compute the Inception Score; the extractor gives logits.
    Raises: DataError for fewer than two images, or features that are not finite.
    """
    if len(images) < 2:
        raise DataError(f"{images.path}: {len(images)} image, a covariance needs at least 2")
    pool = spatial = score = kept = None
    digests_N = np.zeros(len(images), dtype=np.uint64)
    for rows, pixels, features in _features_of(images, extractor, team, batch_size):
        if pool is None:
            pool = RunningGaussian(features.pool.shape[1])
            spatial = None if features.spatial is None else RunningGaussian(features.spatial.shape[1])
            score = InceptionScore(len(images), features.probabilities.shape[1]) if want_score else None
            kept = np.zeros((len(images), features.pool.shape[1])) if keep else None
        digests_N[rows.start:rows.stop] = [xxhash.xxh3_64_intdigest(image.tobytes()) for image in pixels[:len(rows)]]
        pool.add(features.pool[:len(rows)])
        if spatial is not None:
            spatial.add(features.spatial[:len(rows)])
        if score is not None:
            score.add(rows.start, features.probabilities[:len(rows)])
        if kept is not None:
            kept[rows.start:rows.stop] = features.pool[:len(rows)]
    # Each image was read by one rank; the others left its place at 0.
    digest = xxhash.xxh3_64(np.bitwise_or.reduce(team.gather(digests_N)).tobytes()).hexdigest()
    return Summary(pool=pool.gaussian(team), spatial=None if spatial is None else spatial.gaussian(team),
                   score=None if score is None else score.score(team), features_Nd=None if kept is None else team.sum(kept),
                   checksum=f"xxh3_64:{digest}")


def _features_of(images: NpzImages | FolderImages, extractor: Extractor, team: DistributedContext,
                 batch_size: int) -> Iterator[tuple[range, np.ndarray, Features]]:
    """Yield this rank's batches; at least one, possibly with no rows that count, so that all know the sizes."""
    batches = [range(first, min(first + batch_size, len(images))) for first in range(0, len(images), batch_size)]
    own = batches[team.rank::team.world_size] or [range(0)]
    with tqdm(total=len(images), unit="image", disable=None if team.is_main else True) as progress:
        for rows in own:
            pixels = images.read(rows or range(1))
            features = extractor(pixels)
            if not features.is_finite:
                raise DataError(f"{images.path}: extractor {extractor.identity['name']} returns features that are not finite for "
                                f"the images {rows.start} ... {max(rows.stop - 1, 0)}: no figure can be computed from them")
            yield rows, pixels, features
            progress.update(min(len(rows) * team.world_size, len(images) - progress.n))
