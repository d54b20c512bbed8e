"""Where the files keep parameters, and the coverage check: values that were not read, or twice,
are named.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from promoe_ds.checkpoint.coverage import Coverage
from promoe_ds.checkpoint.zero_files import WEIGHTS, Contents
from promoe_ds.errors import CheckpointError

ALL = [("a", 6, 10), ("a", 0, 3), ("a", 3, 6), ("b",)]


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        (ALL, None),
        (ALL[:3], "b[0:4]"),
        ([("a", 0, 4), ("a", 6, 10), ("b",)], "a[4:6]"),
        ([("a", 0, 9), ("b",)], "a[9:10]"),
        ([("a", 0, 6), ("a", 5, 10), ("b",)], "a[5:6]"),
        ([*ALL, ("b",)], "b[0:4]"),
    ],
)
def test_coverage_names_what_was_not_read_once(read, problem: str | None) -> None:
    coverage = Coverage("there", {"a": 10, "b": 4})
    for each in read:
        coverage.add(*each)
    if problem is None:
        assert coverage.check() == 14
        return
    with pytest.raises(CheckpointError) as caught:
        coverage.check()
    assert str(caught.value).startswith(f"there: {problem} ")


def test_coverage_padding_need_not_be_read() -> None:
    coverage = Coverage("there", {"a": 10})
    coverage.add("a", 0, 8)
    assert coverage.check(lambda *place: place == ("a", 8, 10)) == 8


@pytest.mark.parametrize(
    ("parts", "shape"), [([()], ()), ([(2, 3)], (2, 3)), ([(1, 3), (1, 3)], (2, 3))]
)
def test_parameter_of_one_part_or_several_has_its_shape(parts: list, shape: tuple) -> None:
    """A router of one's own may have a scalar."""
    contents = Contents(
        shapes={}, tensors=defaultdict(dict), pieces=defaultdict(dict), optimizer_step=None
    )
    contents.add(WEIGHTS, "name", [(str(i), torch.empty(part)) for i, part in enumerate(parts)])
    assert contents.shapes == {"name": shape}
