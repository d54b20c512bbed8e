"""The order of training: a function of (seed, epoch), the same for any number of ranks or
workers.

Where there are buckets, samples of different sizes, each global batch has one. A bucket has epochs
of its own: every sample once, shuffled. What does not fill a batch at the end of one joins the
first batch of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import numpy as np

from promoe_ds.randomness import generator


def batch_indices(
    lengths: Sequence[int], *, seed: int, start: int, batch: int, slots: range
) -> np.ndarray:
    """Return the data set indices of some slots of the global batch at a position of the endless
    training stream.

    Args:
        lengths: samples of each bucket, which follow one another in the data set.
        start: position of the batch's first sample; batch: samples of a global batch.
    """
    if len(lengths) == 1:
        return sample_indices(lengths[0], seed=seed, start=start + slots.start, count=len(slots))
    bucket, before = bucket_of_batch(lengths, seed=seed, number=start // batch, batch=batch)
    first = before * batch + slots.start
    own = sample_indices(lengths[bucket], seed=seed, start=first, count=len(slots), bucket=bucket)
    return sum(lengths[:bucket]) + own


def sample_indices(
    num_samples: int, *, seed: int, start: int, count: int, bucket: int = 0
) -> np.ndarray:
    """Return the data set indices at the positions start ... start + count - 1 of the endless
    training stream, or of a bucket's.

    Epoch k holds the positions k * num_samples ... (k + 1) * num_samples - 1, each sample once,
    shuffled by (seed, k); a batch may straddle two epochs. To resume, the position suffices.
    """
    positions = np.arange(start, start + count)
    indices = np.empty(count, dtype=np.int64)
    for epoch in range(start // num_samples, (start + count - 1) // num_samples + 1):
        here = positions // num_samples == epoch
        permutation = _shuffler(bucket)(num_samples, seed, epoch)
        indices[here] = permutation[positions[here] % num_samples]
    return indices


def bucket_of_batch(
    lengths: Sequence[int], *, seed: int, number: int, batch: int
) -> tuple[int, int]:
    """Return the bucket of a global batch, and how many batches of that bucket come before it.

    After k epochs, a bucket of n samples has had floor(k n / batch) batches; those of an epoch, of
    all buckets, are shuffled by (seed, epoch).
    """
    # An epoch has no more batches than its samples fill: this one or a later one is the batch's.
    epoch = number * batch // sum(lengths)
    while sum(_batches_before(lengths, epoch + 1, batch)) <= number:
        epoch += 1
    before = _batches_before(lengths, epoch, batch)
    buckets = _bucket_order(tuple(lengths), seed, epoch, batch)
    place = number - sum(before)
    bucket = int(buckets[place])
    return bucket, before[bucket] + int((buckets[:place] == bucket).sum())


def _batches_before(lengths: Sequence[int], epoch: int, batch: int) -> list[int]:
    return [epoch * length // batch for length in lengths]


@lru_cache(maxsize=2)
def _bucket_order(lengths: tuple[int, ...], seed: int, epoch: int, batch: int) -> np.ndarray:
    start, end = (_batches_before(lengths, each, batch) for each in (epoch, epoch + 1))
    buckets = np.repeat(np.arange(len(lengths)), np.subtract(end, start))
    return generator(seed, "bucket", epoch).permutation(buckets)


@cache
def _shuffler(bucket: int) -> Callable[[int, int, int], np.ndarray]:
    """Return what shuffles a bucket's epochs; it keeps the two newest."""

    @lru_cache(maxsize=2)
    def permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
        return generator(seed, "data", bucket, epoch).permutation(num_samples)

    return permutation
