"""Classification-guided routing against loops: one expert a sample, the loss over labelled
samples.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from promoe_ds.routing import ClassificationRouter
from promoe_ds.routing.classification import classification_loss

from ..builders import random_tensor
from . import oracles, oracles_methods
from .plans import NEAR, NULL, SUPERCLASSES, Case, cases, make_router, partition, route


@given(case=cases())
def test_classification_any_batch_equals_oracle(case: Case) -> None:
    router = case.router("classification")
    superclass_of = [superclass % case.num_experts for superclass in SUPERCLASSES]
    case.check(
        router,
        oracles_methods.classification(
            case.batch,
            router.classifier.weight.tolist(),
            router.classifier.bias.tolist(),
            superclass_of,
            null_label=NULL,
            loss_weight=router.settings.classification_weight,
            training=case.training,
        ),
    )


def test_classification_all_tokens_of_a_sample_have_one_expert_and_one_gate() -> None:
    plan = route(
        make_router("classification"), random_tensor(3, 4, 8, dtype=torch.float64), [0, 1, 2]
    )
    assert sorted(plan.stats.tokens_per_expert_BE.max(dim=1).values.tolist()) == [4, 4, 4]
    gates = torch.zeros(12, dtype=torch.float64).index_put(
        (plan.assignment.token_ids_N,), plan.assignment.gates_N.detach()
    )
    assert (gates.view(3, 4) == gates.view(3, 4)[:, :1]).all()


def test_classification_follows_the_classifier_not_the_label() -> None:
    router = make_router("classification")
    tokens = random_tensor(2, 4, 8, dtype=torch.float64)
    plans = [route(router, tokens, labels) for labels in ([0, 1], [3, 2])]
    assert torch.equal(plans[0].stats.tokens_per_expert_BE, plans[1].stats.tokens_per_expert_BE)
    assert plans[0].aux_losses["classification"] != plans[1].aux_losses["classification"]


@pytest.mark.parametrize("unconditional", [True, False])
def test_classification_null_samples_do_not_count_in_the_loss(unconditional: bool) -> None:
    router = make_router("classification")
    tokens = random_tensor(3, 4, 8, dtype=torch.float64)
    loss = route(router, tokens, [0, NULL, 5], unconditional=unconditional).aux_losses[
        "classification"
    ]
    alone = route(router, tokens[[0, 2]], [0, 5]).aux_losses["classification"]
    assert loss.item() == pytest.approx(alone.item(), **NEAR)


def test_classification_training_without_superclasses_is_an_error() -> None:
    router = ClassificationRouter(8, make_router("classification").settings)
    with pytest.raises(
        RuntimeError, match="training a ClassificationRouter needs set_superclasses first"
    ):
        route(router, random_tensor(1, 4, 8), [0])


@pytest.mark.parametrize(("loss_weight", "training"), [(0.0, True), (1.0, False)])
def test_classification_without_loss_needs_no_superclasses(
    loss_weight: float, training: bool
) -> None:
    router = ClassificationRouter(
        8, make_router("classification", classification_weight=loss_weight).settings
    ).train(training)
    assert route(router, random_tensor(1, 4, 8), [0]).aux_losses == {}


def test_classification_map_is_no_part_of_the_saved_state() -> None:
    assert set(make_router("classification").state_dict()) == {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize("autocast", [False, True])
def test_classification_of_bf16_tokens_is_that_of_the_same_numbers_in_fp32(autocast: bool) -> None:
    router, tokens = (
        make_router("classification", dtype=torch.bfloat16),
        random_tensor(4, 6, 8, dtype=torch.bfloat16),
    )
    exact = make_router("classification", dtype=torch.float32)
    exact.load_state_dict(router.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plan = router(tokens, partition([0, 1, 2, NULL]))
    expected = exact(tokens.float(), partition([0, 1, 2, NULL]))
    assert torch.equal(plan.assignment.gates_N, expected.assignment.gates_N)
    assert torch.equal(plan.assignment.token_ids_N, expected.assignment.token_ids_N)
    assert torch.equal(plan.aux_losses["classification"], expected.aux_losses["classification"])


@given(
    samples=st.integers(1, 5), experts=st.integers(1, 4), seed=st.integers(0, 2**31), data=st.data()
)
def test_classification_loss_any_labels_equals_oracle(
    samples: int, experts: int, seed: int, data: st.DataObject
) -> None:
    logits = random_tensor(samples, experts, seed=seed, dtype=torch.float64)
    targets = data.draw(st.lists(st.integers(0, experts - 1), min_size=samples, max_size=samples))
    labelled = data.draw(st.lists(st.booleans(), min_size=samples, max_size=samples))
    terms = [
        -torch.tensor(oracles.softmax(row)[target], dtype=torch.float64).log().item()
        for row, target, counts in zip(logits.tolist(), targets, labelled, strict=True)
        if counts
    ]
    loss = classification_loss(logits, torch.tensor(targets), torch.tensor(labelled))
    assert loss.item() == pytest.approx(sum(terms) / len(terms) if terms else 0.0, **NEAR)


def test_classification_loss_without_labels_is_zero_with_zero_gradient() -> None:
    logits = random_tensor(2, 3).requires_grad_()
    loss = classification_loss(logits, torch.tensor([0, 2]), torch.tensor([False, False]))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros(2, 3))


def test_classification_loss_gradient_is_that_of_finite_differences() -> None:
    logits = random_tensor(3, 4, dtype=torch.float64).requires_grad_()
    targets, labelled = torch.tensor([1, 0, 3]), torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda z: classification_loss(z, targets, labelled), (logits,))
