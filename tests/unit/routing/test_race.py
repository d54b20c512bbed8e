"""Expert Race: how many pairs win in evaluation, its loss by hand, the predicted target."""

from __future__ import annotations

import pytest
import torch

from promoe_ds.routing.race import router_similarity_loss

from ..builders import random_tensor
from .plans import make_router, route


def test_race_evaluation_after_its_own_thresholds_takes_about_k_experts_a_token() -> None:
    router = make_router("expert_race")
    batches = [random_tensor(8, 16, 8, seed=seed, dtype=torch.float64) for seed in range(40)]
    for batch in batches:
        router.update_running_state(route(router, batch, [0] * 8).observation)
    taken = [
        route(router.eval(), batch, [0] * 8).assignment.token_ids_N.numel() / 128
        for batch in batches
    ]
    # 0.95**40 of the start is left; batches of 512 pairs differ by some percent.
    assert sum(taken) / len(taken) == pytest.approx(2.0, rel=0.15)


def test_race_without_patch_values_predicts_no_target() -> None:
    router = make_router("expert_race", patch_values=0)
    plan = route(router, random_tensor(1, 3, 8, dtype=torch.float64), [0])
    assert router.target_head is None and plan.target_patches_BSP is None


@pytest.mark.parametrize(
    ("probabilities", "chosen"),
    [
        # No pair has two experts; E * sum_i (1/E) * (1/E) = 1 on the diagonal.
        (torch.eye(4), torch.eye(4)),
        # Diagonal: E * 1/E^2; pairs: (E^2 - E) * 1/E^2. Together 1.
        (torch.full((6, 4), 0.25), torch.ones(6, 4)),
    ],
    ids=["certainty", "everything chosen"],
)
def test_similarity_loss_by_hand_is_one(probabilities: torch.Tensor, chosen: torch.Tensor) -> None:
    assert router_similarity_loss(probabilities, chosen).item() == pytest.approx(1.0)


def test_similarity_loss_pushes_apart_experts_that_win_the_same_tokens() -> None:
    probabilities = torch.full((2, 3), 1 / 3, requires_grad=True)
    router_similarity_loss(
        probabilities, torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    ).backward()
    # The third expert, which wins nothing, is the one left alone.
    assert (probabilities.grad[:, :2] > 0).all()
    assert torch.equal(probabilities.grad[:, 2], torch.zeros(2))
