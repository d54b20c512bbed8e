"""Counter-based random numbers: every draw is a function of (seed, stream, indices), of nothing
else.

No generator is ever advanced, so there is no random state to save: a resumed run repeats the
uninterrupted one, and a sample's noise does not depend on which rank or batch it falls into.
Philox (Salmon et al., 2011) is made for this: the key holds seed and stream, the counter the
indices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

#: Named streams; the number is part of the format of a run and never changes.
STREAMS = {
    "data": 1,
    "noise": 2,
    "sigma": 3,
    "label_drop": 4,
    "init": 5,
    "sample": 6,
    "synthetic": 7,
    "flip": 8,
    "posterior": 9,
    "caption": 10,
    "bucket": 11,
}

_MASK64 = (1 << 64) - 1
#: 2**64 over the golden ratio: multiples of it fill the numbers evenly.
_GOLDEN = 0x9E3779B97F4A7C15


def generator(seed: int, stream: str, *indices: int) -> np.random.Generator:
    """Return a fresh generator for one (seed, stream, indices).

    Args:
        seed: the run's seed, 0 <= seed < 2**64.
        stream: a name of `STREAMS`.
        indices: up to two non-negative integers, e.g. (step, sample slot).
    Raises: KeyError for an unknown stream; ValueError for more than two indices.
    """
    if len(indices) > 2:
        raise ValueError(f"at most two indices, got {len(indices)}")
    high, low = ([0, 0] + [int(i) for i in indices])[-2:]
    return next(generators(seed, stream, high, [low]))


def generators(
    seed: int, stream: str, first: int, seconds: Iterable[int]
) -> Iterator[np.random.Generator]:
    """Yield what `generator(seed, stream, first, second)` returns for each of `seconds`, at a
    twentieth of the price.

    It is one object each time: draw from it before the next one is asked for.
    """
    # The lowest counter word counts the blocks drawn; the indices sit above it and never meet it.
    counter = np.array([0, 0, first & _MASK64, 0], dtype=np.uint64)
    bits = np.random.Philox(
        key=np.array([seed & _MASK64, STREAMS[stream]], dtype=np.uint64), counter=counter
    )
    state, random = bits.state, np.random.Generator(bits)
    for second in seconds:
        state["state"]["counter"][1] = int(second) & _MASK64
        bits.state = state
        yield random


def hashes(seed: int, stream: str, indices: np.ndarray) -> np.ndarray:
    """Return one uint64 for each index: where that will do, thousands of times cheaper than a
    generator each.

    Source: the finaliser of SplitMix64 (Steele, Lea & Flood, 2014), over (seed, stream) and then
    the index. Args:
        seed, stream: as for `generator`; indices: (n,) non-negative integers.
    Raises: KeyError for an unknown stream.
    """
    key = _mixed(np.array([(seed + STREAMS[stream] * _GOLDEN) & _MASK64], dtype=np.uint64))
    return _mixed(key + np.asarray(indices).astype(np.uint64) * np.uint64(_GOLDEN))


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
