"""The condition as a value: what null is, dropping, joining, choosing; frozen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from promoe_ds.condition import ClassCondition, EmptyText, TextCondition


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


def _texts(*lengths: int) -> TextCondition:
    """Encoded texts of some lengths, width 2; the empty text has two tokens."""
    longest = max(lengths)
    tokens = torch.zeros(len(lengths), longest, 2)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    tokens[mask] = torch.arange(1.0, 1 + 2 * sum(lengths)).view(-1, 2)
    empty = EmptyText(torch.full((2, 2), -1.0), torch.full((3,), -2.0))
    return TextCondition(
        tokens,
        mask,
        torch.ones(len(lengths), 3),
        torch.zeros(len(lengths), dtype=torch.bool),
        empty,
        groups_B=torch.arange(len(lengths)),
        num_groups=5,
    )


def test_text_condition_drops_joins_and_selects() -> None:
    condition = _texts(1, 1)
    dropped = condition.drop(torch.tensor([True, False]))
    assert dropped.is_null_B.tolist() == [True, False] and dropped.group_B.tolist() == [5, 1]
    assert dropped.tokens_BLC.tolist() == [[[-1, -1], [-1, -1]], [[3, 4], [0, 0]]]
    assert dropped.mask_BL.tolist() == [[True, True], [True, False]]
    assert dropped.pooled_BC.tolist() == [[-2] * 3, [1] * 3]
    assert not condition.is_null_B.any() and dropped.counted().num_null == 1
    nulls = condition.null_like()
    assert nulls.num_null == 2 and nulls.mask_BL.sum(dim=1).tolist() == [2, 2]
    assert nulls.group_B.tolist() == [5, 5] and nulls.tokens_BLC[:, :2].eq(-1).all()
    both = _texts(3).cat([condition.drop(torch.ones(2, dtype=torch.bool))])
    assert both.mask_BL.tolist() == [[True] * 3, [True, True, False], [True, True, False]]
    assert both.select(torch.tensor([2, 0])).is_null_B.tolist() == [True, False]
    moved = both.counted().to(torch.device("meta"))
    assert moved.empty.tokens_LC.is_meta and moved.tokens_BLC.is_meta and moved.num_null == 2


def test_text_condition_counted_forgets_padding() -> None:
    short, longer = _texts(3, 1), _texts(3, 1, 40).select(slice(2))
    assert longer.mask_BL.shape == (2, 40)
    for each in (short.counted(), longer.counted()):
        assert each.num_null == 0 and each.tokens_BLC.shape == (2, 16, 2)
        assert each.mask_BL.sum(dim=1).tolist() == [3, 1] and not each.tokens_BLC[:, 3:].any()
