"""K-means routing: the centroids' means over passes and ranks, their start, distances."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from promoe_ds.routing.clustering import cluster_tokens
from promoe_ds.routing.kmeans import euclidean_distances

from ..builders import random_tensor
from . import oracles
from .plans import NEAR, NULL, make_router, partition, plan_rows, route

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


def test_centroids_of_bf16_tokens_are_summed_in_fp32() -> None:
    router = make_router("kmeans", dtype=torch.bfloat16, num_experts=1)
    tokens = torch.full((1, 300, 8), 1.0, dtype=torch.bfloat16)
    observation = route(router, tokens, [0]).observation
    assert observation.dtype == torch.float32
    assert observation.tolist() == [[300.0] * 9]  # 256 + 1 is 256 in bf16


# Their start.


@pytest.mark.parametrize(
    ("labels", "places"),
    [
        ([0, NULL, 1], [5, 4, 1, 0]),  # the last of the routed ones first, as `backwards` says
        ([NULL, 1, NULL], [3, 2, 3, 2]),  # fewer tokens than experts: again
    ],
)
def test_seed_takes_tokens_of_routed_samples(labels: list[int], places: list[int]) -> None:
    router = make_router("kmeans")
    tokens = random_tensor(3, 2, 8, dtype=torch.float64).requires_grad_()
    router.seed(tokens, partition(labels), backwards)
    assert torch.equal(router.centroids, tokens.flatten(0, 1)[places])
    assert not router.centroids.requires_grad


def backwards(count: int) -> Tensor:
    return torch.arange(count).flip(0)


def test_seed_without_routed_samples_leaves_the_centroids() -> None:
    router = make_router("kmeans")
    before = router.centroids.clone()
    router.seed(random_tensor(2, 3, 8, dtype=torch.float64), partition([NULL, NULL]), backwards)
    assert torch.equal(router.centroids, before)


# Distances.


@pytest.mark.parametrize(
    ("tokens", "experts"), [(1, 1), (6, 4), (40, 4), (40, 30)]
)  # beyond 25, torch takes matrix products
def test_distances_equal_oracle(tokens: int, experts: int) -> None:
    tokens_TD = random_tensor(tokens, 5, dtype=torch.float64)
    centroids = random_tensor(experts, 5, seed=1, dtype=torch.float64)
    expected = [
        [oracles.distance(token, centroid) for centroid in centroids.tolist()]
        for token in tokens_TD.tolist()
    ]
    found = euclidean_distances(tokens_TD[None], centroids)[0]
    assert found.tolist() == [pytest.approx(row, **NEAR) for row in expected]


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


def uniforms(count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spherical", [True, False])
def test_clusters_far_apart_are_found(spherical: bool) -> None:
    centres = 10 * torch.eye(5, 8)
    label_T = torch.arange(200) % 5
    tokens = centres[label_T] + 0.1 * random_tensor(200, 8)
    found = cluster_tokens(tokens, uniforms(5), spherical=spherical)
    expected = torch.stack(
        [
            (
                F.normalize(tokens, dim=-1)[label_T == k].mean(0)
                if spherical
                else tokens[label_T == k].mean(0)
            )
            for k in range(5)
        ]
    )
    expected = F.normalize(expected, dim=-1) if spherical else expected
    match = torch.cdist(expected, found).argmin(dim=1)
    assert sorted(match.tolist()) == list(range(5))
    torch.testing.assert_close(found[match], expected, rtol=1e-5, atol=1e-5)


def test_clusters_of_equal_tokens_are_finite() -> None:
    found = cluster_tokens(torch.ones(20, 4), uniforms(3), spherical=False)
    assert torch.equal(found, torch.ones(3, 4))


def test_clusters_more_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens are too few for 4 clusters"):
        cluster_tokens(random_tensor(3, 4), uniforms(4), spherical=True)
