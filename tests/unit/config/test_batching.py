"""The batch triangle: contradictions, and that the cut is a partition whatever the layout."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe_ds.config import plan_batches

from ..builders import small_config
from .said import refuses


@pytest.mark.parametrize(
    ("train", "ranks", "expected"),
    [
        ({"global_batch_size": 12}, 1, (12, 1)),
        ({"global_batch_size": 12}, 4, (3, 1)),
        ({"global_batch_size": 12, "micro_batch_size": 3}, 2, (3, 2)),
        ({"global_batch_size": 12, "micro_batch_size": 1}, 1, (1, 12)),
    ],
)
def test_batches_are_cut_into_micro_times_accumulation(
    train: dict[str, int], ranks: int, expected: tuple[int, int]
) -> None:
    plan = plan_batches(small_config(train=train), ranks)
    assert (plan.micro_batch, plan.accumulation) == expected
    assert (plan.global_batch, plan.world_size) == (12, ranks)


DIFF_MOE = {"method": "diff_moe", "num_experts": 6}


@pytest.mark.parametrize(
    ("sections", "ranks", "said"),
    [
        ({"train": {"global_batch_size": 12}}, 5, ("global_batch_size=12", "5 equal shares")),
        (
            {"train": {"global_batch_size": 12, "micro_batch_size": 5}},
            2,
            ("global_batch_size=12", "micro_batch_size=5 times 2 ranks = 10"),
        ),
        (
            {"train": {"global_batch_size": 12, "micro_batch_size": 24}},
            1,
            ("global_batch_size=12", "micro_batch_size=24 times 1 ranks = 24"),
        ),
        ({"parallel": {"ep_size": 2}}, 3, ("parallel.ep_size=2", "ranks, 3:")),
        ({"parallel": {"ep_size": 4}}, 2, ("parallel.ep_size=4", "ranks, 2:")),
        # The pool of diff_moe is one pass's on one rank: more ranks or accumulation make it
        # smaller.
        *(
            (
                {"train": train, "routing": DIFF_MOE},
                ranks,
                ("routing.top_k=1 of 4 tokens", "num_experts=6", "train.micro_batch_size"),
            )
            for train, ranks in (
                ({"global_batch_size": 1}, 1),
                ({"global_batch_size": 4}, 4),
                ({"global_batch_size": 4, "micro_batch_size": 1}, 2),
            )
        ),
    ],
)
def test_batches_that_contradict_are_refused(
    sections: dict[str, dict[str, Any]], ranks: int, said: tuple[str, ...]
) -> None:
    config = small_config(**sections)
    with refuses(*said):
        plan_batches(config, ranks)


@pytest.mark.parametrize(
    ("routing", "train"),
    [
        ({**DIFF_MOE, "top_k": 2}, {"global_batch_size": 1}),
        (DIFF_MOE, {"global_batch_size": 2}),
        ({"method": "token_choice", "num_experts": 6}, {"global_batch_size": 1}),
    ],
)
def test_batches_with_a_token_for_every_expert_or_none_needed_are_taken(
    routing: dict[str, Any], train: dict[str, int]
) -> None:
    assert (
        plan_batches(small_config(train=train, routing=routing), 1).micro_batch
        == train["global_batch_size"]
    )


@given(micro=st.integers(1, 4), ranks=st.integers(1, 5), accumulation=st.integers(1, 4))
def test_slots_of_all_ranks_and_passes_are_the_global_batch_once(
    micro: int, ranks: int, accumulation: int
) -> None:
    config = small_config(
        train={"global_batch_size": micro * ranks * accumulation, "micro_batch_size": micro}
    )
    plan = plan_batches(config, ranks)
    slots = [
        slot
        for step in range(plan.accumulation)
        for rank in range(ranks)
        for slot in plan.slots(step, rank)
    ]
    # In this very order: slot g belongs to pass g // (ranks * micro) and there to rank (g // micro)
    # % ranks.
    assert slots == list(range(plan.global_batch))
    assert all(
        len(plan.slots(step, rank)) == micro
        for step in range(plan.accumulation)
        for rank in range(ranks)
    )
