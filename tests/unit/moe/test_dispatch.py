"""The local dispatcher, and the order in which arrived rows are sorted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from promoe_ds.moe import LocalDispatcher
from promoe_ds.moe.dispatch import _by_local_expert, add_weighted_rows
from promoe_ds.routing import Assignment

from ..builders import random_tensor


def assignment(token_ids: list[int], gates: list[float], counts: list[int]) -> Assignment:
    ids = torch.tensor(token_ids, dtype=torch.int64)
    return Assignment(ids, torch.tensor(gates, dtype=torch.float32), torch.tensor(counts))


def test_local_dispatch_gathers_the_rows_of_the_list() -> None:
    tokens = random_tensor(4, 3)
    plan = assignment([2, 0, 2, 3], [1.0] * 4, [1, 0, 3])
    arrived = LocalDispatcher().dispatch(tokens, plan)()
    assert torch.equal(arrived.rows_RD, tokens[[2, 0, 2, 3]])
    assert arrived.tokens_per_expert_e.tolist() == [1, 0, 3]


def test_weighted_rows_by_hand() -> None:
    base = torch.tensor([[10.0], [20.0], [30.0]])
    rows = torch.tensor([[1.0], [2.0], [4.0]])
    plan = assignment([2, 0, 2], [0.5, -1.0, 2.0], [3])
    assert add_weighted_rows(base, rows, plan).tolist() == [[8.0], [20.0], [38.5]]


def test_weighted_rows_accumulate_in_fp32_for_bf16() -> None:
    # bf16 has 8 bits: 256 + 1 is 256 there, however often it is added.
    base = torch.tensor([[256.0]], dtype=torch.bfloat16)
    rows = torch.ones(4, 1, dtype=torch.bfloat16)
    combined = add_weighted_rows(base, rows, assignment([0] * 4, [1.0] * 4, [4]))
    assert combined.dtype == torch.bfloat16
    assert combined.item() == 260.0


def test_weighted_rows_keep_fp32_gates_for_bf16_rows() -> None:
    gate = 1.0 + 2**-10  # rounds to 1 in bf16
    base = torch.tensor([[-1.0]], dtype=torch.bfloat16)
    rows = torch.ones(1, 1, dtype=torch.bfloat16)
    combined = add_weighted_rows(base, rows, assignment([0], [gate], [1]))
    assert combined.item() == 2**-10


def test_weighted_rows_in_fp64_stay_fp64() -> None:
    base = random_tensor(2, 3, dtype=torch.float64)
    plan = Assignment(
        torch.tensor([1]), torch.tensor([1.0], dtype=torch.float64), torch.tensor([1])
    )
    rows = torch.full((1, 3), 2.0**-40, dtype=torch.float64)
    combined = add_weighted_rows(base.clone(), rows, plan)
    assert torch.equal(combined[0], base[0])
    assert torch.equal(combined[1], base[1] + 2.0**-40)  # lost in fp32


def test_local_dispatch_without_rows_returns_the_base() -> None:
    tokens = random_tensor(3, 2)
    arrived = LocalDispatcher().dispatch(tokens, assignment([], [], [0, 0]))()
    assert arrived.rows_RD.shape == (0, 2)
    assert torch.equal(arrived.combine(tokens.clone(), arrived.rows_RD), tokens)


def test_local_round_trip_gives_each_token_the_sum_of_its_gates() -> None:
    tokens = random_tensor(3, 2, dtype=torch.float64)
    plan = assignment([0, 2, 0], [0.25, 4.0, 0.5], [2, 1])
    arrived = LocalDispatcher().dispatch(tokens, plan)()
    combined = arrived.combine(torch.zeros_like(tokens), arrived.rows_RD)
    assert torch.equal(combined, tokens * torch.tensor([[0.75], [0.0], [4.0]], dtype=torch.float64))


def test_local_dispatcher_sends_no_bytes() -> None:
    assert not LocalDispatcher().bytes_exchanged(assignment([0, 1], [1.0, 1.0], [2]), 8, 4)


def test_weighted_rows_gradients_reach_base_rows_and_gates() -> None:
    base, rows = (random_tensor(3, 4, seed=s, dtype=torch.float64).requires_grad_() for s in (0, 1))
    gates = random_tensor(3, seed=2, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([2, 0, 2])
    assert torch.autograd.gradcheck(
        # The base is consumed: a copy keeps gradcheck's own.
        lambda b, r, g: add_weighted_rows(b.clone(), r, Assignment(ids, g, torch.tensor([3]))),
        (base, rows, gates),
    )


@given(
    received=st.integers(2, 4).flatmap(
        lambda experts: st.lists(
            st.lists(st.integers(0, 3), min_size=experts, max_size=experts), min_size=2, max_size=4
        )
    )
)
def test_arrived_rows_are_sorted_by_expert_then_by_source(received: list[list[int]]) -> None:
    arrived = [
        (expert, rank)
        for rank, counts in enumerate(received)
        for expert, n in enumerate(counts)
        for _ in range(n)
    ]
    order = _by_local_expert(torch.tensor(received), len(arrived))
    assert [arrived[i] for i in order.tolist()] == sorted(arrived)
    # Stable: rows of one source and expert keep their order.
    assert order.tolist() == sorted(range(len(arrived)), key=lambda i: arrived[i][0])


@pytest.mark.parametrize("received", [[[3, 0, 2]], [[3], [0], [2]]])
def test_arrived_rows_of_one_source_or_one_expert_are_sorted_already(
    received: list[list[int]],
) -> None:
    assert _by_local_expert(torch.tensor(received), 5) is None
