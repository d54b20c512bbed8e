"""The condition as a value: what null is, dropping, joining, choosing; frozen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from promoe_ds.condition import ClassCondition


def test_class_condition_drops_joins_and_selects() -> None:
    condition = ClassCondition(torch.tensor([3, 10, 0]), null_label=10)
    assert condition.is_null_B.tolist() == [False, True, False] and len(condition) == 3
    assert condition.drop(torch.tensor([True, False, False])).group_B.tolist() == [10, 10, 0]
    assert condition.null_like().is_null_B.all() and condition.group_B.tolist() == [3, 10, 0]
    both = condition.cat([condition.null_like()])
    assert both.labels_B.tolist() == [3, 10, 0, 10, 10, 10] and both.null_label == 10
    assert both.select(torch.tensor([2, 0])).labels_B.tolist() == [0, 3]
    assert condition.to(torch.device("meta")).labels_B.is_meta
    assert (condition.num_null, condition.counted().num_null) == (None, 1)
    known = condition.counted().to(torch.device("meta"))
    assert (known.num_null, known.null_like().num_null) == (1, 3)
    assert (known.cat([known.null_like()]).num_null, both.num_null) == (4, None)
    assert known.select(slice(2)).num_null is None, "a choice of samples has other ones"
    with pytest.raises(dataclasses.FrozenInstanceError):
        condition.labels_B = torch.zeros(3)
