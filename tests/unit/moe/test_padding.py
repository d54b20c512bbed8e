"""Padding groups of rows and taking the padding off again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from promoe_ds.moe.padding import pad_groups, pad_rows

from ..builders import random_tensor

CPU = torch.device("cpu")


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    multiple=st.sampled_from([1, 8, 16, 32]),
)
def test_padding_groups_come_back_as_they_were(counts: list[int], multiple: int) -> None:
    groups, rows = pad_groups(counts, multiple, CPU), random_tensor(sum(counts), 3).requires_grad_()
    padded = groups.pad(rows)
    assert all(
        size % multiple == 0
        and multiple <= size
        and count <= size < count + multiple + (multiple if count == 0 else 0)
        for size, count in zip(groups.sizes, counts, strict=True)
    )
    assert padded.shape[0] == sum(groups.sizes)
    for part, own in zip(padded.split(groups.sizes), rows.split(counts), strict=True):
        assert torch.equal(part[: len(own)], own)
        assert not part[len(own) :].any()
    assert torch.equal(groups.unpad(padded), rows)
    # What stands in the padding reaches no row, and no gradient reaches it.
    weights = random_tensor(*rows.shape, seed=1)
    (groups.unpad(padded * 2) * weights).sum().backward()
    assert torch.equal(rows.grad, 2 * weights)


@pytest.mark.parametrize(("rows", "expected"), [(0, 16), (1, 16), (16, 16), (17, 32)])
def test_padding_rows_reach_the_next_multiple_and_never_none(rows: int, expected: int) -> None:
    padded = pad_rows(values := random_tensor(rows, 2), 16)
    assert padded.shape == (expected, 2)
    assert torch.equal(padded[:rows], values)
    assert not padded[rows:].any()
    assert (padded is values) == (rows == expected)
