"""What the tests of routers share: a small router of every method, plans as rows, the comparison
with an oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.config.routing import METHODS as TRAITS
from promoe_ds.config.routing import RoutingConfig
from promoe_ds.routing import (
    ROUTERS,
    Assignment,
    ClassificationRouter,
    Partition,
    Router,
    RoutingPlan,
    partition_samples,
)
from promoe_ds.routing.assignment import expert_of_rows

from ..builders import random_tensor, randomise
from . import oracles
from .oracles_methods import ORACLES, Batch, counts_of, gate_sums_of

NULL = 10
#: Sums in another order than the oracle's; contrastive losses divide cosines by 0.07.
NEAR = {"rel": 1e-10, "abs": 1e-10}
#: Superclass of each of the ten classes.
SUPERCLASSES = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


#: What routers of these tests have instead of the recipes' defaults.
_SETTINGS: dict[str, dict[str, Any]] = {
    "dit_moe": {"balance_weight": 0.25},
    "diff_moe": {"capacity_weight": 0.5},
    "expert_race": {"similarity_weight": 0.25},
    "classification": {"classification_weight": 0.5, "superclass_map": "digits"},
}
METHODS = tuple(ROUTERS)
ONE_EXPERT = tuple(method for method in METHODS if TRAITS[method].single_choice)
#: Those whose gates depend on the tokens.
LOOKING = tuple(method for method in METHODS if method != "hash")
WITH_STATE = ("diff_moe", "expert_race", "kmeans")


def make_router(
    method: str,
    width: int = 8,
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float64,
    num_experts: int = 4,
    top_k: int = 2,
    patch_values: int = 3,
    **settings: Any,
) -> Router:
    """Build a router with random parameters and running state, in training mode."""
    extra = {"patch_values": patch_values} if method == "expert_race" else {}
    routing = RoutingConfig(
        method=method,
        num_experts=num_experts,
        top_k=1 if method in ONE_EXPERT else top_k,
        **{**_SETTINGS.get(method, {}), **settings},
    )
    router = ROUTERS[method](width, routing, **extra)
    randomise(router, seed, std=0.6)
    give_state(router, seed + 1)
    return router.to(dtype).train()


def give_state(router: Router, seed: int) -> None:
    """Give a router running state, and the superclasses that a classifier needs."""
    for name, buffer in router.named_buffers():
        # Thresholds are among the values that they are compared with, centroids among the tokens.
        values = random_tensor(*buffer.shape, seed=seed)
        buffer.copy_(values if name == "centroids" else 0.3 + 0.4 * values.sigmoid())
    if isinstance(router, ClassificationRouter):
        experts = router.num_experts
        router.set_superclasses([superclass_of(label, experts) for label in range(NULL)])


def partition(labels: list[int], *, unconditional: bool = True) -> Partition:
    return partition_samples(
        ClassCondition(torch.tensor(labels), NULL), has_unconditional_expert=unconditional
    )


def route(
    router: Router, tokens_BSD: Tensor, labels: list[int], *, unconditional: bool = True
) -> RoutingPlan:
    return router(tokens_BSD, partition(labels, unconditional=unconditional))


def plan_rows(plan: RoutingPlan) -> list[tuple[int, int, float]]:
    """Return the plan's list as (token, expert, gate)."""
    return assignment_rows(plan.assignment)


def assignment_rows(assignment: Assignment) -> list[tuple[int, int, float]]:
    """Return an assignment's list as (token, expert, gate)."""
    columns = assignment.token_ids_N, expert_of_rows(assignment), assignment.gates_N
    return list(zip(*(column.tolist() for column in columns), strict=True))


def superclass_of(label: int, num_experts: int) -> int:
    """Return the superclass that these tests give a class."""
    return SUPERCLASSES[label] % num_experts


@dataclass(frozen=True, kw_only=True)
class Case:
    """A drawn batch and the settings that every method has."""

    labels: list[int]
    tokens: int
    width: int
    num_experts: int
    top_k: int
    unconditional: bool
    training: bool
    seed: int

    @property
    def tokens_BSD(self) -> Tensor:
        return random_tensor(
            len(self.labels), self.tokens, self.width, seed=self.seed, dtype=torch.float64
        )

    @property
    def batch(self) -> Batch:
        """The same for an oracle."""
        routed, _ = oracles.partition(
            self.labels, NULL, has_unconditional_expert=self.unconditional
        )
        superclasses = [
            None if label == NULL else superclass_of(label, self.num_experts)
            for label in self.labels
        ]
        return Batch(self.tokens_BSD.tolist(), routed, superclasses)

    def router(self, method: str, **settings: Any) -> Router:
        router = make_router(
            method,
            self.width,
            seed=self.seed + 7,
            num_experts=self.num_experts,
            top_k=self.top_k,
            **settings,
        )
        return router.train(self.training)


@st.composite
def cases(draw: st.DrawFn, *, all_experts_in_reach: bool = False) -> Case:
    """Draw a case; with `all_experts_in_reach`, S * K >= E."""
    num_experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, num_experts))
    least = -(-num_experts // top_k) if all_experts_in_reach else 1
    return Case(
        labels=draw(st.lists(st.sampled_from([0, 9, NULL]), min_size=1, max_size=4)),
        width=draw(st.integers(2, 5)),
        tokens=draw(st.integers(least, max(least, 5))),
        num_experts=num_experts,
        top_k=top_k,
        unconditional=draw(st.booleans()),
        training=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def check_against_oracle(case: Case, method: str, **settings: Any) -> None:
    """Compare a router's whole plan with the oracle's; in evaluation, nothing is to be learned."""
    router, batch = case.router(method, **settings), case.batch
    plan = route(router, case.tokens_BSD, case.labels, unconditional=case.unconditional)
    state = {name: value.tolist() for name, value in router.state_dict().items()}
    expected = ORACLES[method](batch, state, router.settings, case.training)
    rows, found = oracles.assignment_rows(expected.rows), plan_rows(plan)
    assert [row[:2] for row in found] == [row[:2] for row in rows]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in rows], **NEAR)
    counts = counts_of(rows, batch, router.num_experts)
    assert plan.stats.tokens_per_expert_BE.tolist() == counts
    assert plan.assignment.tokens_per_expert_E.tolist() == [
        sum(column) for column in zip(*counts, strict=True)
    ]
    assert plan.stats.gate_sums_BE.sum(dim=1).tolist() == pytest.approx(
        gate_sums_of(rows, batch), **NEAR
    )
    assert plan.stats.is_routed_B.tolist() == [
        place in batch.routed for place in range(len(batch.samples))
    ]
    similarity = oracles.mean_similarity(router.expert_keys_ED().tolist())
    assert plan.stats.prototype_similarity.item() == pytest.approx(similarity, **NEAR)
    losses = {name: loss.item() for name, loss in plan.aux_losses.items()}
    assert losses == pytest.approx(expected.losses if case.training else {}, **NEAR)
    _check_tensor(plan.observation, expected.observation if case.training else None)
    _check_tensor(plan.target_patches_BSP, expected.target if case.training else None)


def _check_tensor(found: Tensor | None, expected: Any) -> None:
    assert (found is None) == (expected is None)
    if found is not None:
        torch.testing.assert_close(
            found.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10
        )
