"""Hash layers: their tables are fixed, differ between blocks, and follow moved experts."""

from __future__ import annotations

from collections import Counter

import pytest

from promoe_ds.routing import build_router
from promoe_ds.routing.hashing import hashed_experts

from ..builders import of_method, random_tensor, small_config
from .plans import plan_rows, route


def test_tables_are_fixed_numbers() -> None:
    """Checkpoints hold no table: it must never change."""
    assert hashed_experts(4, 4, 2, block=1) == [[0, 3], [1, 0], [1, 0], [1, 2]]


@pytest.mark.parametrize("top_k", [1, 2, 12])
def test_tables_repeat_no_expert_and_use_all_about_equally(top_k: int) -> None:
    table, other = (hashed_experts(256, 12, top_k, block) for block in (1, 3))
    assert all(len(set(row)) == top_k for row in table)
    load = Counter(expert for row in table for expert in row)
    assert len(load) == 12 and max(load.values()) < 2 * 256 * top_k / 12
    assert table != other
    assert [row[:1] for row in table] == hashed_experts(256, 12, 1, block=1)


def test_moved_experts_keep_their_positions() -> None:
    order, tokens = (2, 0, 3, 1), random_tensor(2, 4, 16)
    rows = [
        plan_rows(
            route(
                build_router(small_config(**of_method("hash"), parallel=parallel), block=1),
                tokens,
                [0, 1],
            )
        )
        for parallel in ({}, {"expert_order": (order,)})
    ]
    moved = {(token, order[place]) for token, place, _ in rows[1]}
    assert moved == {(token, expert) for token, expert, _ in rows[0]}
    assert rows[0] != rows[1]
