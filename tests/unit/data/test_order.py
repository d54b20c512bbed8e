"""The order of training: epochs are permutations, and positions do not depend on how they are asked
for.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from promoe_ds.data import sample_indices
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
