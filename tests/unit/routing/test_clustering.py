"""Offline k-means: finds clusters that are there, is a function of its draws, bears degenerate
tokens.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from promoe_ds.routing.clustering import cluster_tokens

from ..builders import random_tensor


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


def test_clusters_are_a_function_of_tokens_and_draws() -> None:
    tokens = random_tensor(300, 6)
    assert torch.equal(
        cluster_tokens(tokens, uniforms(7), spherical=True),
        cluster_tokens(tokens, uniforms(7), spherical=True),
    )


def test_clusters_of_equal_tokens_are_finite() -> None:
    found = cluster_tokens(torch.ones(20, 4), uniforms(3), spherical=False)
    assert torch.equal(found, torch.ones(3, 4))


def test_clusters_more_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens are too few for 4 clusters"):
        cluster_tokens(random_tensor(3, 4), uniforms(4), spherical=True)
