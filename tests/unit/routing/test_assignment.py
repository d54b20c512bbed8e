"""The list of (token, expert, gate) in which every router ends."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from promoe_ds.routing import assign_pairs, assign_token_choice
from promoe_ds.routing.assignment import count_pairs

from ..builders import random_tensor
from . import oracles
from .plans import assignment_rows


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
    assert assignment_rows(assignment) == oracles.assignment_rows(choices)


# From pairs in any order.


@given(num_tokens=st.integers(1, 8), num_experts=st.integers(1, 4), data=st.data())
def test_pairs_in_any_order_equal_oracle(
    num_tokens: int, num_experts: int, data: st.DataObject
) -> None:
    every = [(token, expert) for token in range(num_tokens) for expert in range(num_experts)]
    pairs = data.draw(st.permutations(every))[: data.draw(st.integers(0, len(every)))]
    tokens, experts = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T
    gates = torch.arange(len(pairs), dtype=torch.float32) + 0.5
    counts = torch.bincount(experts, minlength=num_experts)
    assignment = assign_pairs(
        tokens, experts, gates, num_tokens=num_tokens, tokens_per_expert_E=counts
    )
    choices = [(*pair, place + 0.5) for place, pair in enumerate(pairs)]
    assert assignment_rows(assignment) == oracles.assignment_rows(choices)


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
