"""Step 1: the label alone decides who is routed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from promoe_ds.routing import partition_samples

from . import oracles

NULL = 10


def places(labels: list[int], null_label: int = NULL, *, has_unconditional: bool = True) -> tuple[list[int], list[int]]:
    partition = partition_samples(torch.tensor(labels), null_label, has_unconditional_expert=has_unconditional)
    return partition.routed_ids.tolist(), partition.unconditional_ids.tolist()


@given(labels=st.lists(st.integers(0, NULL), min_size=1, max_size=12), has_unconditional=st.booleans())
def test_partition_any_labels_equals_oracle(labels: list[int], has_unconditional: bool) -> None:
    partition = partition_samples(torch.tensor(labels), NULL, has_unconditional_expert=has_unconditional)
    routed, unconditional = oracles.partition(labels, NULL, has_unconditional_expert=has_unconditional)
    assert partition.routed_ids.tolist() == routed
    assert partition.unconditional_ids.tolist() == unconditional
    assert partition.is_routed_B.tolist() == [place in routed for place in range(len(labels))]
    assert partition.all_routed == (not unconditional)


def test_partition_ten_classes_null_label_goes_unconditional() -> None:
    assert places([10, 3, 9, 10, 0]) == ([1, 2, 4], [0, 3])


def test_partition_ten_classes_label_1000_is_no_null() -> None:
    # The published code tests the literal 1000.
    assert places([1000, 9]) == ([0, 1], [])


def test_partition_all_unconditional_routes_nobody() -> None:
    assert places([10, 10]) == ([], [0, 1])


def test_partition_all_conditional_says_so() -> None:
    assert partition_samples(torch.tensor([0, 9]), NULL).all_routed


@pytest.mark.parametrize(("label", "expected"), [(NULL, ([], [0])), (3, ([0], []))])
def test_partition_one_sample(label: int, expected: tuple[list[int], list[int]]) -> None:
    assert places([label]) == expected


def test_partition_without_unconditional_expert_routes_null_samples() -> None:
    assert places([10, 3, 10], has_unconditional=False) == ([0, 1, 2], [])


def test_partition_ids_can_index() -> None:
    partition = partition_samples(torch.tensor([10, 1]), NULL)
    assert partition.routed_ids.dtype == partition.unconditional_ids.dtype == torch.int64
    assert partition.is_routed_B.dtype == torch.bool
