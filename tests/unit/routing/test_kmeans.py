"""K-means routing against loops: nearest centroids, their means over passes and ranks, their
start.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from promoe_ds.routing.kmeans import euclidean_distances

from ..builders import random_tensor
from . import oracles, oracles_methods
from .plans import NULL, Case, cases, make_router, partition, plan_rows, route


@given(case=cases())
def test_kmeans_any_batch_equals_oracle(case: Case) -> None:
    router = case.router("kmeans")
    case.check(
        router,
        oracles_methods.kmeans(case.batch, router.centroids.tolist(), training=case.training),
    )


def test_kmeans_far_clusters_have_gates_of_one() -> None:
    router = make_router("kmeans")
    router.centroids.copy_(torch.eye(4, 8) * 100)
    rows = plan_rows(route(router, router.centroids[[2, 0, 2]][None] + 0.01, [0]))
    assert [row[:2] for row in rows] == [(1, 0), (0, 2), (2, 2)]
    assert [row[2] for row in rows] == pytest.approx([1.0] * 3)


def test_kmeans_has_no_parameters() -> None:
    router = make_router("kmeans")
    assert list(router.parameters()) == []
    assert set(router.state_dict()) == {"centroids"}


def test_kmeans_gates_move_tokens() -> None:
    tokens = random_tensor(2, 4, 8, dtype=torch.float64).requires_grad_()
    route(make_router("kmeans"), tokens, [0, NULL]).assignment.gates_N.sum().backward()
    assert (tokens.grad[0].abs().sum(dim=-1) > 0).all()
    assert not tokens.grad[1].any()


# What the centroids learn.


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_centroids_become_the_means_of_their_tokens_over_all_passes(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    router = make_router("kmeans", width=3, seed=seed)
    before, members = router.centroids.clone(), {expert: [] for expert in range(4)}
    total = torch.zeros(4, 4, dtype=torch.float64)
    for number, size in enumerate(sizes):
        tokens = random_tensor(size, 2, 3, seed=seed + 5 + number, dtype=torch.float64)
        labels = data.draw(st.lists(st.sampled_from([0, NULL]), min_size=size, max_size=size))
        plan = route(router, tokens, labels)
        total += plan.observation
        for token, expert, _ in plan_rows(plan):
            members[expert].append(tokens.flatten(0, 1)[token].tolist())
    router.update_running_state(total)
    expected = [
        oracles.mean(members[expert]) if members[expert] else before[expert].tolist()
        for expert in range(4)
    ]
    torch.testing.assert_close(
        router.centroids, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_centroids_all_tokens_on_one_leave_the_others() -> None:
    router = make_router("kmeans")
    before, tokens = router.centroids.clone(), random_tensor(2, 3, 8, dtype=torch.float64) * 0.01
    tokens += router.centroids[1]
    plan = route(router, tokens, [0, 1])
    assert plan.assignment.tokens_per_expert_E.tolist() == [0, 6, 0, 0]
    router.update_running_state(plan.observation)
    torch.testing.assert_close(
        router.centroids[1], tokens.flatten(0, 1).mean(dim=0), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(router.centroids[[0, 2, 3]], before[[0, 2, 3]])


def test_centroids_without_routed_tokens_stay() -> None:
    router = make_router("kmeans")
    before = router.centroids.clone()
    router.update_running_state(
        route(router, random_tensor(2, 3, 8, dtype=torch.float64), [NULL, NULL]).observation
    )
    assert torch.equal(router.centroids, before)


def test_centroids_of_bf16_tokens_are_summed_in_fp32() -> None:
    router = make_router("kmeans", dtype=torch.bfloat16, num_experts=1)
    tokens = torch.full((1, 300, 8), 1.0, dtype=torch.bfloat16)
    observation = route(router, tokens, [0]).observation
    assert observation.dtype == torch.float32
    assert observation.tolist() == [[300.0] * 9]  # 256 + 1 is 256 in bf16


def test_centroids_repeated_steps_find_the_clusters() -> None:
    router = make_router("kmeans", num_experts=3, width=2)
    centres = torch.tensor([[10.0, 0.0], [0.0, 10.0], [-10.0, -10.0]], dtype=torch.float64)
    tokens = (centres[:, None] + 0.1 * random_tensor(3, 20, 2, dtype=torch.float64)).flatten(0, 1)[
        None
    ]
    router.centroids.copy_(tokens[0, [0, 20, 40]])
    for _ in range(3):
        router.update_running_state(route(router, tokens, [0]).observation)
    torch.testing.assert_close(
        router.centroids, tokens.view(3, 20, 2).mean(dim=1), rtol=1e-12, atol=1e-12
    )


# Their start.


def backwards(count: int) -> Tensor:
    return torch.arange(count).flip(0)


def test_seed_takes_different_tokens_of_routed_samples() -> None:
    router = make_router("kmeans")
    tokens = random_tensor(3, 2, 8, dtype=torch.float64)
    router.seed(tokens, partition([0, NULL, 1]), backwards)
    assert torch.equal(
        router.centroids, torch.stack([tokens[2, 1], tokens[2, 0], tokens[0, 1], tokens[0, 0]])
    )


def test_seed_fewer_tokens_than_experts_repeats_them() -> None:
    router = make_router("kmeans")
    tokens = random_tensor(1, 3, 8, dtype=torch.float64)
    router.seed(tokens, partition([0]), backwards)
    assert torch.equal(router.centroids, tokens[0, [2, 1, 0, 2]])


def test_seed_without_routed_samples_leaves_the_centroids() -> None:
    router = make_router("kmeans")
    before = router.centroids.clone()
    router.seed(random_tensor(2, 3, 8, dtype=torch.float64), partition([NULL, NULL]), backwards)
    assert torch.equal(router.centroids, before)


def test_seed_leaves_no_graph() -> None:
    router = make_router("kmeans")
    router.seed(
        random_tensor(2, 3, 8, dtype=torch.float64).requires_grad_(), partition([0, 1]), backwards
    )
    assert not router.centroids.requires_grad


# Distances.


@pytest.mark.parametrize(
    ("tokens", "experts"), [(1, 1), (6, 4), (40, 4), (40, 30)]
)  # beyond 25, torch takes matrix products
def test_distances_equal_oracle(tokens: int, experts: int) -> None:
    tokens_TD, centroids = (
        random_tensor(tokens, 5, dtype=torch.float64),
        random_tensor(experts, 5, seed=1, dtype=torch.float64),
    )
    expected = [
        [
            oracles.length([x - c for x, c in zip(token, centroid, strict=True)])
            for centroid in centroids.tolist()
        ]
        for token in tokens_TD.tolist()
    ]
    torch.testing.assert_close(
        euclidean_distances(tokens_TD, centroids),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 3, 5)])
def test_distances_keep_leading_shape(shape: tuple[int, ...]) -> None:
    assert euclidean_distances(random_tensor(*shape), random_tensor(4, 5)).shape == (*shape[:-1], 4)


@pytest.mark.parametrize("tokens", [6, 40])
def test_distances_gradient_is_that_of_finite_differences(tokens: int) -> None:
    tokens_TD = random_tensor(tokens, 3, dtype=torch.float64).requires_grad_()
    centroids = random_tensor(4, 3, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: euclidean_distances(t, centroids), (tokens_TD,))


@pytest.mark.parametrize("tokens", [6, 40])
@pytest.mark.parametrize("shift", [0.0, 1e-6, 1e-3])
def test_distances_near_zero_have_bounded_gradients(tokens: int, shift: float) -> None:
    centroids = random_tensor(4, 64) * 3
    tokens_TD = (centroids.repeat(10, 1)[:tokens] + shift).requires_grad_()
    euclidean_distances(tokens_TD, centroids).sum().backward()
    # A distance's gradient is a unit vector, fp32 rounding aside; four of them meet here.
    assert (tokens_TD.grad.norm(dim=-1) < 6).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_distances_of_bf16_tokens_are_those_of_the_same_numbers_in_fp32(autocast: bool) -> None:
    tokens, centroids = random_tensor(40, 8, dtype=torch.bfloat16), random_tensor(4, 8, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        distances = euclidean_distances(tokens, centroids)
    assert distances.dtype == torch.float32
    assert torch.equal(distances, euclidean_distances(tokens.float(), centroids))
