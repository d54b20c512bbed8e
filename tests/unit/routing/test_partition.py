"""Step 1: the label alone decides who is routed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from promoe_ds.condition import ClassCondition
from promoe_ds.routing import partition_samples

from . import oracles

NULL = 10


@given(
    labels=st.lists(st.integers(0, NULL), min_size=1, max_size=12), has_unconditional=st.booleans()
)
def test_partition_any_labels_equals_oracle(labels: list[int], has_unconditional: bool) -> None:
    partition = partition_samples(
        ClassCondition(torch.tensor(labels), NULL), has_unconditional_expert=has_unconditional
    )
    routed, unconditional = oracles.partition(
        labels, NULL, has_unconditional_expert=has_unconditional
    )
    assert partition.routed_ids.tolist() == routed
    assert partition.unconditional_ids.tolist() == unconditional
    assert partition.is_routed_B.tolist() == [place in routed for place in range(len(labels))]
    assert partition.all_routed == (not unconditional)
    assert partition.group_B.tolist() == labels
    assert partition.is_null_B.tolist() == [label == NULL for label in labels]


@pytest.mark.parametrize(
    ("labels", "routed", "unconditional"),
    [
        ([10, 3, 9, 10, 0], [1, 2, 4], [0, 3]),
        ([1000, 9], [0, 1], []),  # the published code tests the literal 1000
        ([10, 10], [], [0, 1]),
        ([3], [0], []),
    ],
)
def test_partition_by_hand(labels: list[int], routed: list[int], unconditional: list[int]) -> None:
    partition = partition_samples(ClassCondition(torch.tensor(labels), NULL))
    assert partition.routed_ids.tolist() == routed
    assert partition.unconditional_ids.tolist() == unconditional
    assert partition.routed_ids.dtype == partition.unconditional_ids.dtype == torch.int64


def test_take_routed_copies_nothing_where_all_are_routed() -> None:
    values = torch.zeros(2, 3)
    assert (
        partition_samples(ClassCondition(torch.tensor([1, 2]), NULL)).take_routed(values) is values
    )


@given(
    labels=st.lists(st.sampled_from([0, NULL]), min_size=1, max_size=5), tokens=st.integers(1, 4)
)
def test_unconditional_token_ids_are_the_rest(labels: list[int], tokens: int) -> None:
    partition = partition_samples(ClassCondition(torch.tensor(labels), NULL))
    expected = [
        place * tokens + s
        for place, label in enumerate(labels)
        if label == NULL
        for s in range(tokens)
    ]
    assert partition.unconditional_token_ids(tokens).tolist() == expected
