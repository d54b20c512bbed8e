"""Expert choice within each sample: the experts' share, and what happens below one token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from promoe_ds.routing.router import expert_capacity

from ..builders import random_tensor
from .plans import NULL, make_router, route


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "capacity"),
    [(256, 12, 1, 21), (256, 12, 3, 64), (4, 4, 4, 4), (3, 4, 1, 0)],
)
def test_capacity_is_the_floor_of_the_even_share(
    tokens: int, experts: int, top_k: int, capacity: int
) -> None:
    assert expert_capacity(tokens, experts, top_k) == capacity


def test_capacity_rounds_as_published_for_all_sizes() -> None:
    """`int((S / E) * K)`, in fp64: vectorised over S and K, our function for every size where that
    is no exact floor.
    """
    tokens_S1 = np.arange(1, 1025)[:, None]
    inexact = 0
    for experts in range(1, 129):
        top_k_K = np.arange(1, experts + 1)
        published_SK = ((tokens_S1 / experts) * top_k_K).astype(np.int64)
        for s, k in zip(*np.nonzero(published_SK != tokens_S1 * top_k_K // experts), strict=True):
            assert expert_capacity(int(s) + 1, experts, int(k) + 1) == published_SK[s, k]
            inexact += 1
        half = (experts + 1) // 2
        assert [expert_capacity(s, experts, half) for s in range(1, 1025)] == published_SK[
            :, half - 1
        ].tolist()
    assert expert_capacity(196, 22, 11) == 97 and inexact > 1000


@pytest.mark.parametrize("method", ["expert_choice", "ec_dit"])
def test_every_expert_takes_equally_many_of_every_routed_sample(method: str) -> None:
    plan = route(make_router(method), random_tensor(3, 6, 8, dtype=torch.float64), [0, NULL, 1])
    assert plan.stats.tokens_per_expert_BE.tolist() == [[3] * 4, [0] * 4, [3] * 4]
