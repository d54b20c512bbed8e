"""Classification-guided routing: the superclasses that training needs and nothing else does."""

from __future__ import annotations

import pytest
import torch

from promoe_ds.routing import ClassificationRouter

from ..builders import random_tensor
from .plans import make_router, route


def without_superclasses(weight: float) -> ClassificationRouter:
    settings = make_router("classification", classification_weight=weight).settings
    return ClassificationRouter(8, settings)


def test_classification_training_without_superclasses_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ClassificationRouter needs set_superclasses first"):
        route(without_superclasses(1.0), random_tensor(1, 4, 8), [0])


@pytest.mark.parametrize(("weight", "training"), [(0.0, True), (1.0, False)])
def test_classification_without_loss_needs_no_superclasses(weight: float, training: bool) -> None:
    router = without_superclasses(weight).train(training)
    assert route(router, random_tensor(1, 4, 8), [0]).aux_losses == {}


def test_classification_follows_the_classifier_not_the_label() -> None:
    router, tokens = make_router("classification"), random_tensor(2, 4, 8, dtype=torch.float64)
    plans = [route(router, tokens, labels) for labels in ([0, 1], [3, 2])]
    assert torch.equal(plans[0].stats.tokens_per_expert_BE, plans[1].stats.tokens_per_expert_BE)
    assert plans[0].aux_losses["classification"] != plans[1].aux_losses["classification"]
    assert set(router.state_dict()) == {"classifier.weight", "classifier.bias"}  # and no map
