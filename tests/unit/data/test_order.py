"""The order of training: epochs are permutations, and positions do not depend on how they are asked
for.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from promoe_ds.data import batch_indices, sample_indices
from promoe_ds.data.order import bucket_of_batch
from promoe_ds.randomness import generator


def stream(num_samples: int, start: int, count: int, seed: int = 0) -> list[int]:
    return sample_indices(num_samples, seed=seed, start=start, count=count).tolist()


@given(num_samples=st.integers(1, 40), epoch=st.integers(0, 5), seed=st.integers(0, 2**63 - 1))
def test_order_each_epoch_is_a_permutation(num_samples: int, epoch: int, seed: int) -> None:
    assert sorted(stream(num_samples, epoch * num_samples, num_samples, seed)) == list(
        range(num_samples)
    )


@given(
    num_samples=st.integers(1, 12),
    start=st.integers(0, 40),
    first=st.integers(0, 30),
    second=st.integers(0, 30),
)
def test_order_positions_do_not_depend_on_how_they_are_asked_for(
    num_samples: int, start: int, first: int, second: int
) -> None:
    whole = stream(num_samples, start, first + second)
    assert whole == stream(num_samples, start, first) + stream(num_samples, start + first, second)
    assert whole == [stream(num_samples, start + i, 1)[0] for i in range(first + second)]


def test_order_is_the_permutation_of_the_stream_data() -> None:
    # Part of the format of a run: a resumed one must repeat it.
    for epoch in range(3):
        assert (
            stream(7, epoch * 7, 7, seed=5) == generator(5, "data", epoch).permutation(7).tolist()
        )


def test_order_epochs_and_seeds_differ() -> None:
    orders = [stream(50, epoch * 50, 50, seed) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


# Buckets.


@st.composite
def buckets(draw) -> tuple[list[int], int]:
    """Return samples of each bucket, none fewer than a batch, and the samples of a batch."""
    batch = draw(st.integers(1, 6))
    return draw(st.lists(st.integers(batch, 23), min_size=2, max_size=4)), batch


def batches_of(lengths: list[int], batch: int, count: int, seed: int = 0) -> list[list[int]]:
    return [
        batch_indices(
            lengths, seed=seed, start=number * batch, batch=batch, slots=range(batch)
        ).tolist()
        for number in range(count)
    ]


@given(buckets(), st.integers(0, 2**63 - 1))
def test_order_of_buckets_is_that_of_each_bucket_one_a_batch(
    made: tuple[list[int], int], seed: int
) -> None:
    (lengths, batch), epochs = made, 7
    ends = np.cumsum(lengths)
    taken: list[list[int]] = [[] for _ in lengths]
    count = sum(epochs * length // batch for length in lengths)
    for indices in batches_of(lengths, batch, count, seed):
        (bucket,) = set(np.searchsorted(ends, indices, side="right").tolist())
        taken[bucket] += [index - sum(lengths[:bucket]) for index in indices]
    for bucket, (length, own) in enumerate(zip(lengths, taken, strict=True)):
        # What does not fill a batch waits for the next epoch, no sample is left out or repeated.
        assert len(own) == epochs * length // batch * batch
        positions = sample_indices(length, seed=seed, start=0, count=len(own), bucket=bucket)
        assert own == positions.tolist()
        uses = np.bincount(own, minlength=length)
        assert uses.max() - uses.min() <= 1


@given(buckets(), st.integers(0, 60), st.data())
def test_order_of_buckets_is_a_function_of_the_position(
    made: tuple[list[int], int], number: int, data: st.DataObject
) -> None:
    lengths, batch = made
    whole = batches_of(lengths, batch, number + 1)[number]
    cut = data.draw(st.integers(0, batch - 1))
    parts = [
        batch_indices(lengths, seed=0, start=number * batch, batch=batch, slots=slots).tolist()
        for slots in (range(cut, batch), range(cut))
        if slots
    ]
    assert [index for part in reversed(parts) for index in part] == whole


def test_order_of_one_bucket_is_the_stream() -> None:
    for start in (0, 5, 14):
        found = batch_indices([7], seed=3, start=start, batch=4, slots=range(1, 4))
        assert found.tolist() == stream(7, start + 1, 3, seed=3)


def test_order_of_buckets_epochs_and_seeds_differ_and_sizes_share_no_permutation() -> None:
    orders = []
    for seed in (0, 1):
        numbers = range(64)
        order = [bucket_of_batch([64, 64], seed=seed, number=n, batch=4)[0] for n in numbers]
        orders += [tuple(order[:32]), tuple(order[32:])]
    assert len(set(orders)) == 4
    assert all(sum(order) == 16 for order in orders)
    first, second = (sample_indices(64, seed=0, start=0, count=64, bucket=b) for b in (0, 1))
    assert first.tolist() != second.tolist()
