"""Counter-based random numbers: functions of (seed, stream, indices) and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from promoe_ds.randomness import STREAMS, generator, hashes

WORDS = 2**64


def draw(seed: int, stream: str, *indices: int, count: int = 4) -> list[int]:
    return (
        generator(seed, stream, *indices)
        .integers(WORDS - 1, size=count, dtype="uint64", endpoint=True)
        .tolist()
    )


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x64 with ten rounds (Salmon et al., 2011), written from the paper."""
    for _ in range(10):
        first, second = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [
            (second // WORDS) ^ counter[1] ^ key[0],
            second % WORDS,
            (first // WORDS) ^ counter[3] ^ key[1],
            first % WORDS,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) % WORDS, (key[1] + 0xBB67AE8584CAA73B) % WORDS]
    return counter


@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.sampled_from(sorted(STREAMS)),
    high=st.integers(0, 2**64 - 1),
    low=st.integers(0, 2**64 - 1),
)
@example(seed=WORDS - 1, stream="synthetic", high=WORDS - 1, low=WORDS - 1)
def test_generator_words_are_philox_blocks_of_the_indices(
    seed: int, stream: str, high: int, low: int
) -> None:
    blocks = [philox([block, low, high, 0], [seed, STREAMS[stream]]) for block in (1, 2)]
    assert draw(seed, stream, high, low, count=8) == blocks[0] + blocks[1]


def test_generator_missing_indices_are_zero() -> None:
    assert draw(3, "noise") == draw(3, "noise", 0) == draw(3, "noise", 0, 0)
    assert draw(3, "noise", 5) == draw(3, "noise", 0, 5)


def test_generator_is_fresh_at_every_call() -> None:
    first = generator(0, "data")
    first.random(1000)
    assert first.random() != generator(0, "data").random()
    assert generator(0, "data").random() == generator(0, "data").random()


def test_generator_takes_numpy_integers() -> None:
    assert draw(0, "data", np.int64(3), np.int32(4)) == draw(0, "data", 3, 4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, "data"), [15003734204198539638, 13859618513508960101]),
        ((7, "noise", 3, 5), [3735267614167241674, 17668206301116498076]),
        ((2**63 - 1, "init", 2**32 - 1, 11), [4513105838074654942, 1560795420263833573]),
    ],
)
def test_generator_values_are_part_of_the_format_of_a_run(
    arguments: tuple, expected: list[int]
) -> None:
    # A resumed run must repeat what another version began: these words never change.
    assert draw(*arguments, count=2) == expected


def test_streams_numbers_never_change() -> None:
    assert STREAMS == {
        "data": 1,
        "noise": 2,
        "sigma": 3,
        "label_drop": 4,
        "caption": 10,
        "bucket": 11,
        "init": 5,
        "sample": 6,
        "synthetic": 7,
        "flip": 8,
        "posterior": 9,
    }


def test_generator_unknown_stream_is_refused() -> None:
    with pytest.raises(KeyError, match="weather"):
        generator(0, "weather")


def test_generator_three_indices_are_refused() -> None:
    with pytest.raises(ValueError, match="at most two indices, got 3"):
        generator(0, "data", 1, 2, 3)


def test_hashes_are_even_in_every_bit_and_free_of_repeats() -> None:
    found = hashes(3, "flip", np.arange(100_000))
    assert len(np.unique(found)) == 100_000
    bits = (found[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    # Five standard deviations of 100,000 coins, on each of 64.
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / 100_000**0.5
    pairs = (bits[:-1] == bits[1:]).mean(axis=0)
    assert np.abs(pairs - 0.5).max() < 5 * 0.5 / 100_000**0.5


def test_hashes_depend_on_seed_stream_and_index_alone() -> None:
    whole = hashes(3, "flip", np.arange(20))
    assert np.array_equal(hashes(3, "flip", np.array([7, 2])), whole[[7, 2]])
    for other in (hashes(4, "flip", np.arange(20)), hashes(3, "posterior", np.arange(20))):
        assert not np.isin(other, whole).any()
