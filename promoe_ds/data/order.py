"""The order of training: a function of (seed, epoch), the same for any number of ranks or
workers.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from promoe_ds.randomness import generator


def sample_indices(num_samples: int, *, seed: int, start: int, count: int) -> np.ndarray:
    """Return the data set indices at the positions start ... start + count - 1 of the endless
    training stream.

    Epoch k holds the positions k * num_samples ... (k + 1) * num_samples - 1, each sample once,
    shuffled by (seed, k); a batch may straddle two epochs. To resume, the position suffices.
    """
    positions = np.arange(start, start + count)
    indices = np.empty(count, dtype=np.int64)
    for epoch in range(start // num_samples, (start + count - 1) // num_samples + 1):
        here = positions // num_samples == epoch
        indices[here] = _permutation(num_samples, seed, epoch)[positions[here] % num_samples]
    return indices


@lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, "data", epoch).permutation(num_samples)
