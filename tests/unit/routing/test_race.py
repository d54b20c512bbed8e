"""Expert Race against loops: the race over all pairs, its loss, threshold and prediction of the
target.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from promoe_ds.routing import ExpertRaceRouter
from promoe_ds.routing.race import router_similarity_loss

from ..builders import random_tensor
from . import oracles_methods
from .plans import NEAR, NULL, Case, cases, make_router, route


def network(router: ExpertRaceRouter) -> oracles_methods.RaceNetwork:
    head = router.target_head
    return oracles_methods.RaceNetwork(
        router.hidden.weight.tolist(),
        router.hidden.bias.tolist(),
        router.gate_weight.tolist(),
        head.weight.tolist(),
        head.bias.tolist(),
    )


@given(case=cases(), activation=st.sampled_from(["identity", "sigmoid", "softmax"]))
def test_race_any_batch_equals_oracle(case: Case, activation: str) -> None:
    router = case.router("expert_race", activation=activation)
    case.check(
        router,
        oracles_methods.expert_race(
            case.batch,
            network(router),
            router.threshold.item(),
            top_k=case.top_k,
            activation=activation,
            similarity_weight=router.settings.similarity_weight,
            training=case.training,
        ),
    )


# The race.


def test_race_tokens_may_have_any_number_of_experts() -> None:
    plan = route(make_router("expert_race"), random_tensor(2, 6, 8, dtype=torch.float64), [0, 1])
    per_token = torch.bincount(plan.assignment.token_ids_N, minlength=12)
    assert plan.assignment.token_ids_N.numel() == 2 * 12  # K * T in all
    assert len(per_token.unique()) > 1


def test_race_all_pairs_may_be_of_one_expert() -> None:
    router = make_router("expert_race", top_k=1)
    with torch.no_grad():
        router.hidden.bias.fill_(30.0)  # gelu leaves it as it is: every logit of expert 2 is far up
        router.gate_weight[2] = 10.0
    plan = route(router, random_tensor(2, 3, 8, dtype=torch.float64), [0, 1])
    assert plan.assignment.tokens_per_expert_E.tolist() == [0, 0, 6, 0]


@pytest.mark.parametrize(("threshold", "number"), [(-1e9, 24), (1e9, 0)])
def test_race_evaluation_takes_every_pair_over_the_threshold(threshold: float, number: int) -> None:
    router = make_router("expert_race").eval()
    router.threshold.fill_(threshold)
    plan = route(router, random_tensor(2, 3, 8, dtype=torch.float64), [0, 1])
    assert plan.assignment.token_ids_N.numel() == number


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


# Losses.


def test_race_weight_zero_has_no_loss() -> None:
    router = make_router("expert_race", similarity_weight=0.0)
    assert route(router, random_tensor(1, 3, 8, dtype=torch.float64), [0]).aux_losses == {}


def test_race_without_patch_values_predicts_no_target() -> None:
    router = make_router("expert_race", patch_values=0)
    assert router.target_head is None
    assert (
        route(router, random_tensor(1, 3, 8, dtype=torch.float64), [0]).target_patches_BSP is None
    )


def test_race_target_is_predicted_for_null_samples_too_and_in_training_only() -> None:
    router = make_router("expert_race", patch_values=5)
    tokens = random_tensor(3, 4, 8, dtype=torch.float64)
    assert route(router, tokens, [0, NULL, NULL]).target_patches_BSP.shape == (3, 4, 5)
    assert route(router.eval(), tokens, [0, NULL, NULL]).target_patches_BSP is None


@given(
    tokens=st.integers(0, 5),
    experts=st.integers(1, 4),
    density=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_similarity_loss_any_choice_equals_oracle(
    tokens: int, experts: int, density: float, seed: int
) -> None:
    probabilities = random_tensor(tokens, experts, seed=seed, dtype=torch.float64).softmax(dim=-1)
    chosen = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < density
    loss = router_similarity_loss(probabilities, chosen.double())
    assert loss.item() == pytest.approx(
        oracles_methods.similarity_loss(probabilities.tolist(), chosen.tolist(), experts), **NEAR
    )


def test_similarity_loss_one_expert_each_with_certainty_is_one() -> None:
    # No pair has two experts; E * sum_i (1/E) * (1/E) = 1 on the diagonal.
    assert router_similarity_loss(torch.eye(4), torch.eye(4)) == 1


def test_similarity_loss_even_probabilities_everything_chosen() -> None:
    # Diagonal: E * 1/E^2; pairs: (E^2 - E) * 1/E^2. Together 1.
    assert router_similarity_loss(
        torch.full((6, 4), 0.25), torch.ones(6, 4)
    ).item() == pytest.approx(1.0)


def test_similarity_loss_pushes_apart_experts_that_win_the_same_tokens() -> None:
    probabilities = torch.full((2, 3), 1 / 3, requires_grad=True)
    router_similarity_loss(
        probabilities, torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    ).backward()
    # The third expert, which wins nothing, is the one left alone.
    assert (probabilities.grad[:, :2] > 0).all()
    assert torch.equal(probabilities.grad[:, 2], torch.zeros(2))


def test_similarity_loss_gradient_is_that_of_finite_differences() -> None:
    probabilities = random_tensor(5, 3, dtype=torch.float64).softmax(dim=-1).requires_grad_()
    chosen = (random_tensor(5, 3, seed=1, dtype=torch.float64) > 0).double()
    assert torch.autograd.gradcheck(lambda p: router_similarity_loss(p, chosen), (probabilities,))


# The threshold.


def test_threshold_moves_a_twentieth_of_the_way_to_the_lowest_winner() -> None:
    router = make_router("expert_race")
    before = router.threshold.item()
    plan = route(router, random_tensor(2, 4, 8, dtype=torch.float64), [0, 1])
    router.update_running_state(plan.observation)
    assert router.threshold.item() == pytest.approx(
        0.95 * before + 0.05 * plan.assignment.gates_N.min().item(), rel=1e-12
    )


def test_threshold_of_several_passes_moves_once_towards_their_mean() -> None:
    router = make_router("expert_race")
    before = router.threshold.item()
    batches = [
        (random_tensor(2, 4, 8, seed=seed, dtype=torch.float64), labels)
        for seed, labels in enumerate([[0, 1], [NULL, NULL], [NULL, 3]])
    ]
    plans = [route(router, *batch) for batch in batches]
    router.update_running_state(torch.stack([plan.observation for plan in plans]).sum(dim=0))
    # The pass without routed samples does not count.
    mean = (plans[0].assignment.gates_N.min().item() + plans[2].assignment.gates_N.min().item()) / 2
    assert router.threshold.item() == pytest.approx(0.95 * before + 0.05 * mean, rel=1e-12)


def test_threshold_without_tokens_stays() -> None:
    router = make_router("expert_race")
    before = router.threshold.clone()
    router.update_running_state(
        route(router, random_tensor(1, 4, 8, dtype=torch.float64), [NULL]).observation
    )
    assert torch.equal(router.threshold, before)
