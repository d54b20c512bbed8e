"""The training module: terms that add up, and Expert Race's per-layer term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.diffusion import DiffusionBatch
from promoe_ds.training.router_state import give_superclasses
from promoe_ds.training.step import TrainingModule, TrainingOutput

from ..builders import METHODS, of_method, random_network, random_tensor

NULL = 10
#: Terms of every method beside the objective's own.
TERMS = {
    "token_choice": {"rcl"},
    "expert_choice": {"rcl"},
    "dit_moe": set(),
    "ec_dit": set(),
    "diff_moe": {"capacity"},
    "expert_race": {"similarity", "per_layer"},
    "classification": {"classification"},
    "kmeans": set(),
    "hash": set(),
}


def batch_of(labels: list[int], channels: int = 1) -> DiffusionBatch:
    images = len(labels)
    return DiffusionBatch(
        random_tensor(images, channels, 4, 4),
        random_tensor(images, channels, 4, 4, seed=1),
        torch.linspace(0.1, 0.9, images),
        ClassCondition(torch.tensor(labels), 10),
    )


def make_module(
    method: str,
    model: dict[str, Any] | None = None,
    diffusion: dict[str, Any] | None = None,
    **routing: Any,
) -> TrainingModule:
    sections = {
        "model": {"depth": 4, **(model or {})},
        "diffusion": diffusion or {},
        **of_method(method, **routing),
    }
    network = random_network(**sections).train()
    give_superclasses(network, network.config)
    return TrainingModule(network).train()


def patches_of(image: Tensor, size: int) -> list[list[float]]:
    """The values of an image's patches, row by row; within a patch row, column, channel."""
    channels, height, width = image.shape
    return [
        [
            image[c, y + dy, x + dx].item()
            for dy in range(size)
            for dx in range(size)
            for c in range(channels)
        ]
        for y in range(0, height, size)
        for x in range(0, width, size)
    ]


@pytest.mark.parametrize("objective", ["rectified_flow", "ddpm"])
@pytest.mark.parametrize("method", METHODS)
def test_terms_are_named_add_up_to_the_loss_and_reach_every_parameter(
    method: str, objective: str
) -> None:
    module = make_module(method, diffusion={"objective": objective})
    output = module(batch_of([3, NULL, 0]))
    own = {"diffusion"} | ({"vlb"} if objective == "ddpm" else set())
    assert set(output.terms) == own | TERMS[method]
    assert all(term.shape == () and term.isfinite() for term in output.terms.values())
    torch.testing.assert_close(output.loss, sum(output.terms.values()))
    # The log reduces them over ranks by name.
    assert list(module(batch_of([NULL, NULL])).terms) == list(output.terms)
    output.loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert set(module.eval()(batch_of([3, NULL, 0])).terms) == own


def test_terms_of_two_layers_are_summed() -> None:
    output = make_module("diff_moe")(batch_of([3, NULL, 0]))
    losses = [plan.aux_losses["capacity"] for plan in output.plans.values()]
    assert len(losses) == 2
    torch.testing.assert_close(output.terms["capacity"], losses[0] + losses[1])


def per_layer_by_hand(
    module: TrainingModule, batch: DiffusionBatch, output: TrainingOutput
) -> float:
    network = module.denoiser
    target = module.objective.target(batch)
    errors = []
    for plan in output.plans.values():
        pairs = [
            (predicted, value)
            for b, image in enumerate(target)
            for token, values in enumerate(patches_of(image, network.config.model.patch_size))
            for predicted, value in zip(
                plan.target_patches_BSP[b, token].tolist(), values, strict=True
            )
        ]
        errors.append(sum((a - b) ** 2 for a, b in pairs) / len(pairs))
    return network.config.routing.per_layer_weight * sum(errors) / len(errors)


@pytest.mark.parametrize("objective", ["rectified_flow", "ddpm"])
@pytest.mark.parametrize(("channels", "learn_sigma", "weight"), [(1, True, 0.01), (3, True, 0.5)])
def test_per_layer_term_is_the_mean_error_of_the_layers_predictions(
    objective: str, channels: int, learn_sigma: bool, weight: float
) -> None:
    module = make_module(
        "expert_race",
        {"in_channels": channels, "learn_sigma": learn_sigma},
        {"objective": objective},
        per_layer_weight=weight,
    )
    batch = batch_of([3, NULL, 0], channels)
    output = module(batch)
    assert output.terms["per_layer"].item() == pytest.approx(
        per_layer_by_hand(module, batch, output), rel=1e-5
    )


def test_per_layer_term_alone_moves_heads_hidden_layers_and_what_is_below() -> None:
    without = make_module("expert_race", per_layer_weight=0.0)
    assert "per_layer" not in without(batch_of([3, 0])).terms
    module = make_module("expert_race")
    module(batch_of([3, NULL, 0])).terms["per_layer"].backward()
    moved = {
        name
        for name, parameter in module.denoiser.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    for block in (1, 3):
        assert {
            f"blocks.{block}.moe.router.{name}"
            for name in ("hidden.weight", "hidden.bias", "target_head.weight", "target_head.bias")
        } <= moved
    assert "patch_embedding.proj.weight" in moved and "blocks.1.moe.routed.up_weight" in moved
    # The gates decide, they predict nothing; the last layer's experts and the output come after
    # every prediction.
    assert not any(name.endswith("gate_weight") and ".3." in name for name in moved)
    assert not any(
        name.startswith(("blocks.3.moe.routed", "blocks.3.moe.shared", "final_layer"))
        for name in moved
    )
