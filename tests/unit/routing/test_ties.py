"""Equal scores: whichever pair is chosen, no better one is left out, and no pair is chosen
twice.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from promoe_ds.routing import Router

from ..builders import random_tensor
from .plans import LOOKING, NULL, ONE_EXPERT, make_router, plan_rows, route

LABELS, TOKENS, EXPERTS = [0, NULL, 1], 6, 4
ROUTED = [token for token in range(len(LABELS) * TOKENS) if LABELS[token // TOKENS] != NULL]
Pair = tuple[int, int]


def tied_tokens(seed: int) -> Tensor:
    """Tokens of the numbers -1, 0 and 1; every one comes twice."""
    return (
        random_tensor(len(LABELS), TOKENS // 2, 2, seed=seed, dtype=torch.float64)
        .round()
        .clamp(-1, 1)
        .repeat(1, 2, 1)
    )


def tied_router(method: str, seed: int, **settings: int) -> Router:
    """A router of four experts that are two and two alike."""
    router = make_router(method, width=2, seed=seed, num_experts=EXPERTS, **settings)
    with torch.no_grad():
        directions = router.expert_keys_ED()
        directions.copy_(directions.sign()[[0, 1, 0, 1]])
        if method == "classification":
            router.classifier.bias.zero_()
    return router


def scores_of(method: str, router: Router, seed: int) -> dict[Pair, float]:
    """The score of every routed pair: its gate where all pairs are chosen."""
    if method == "kmeans":
        scores_TE = (
            -(tied_tokens(seed).flatten(0, 1)[:, None] - router.centroids).norm(dim=-1)
        ).softmax(dim=-1)
    elif method == "classification":
        scores_BE = (tied_tokens(seed).mean(dim=1) @ router.classifier.weight.T).softmax(dim=-1)
        scores_TE = scores_BE.repeat_interleave(TOKENS, dim=0)
    else:
        plan = route(tied_router(method, seed, top_k=EXPERTS), tied_tokens(seed), LABELS)
        return {(token, expert): gate for token, expert, gate in plan_rows(plan)}
    return {
        (token, expert): scores_TE[token, expert].item()
        for token in ROUTED
        for expert in range(EXPERTS)
    }


def rivals(method: str) -> list[list[Pair]]:
    """The groups of pairs of which a method takes the best."""
    if method == "expert_race":
        return [[(token, expert) for token in ROUTED for expert in range(EXPERTS)]]
    if method == "diff_moe":
        return [[(token, expert) for token in ROUTED] for expert in range(EXPERTS)]
    if method in ("expert_choice", "ec_dit"):
        samples = sorted({token // TOKENS for token in ROUTED})
        return [
            [(token, expert) for token in ROUTED if token // TOKENS == sample]
            for sample in samples
            for expert in range(EXPERTS)
        ]
    return [[(token, expert) for expert in range(EXPERTS)] for token in ROUTED]


@pytest.mark.parametrize("method", LOOKING)
@given(seed=st.integers(0, 2**31), data=st.data())
def test_ties_are_resolved_to_a_valid_choice_of_the_best(
    method: str, seed: int, data: st.DataObject
) -> None:
    top_k = 1 if method in ONE_EXPERT else data.draw(st.integers(1, EXPERTS))
    router = tied_router(method, seed, top_k=top_k)
    rows, scores = (
        plan_rows(route(router, tied_tokens(seed), LABELS)),
        scores_of(method, router, seed),
    )
    gates = {(token, expert): gate for token, expert, gate in rows}
    assert len(gates) == len(rows)
    assert gates == pytest.approx({pair: scores[pair] for pair in gates}, abs=1e-12)
    for group in rivals(method):
        taken = sorted((scores[pair] for pair in group if pair in gates), reverse=True)
        best = sorted((scores[pair] for pair in group), reverse=True)
        assert taken == pytest.approx(best[: len(group) * top_k // EXPERTS], abs=1e-12)
