"""An assignment seen token by token, and the tuple that DeepSpeed's layer gets of it."""

from __future__ import annotations

import pytest
import torch

from promoe_ds.backends.external import token_choices
from promoe_ds.backends.stock_deepspeed import PlanGate
from promoe_ds.routing.assignment import Assignment

#: Tokens 1, 2 and 4 of five visit two of three experts each.
CHOICES = {1: {0: 0.5, 2: -0.1}, 2: {0: 0.9, 1: 0.2}, 4: {0: 0.7, 2: 0.3}}


def assignment() -> Assignment:
    rows = [
        (expert, token, gate)
        for token, of_token in CHOICES.items()
        for expert, gate in of_token.items()
    ]
    rows.sort(key=lambda row: row[:2])
    counts = [sum(row[0] == expert for row in rows) for expert in range(3)]
    return Assignment(
        token_ids_N=torch.tensor([row[1] for row in rows]),
        tokens_per_expert_E=torch.tensor(counts),
        gates_N=torch.tensor([row[2] for row in rows]).requires_grad_(),
    )


def test_choices_of_every_token_are_its_rows() -> None:
    lists = assignment()
    choices = token_choices(lists, 2)
    assert choices.token_ids_S.tolist() == list(CHOICES)
    for token, rows in zip(choices.token_ids_S.tolist(), choices.rows_SK.tolist(), strict=True):
        assert {
            int(choices.expert_N[row]): pytest.approx(float(lists.gates_N[row])) for row in rows
        } == CHOICES[token]


def test_choices_without_rows_are_empty() -> None:
    empty = Assignment(
        torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(3, dtype=torch.int64)
    )
    choices = token_choices(empty, 2)
    assert (
        choices.token_ids_S.numel(),
        tuple(choices.rows_SK.shape),
        choices.expert_N.numel(),
    ) == (0, (0, 2), 0)


@pytest.mark.parametrize(
    ("factor", "capacity", "dropped"),
    [
        (4.0, 14, set()),  # 4 * 5 tokens * 2 choices / 3 experts, rounded up
        (0.5, 2, {(1, 0)}),  # expert 0 has three rows: the lowest gate goes
        (0.2, 1, {(1, 0), (4, 0), (1, 2)}),
    ],
)
def test_gate_keeps_the_highest_gates_of_every_expert(
    factor: float, capacity: int, dropped: set
) -> None:
    gate = PlanGate(3, 2, factor, group=None)
    gate.assignment = assignment()
    loss, found, experts, expert_KT, slot_KT, gates_KT, counts = gate(torch.zeros(5, 4))
    assert (float(loss), int(found), experts, counts.tolist()) == (0.0, capacity, 3, [3, 1, 2])
    kept = {
        (token, int(expert_KT[k, token])): float(gates_KT[k, token])
        for k in range(2)
        for token in range(5)
        if expert_KT[k, token] >= 0
    }
    assert kept == {
        (token, expert): pytest.approx(value)
        for token, of_token in CHOICES.items()
        for expert, value in of_token.items()
        if (token, expert) not in dropped
    }
    slots = [
        *zip(expert_KT[expert_KT >= 0].tolist(), slot_KT[expert_KT >= 0].tolist(), strict=True)
    ]
    assert len(set(slots)) == len(slots) and {slot for _, slot in slots} <= set(range(capacity))
    gates_KT.sum().backward()
    assert gate.assignment.gates_N.grad.tolist() == [1.0] * 6
