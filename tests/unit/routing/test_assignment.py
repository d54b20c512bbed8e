"""The list of (token, expert, gate) in which every router ends."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from promoe_ds.routing import Assignment, assign_pairs, assign_token_choice
from promoe_ds.routing.assignment import count_pairs

from ..builders import random_tensor
from . import oracles


def assign(
    expert_ids_RSK: list, routed_ids: list[int], num_experts: int
) -> tuple[Assignment, Tensor]:
    """Assign with gates 0.5, 1.5, ... in the order of the choices."""
    ids = torch.tensor(expert_ids_RSK, dtype=torch.int64)
    gates = (torch.arange(ids.numel(), dtype=torch.float32) + 0.5).view(ids.shape).requires_grad_()
    counts = torch.bincount(ids.flatten(), minlength=num_experts)
    return assign_token_choice(
        gates, ids, torch.tensor(routed_ids, dtype=torch.int64), counts
    ), gates


def rows(assignment: Assignment) -> list[tuple[int, int, float]]:
    experts = torch.repeat_interleave(
        torch.arange(len(assignment.tokens_per_expert_E)), assignment.tokens_per_expert_E
    )
    return list(
        zip(
            assignment.token_ids_N.tolist(),
            experts.tolist(),
            assignment.gates_N.tolist(),
            strict=True,
        )
    )


@given(
    samples=st.integers(0, 4),
    tokens=st.integers(1, 4),
    top_k=st.integers(1, 4),
    extra=st.integers(0, 2),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_assignment_any_choices_equals_oracle(
    samples: int, tokens: int, top_k: int, extra: int, seed: int, data: st.DataObject
) -> None:
    num_experts = top_k + extra
    batch = samples + data.draw(st.integers(0, 2))
    routed = sorted(data.draw(st.permutations(range(batch)))[:samples])
    expert_ids = random_tensor(samples, tokens, num_experts, seed=seed).argsort(dim=-1)[..., :top_k]
    gates = random_tensor(samples, tokens, top_k, seed=seed + 1)
    counts = torch.bincount(expert_ids.flatten(), minlength=num_experts)
    assignment = assign_token_choice(
        gates, expert_ids, torch.tensor(routed, dtype=torch.int64), counts
    )
    choices = [
        (place * tokens + s, int(expert_ids[r, s, k]), float(gates[r, s, k]))
        for r, place in enumerate(routed)
        for s in range(tokens)
        for k in range(top_k)
    ]
    assert rows(assignment) == oracles.assignment_rows(choices)


def test_assignment_by_hand() -> None:
    assignment, _ = assign([[[2], [0]], [[0], [2]]], routed_ids=[1, 3], num_experts=3)
    assert rows(assignment) == [(3, 0, 1.5), (6, 0, 2.5), (2, 2, 0.5), (7, 2, 3.5)]


def test_assignment_expert_without_tokens_has_count_zero() -> None:
    assignment, _ = assign([[[2], [0]]], routed_ids=[0], num_experts=4)
    assert assignment.tokens_per_expert_E.tolist() == [1, 0, 1, 0]


def test_assignment_all_tokens_on_one_expert_keep_token_order() -> None:
    assignment, _ = assign([[[1], [1]], [[1], [1]]], routed_ids=[0, 1], num_experts=3)
    assert assignment.token_ids_N.tolist() == [0, 1, 2, 3]
    assert assignment.tokens_per_expert_E.tolist() == [0, 4, 0]


def test_assignment_without_routed_samples_is_empty() -> None:
    ids = torch.empty(0, 4, 2, dtype=torch.int64)
    none = torch.empty(0, dtype=torch.int64)
    assignment = assign_token_choice(
        torch.empty(0, 4, 2), ids, none, torch.zeros(3, dtype=torch.int64)
    )
    assert assignment.token_ids_N.shape == assignment.gates_N.shape == (0,)
    assert assignment.tokens_per_expert_E.tolist() == [0, 0, 0]


def test_assignment_one_token_to_every_expert() -> None:
    assignment, _ = assign([[[2, 0, 1]]], routed_ids=[0], num_experts=3)
    assert rows(assignment) == [(0, 0, 1.5), (0, 1, 2.5), (0, 2, 0.5)]


def test_assignment_gradient_reaches_each_gate_once() -> None:
    assignment, gates = assign([[[2, 0], [1, 2]]], routed_ids=[0], num_experts=3)
    (assignment.gates_N * assignment.gates_N.detach()).sum().backward()
    assert torch.equal(gates.grad, gates.detach())


# From pairs in any order.


def pair_rows(
    pairs: list[tuple[int, int]], num_tokens: int, num_experts: int
) -> list[tuple[int, int, float]]:
    """Assign pairs with the gates 0.5, 1.5, ... in their order."""
    tokens, experts = (torch.tensor([pair[i] for pair in pairs], dtype=torch.int64) for i in (0, 1))
    gates = torch.arange(len(pairs), dtype=torch.float32) + 0.5
    return rows(
        assign_pairs(
            tokens,
            experts,
            gates,
            num_tokens=num_tokens,
            tokens_per_expert_E=torch.bincount(experts, minlength=num_experts),
        )
    )


@given(num_tokens=st.integers(1, 8), num_experts=st.integers(1, 4), data=st.data())
def test_pairs_in_any_order_equal_oracle(
    num_tokens: int, num_experts: int, data: st.DataObject
) -> None:
    every = [(token, expert) for token in range(num_tokens) for expert in range(num_experts)]
    pairs = data.draw(st.permutations(every))[: data.draw(st.integers(0, len(every)))]
    choices = [(*pair, place + 0.5) for place, pair in enumerate(pairs)]
    assert pair_rows(pairs, num_tokens, num_experts) == oracles.assignment_rows(choices)


def test_pairs_by_hand() -> None:
    assert pair_rows([(3, 1), (0, 2), (5, 1), (4, 0)], 6, 3) == [
        (4, 0, 3.5),
        (3, 1, 0.5),
        (5, 1, 2.5),
        (0, 2, 1.5),
    ]


def test_pairs_gradient_reaches_each_gate_once() -> None:
    gates = torch.tensor([2.0, 3.0, 5.0]).requires_grad_()
    assignment = assign_pairs(
        torch.tensor([1, 0, 1]),
        torch.tensor([1, 1, 0]),
        gates,
        num_tokens=2,
        tokens_per_expert_E=torch.tensor([1, 2]),
    )
    (assignment.gates_N * torch.tensor([10.0, 20.0, 30.0])).sum().backward()
    assert gates.grad.tolist() == [30.0, 20.0, 10.0]  # sorted: (1, 0), (0, 1), (1, 1)


@given(samples=st.integers(1, 4), experts=st.integers(1, 4), data=st.data())
def test_count_pairs_equals_oracle(samples: int, experts: int, data: st.DataObject) -> None:
    pairs = data.draw(
        st.lists(st.tuples(st.integers(0, samples - 1), st.integers(0, experts - 1)), max_size=12)
    )
    ids = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    counts = count_pairs(ids[:, 0], ids[:, 1], num_samples=samples, num_experts=experts)
    assert counts.tolist() == [
        [pairs.count((sample, expert)) for expert in range(experts)] for sample in range(samples)
    ]
