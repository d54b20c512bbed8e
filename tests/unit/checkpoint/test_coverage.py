"""The account of values: dropped, doubled and foreign ones are named."""

from __future__ import annotations

import pytest

from promoe_ds.checkpoint.coverage import Ledger
from promoe_ds.errors import CheckpointError


def ledger() -> Ledger:
    account = Ledger("there")
    account.expect("a", 10)
    account.expect("b", 4)
    return account


def test_ledger_everything_taken_once_in_any_order_passes() -> None:
    account = ledger()
    for start, stop in ((6, 10), (0, 3), (3, 6)):
        account.take("a", start, stop, "x")
    account.take_all("b", "y")
    assert account.check() == 14


@pytest.mark.parametrize(("taken", "message"), [
    ([("a", 0, 10)], "there: b was dropped"),
    ([("a", 0, 4), ("a", 6, 10), ("b", 0, 4)], r"a\[4:6\] was dropped"),
    ([("a", 0, 9), ("b", 0, 4)], r"a\[9:10\] was dropped"),
    ([("a", 0, 6), ("a", 5, 10), ("b", 0, 4)], r"a\[5:6\] was taken twice, by x and x"),
    ([("a", 0, 10), ("b", 0, 4), ("b", 0, 4)], r"b\[0:4\] was taken twice"),
])
def test_ledger_dropped_or_doubled_values_are_named(taken, message: str) -> None:
    account = ledger()
    for tensor, start, stop in taken:
        account.take(tensor, start, stop, "x")
    with pytest.raises(CheckpointError, match=message):
        account.check()


def test_ledger_padding_may_stay() -> None:
    account = ledger()
    account.take("a", 0, 8, "x")
    account.take_all("b", "y")
    assert account.check(lambda tensor, start, stop: (tensor, start, stop) == ("a", 8, 10)) == 12
    with pytest.raises(CheckpointError, match=r"a\[8:10\] was dropped"):
        account.check(lambda tensor, start, stop: False)


def test_ledger_tensor_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointError, match="x takes from c, which the source does not have"):
        ledger().take_all("c", "x")
