"""Parity of MoE layers with the published implementation: outputs, choices, losses, every
gradient.
"""

from __future__ import annotations

import pytest
import torch

from promoe_ds.condition import ClassCondition
from promoe_ds.model.build import build_moe_layer
from promoe_ds.model.official import rename_official
from promoe_ds.routing import partition_samples

from .conftest import Case
from .published import layer_config, method_of

#: Grouped GEMM has no float64: it is held against the same numbers in float32, within that type's
# rounding.
FLOAT32_TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.mark.golden_level("layer")
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_layer_equals_published(case: Case, backend: str) -> None:
    side = case.sidecar
    config = layer_config(side["hyperparameters"], method_of(side["model_class"]))
    dtype = case.dtype if backend == "loop" else torch.float32
    close = dict(side["tolerance"]) if dtype == case.dtype else dict(FLOAT32_TOLERANCE)
    close.pop("note", None)
    layer = build_moe_layer(config).to(dtype).train(side["mode"] == "train")
    layer.routed.backend = backend
    state = rename_official(
        {f"blocks.1.mlp.{k}": v for k, v in case.tensors("state").items()}, config
    )
    layer.load_state_dict({k.removeprefix("blocks.1.moe."): v for k, v in state.items()})
    inputs, expected = _cast(case.tensors("in"), dtype), _cast(case.tensors("out"), dtype)
    hidden = inputs["hidden"].requires_grad_()
    # The baselines know no conditional routing: every label is a class.
    labels = inputs.get("labels", torch.zeros(len(hidden), dtype=torch.int64))
    partition = partition_samples(
        ClassCondition(labels, config.model.null_label),
        has_unconditional_expert=config.routing.num_unconditional_experts > 0,
    )
    output, plan = layer(hidden, partition)
    torch.testing.assert_close(output, expected["hidden"], **close)
    _check_choices(layer, hidden, partition, case, expected, close)
    if "objective_weights" not in inputs:
        assert side["objective"] is None, "the case has an objective but no weights for it"
        return
    _check_losses(plan.aux_losses, side["aux_loss"], config.routing, close)
    objective = (output * inputs["objective_weights"]).sum() + sum(plan.aux_losses.values())
    objective.backward()
    assert objective.item() == pytest.approx(
        side["objective_value"], rel=close["rtol"], abs=close["atol"]
    )
    torch.testing.assert_close(
        hidden.grad, _cast(case.tensors("grad_input"), dtype)["hidden"], **close
    )
    gradients = _cast(
        rename_official({f"blocks.1.mlp.{k}": v for k, v in case.tensors("grad").items()}, config),
        dtype,
    )
    for name, parameter in layer.named_parameters():
        reference = gradients.get(f"blocks.1.moe.{name}")
        if reference is None:
            assert _stands_in(name, side["parameters_without_gradient"]), (
                f"{name}: no reference gradient"
            )
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(
            gradient,
            reference if reference is not None else torch.zeros_like(parameter),
            **close,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    _check_observation(layer, plan, expected, close)


def _cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def _stands_in(name: str, published: list[str]) -> bool:
    leaf = (
        name.removeprefix("router.")
        .replace("predictor.up", "capacity_predictor.0")
        .replace("predictor.down", "capacity_predictor.2")
    )
    return leaf in published


def _check_choices(layer, hidden, partition, case: Case, expected, close) -> None:
    """What was chosen, in whichever form the case states it; lists are compared as sets: ours is
    sorted by expert.
    """
    plan = layer.route(hidden.detach(), partition)
    num_experts = plan.assignment.tokens_per_expert_E.numel()
    batch, tokens, _ = hidden.shape
    gates = torch.zeros(batch * tokens, num_experts + 1, dtype=hidden.dtype)
    experts = torch.repeat_interleave(
        torch.arange(num_experts), plan.assignment.tokens_per_expert_E
    )
    gates[plan.assignment.token_ids_N, experts] = plan.assignment.gates_N.detach()
    gates.view(batch, tokens, -1)[partition.unconditional_ids, :, num_experts] = 1.0
    if "expert_indices" in expected:
        reference = torch.zeros_like(gates).view(batch, tokens, -1)
        reference.scatter_add_(
            -1, expected["expert_indices"].long(), expected["router_weights"].to(hidden.dtype)
        )
        torch.testing.assert_close(gates.view(batch, tokens, -1), reference, **close)
    if "selection_mask" in expected:
        chosen = (gates.view(batch, tokens, -1)[..., :num_experts] != 0).to(hidden.dtype)
        assert torch.equal(chosen, expected["selection_mask"])
    stated = case.sidecar.get("routing", {})
    counts = plan.assignment.tokens_per_expert_E.tolist()
    if "assignments_per_expert" in stated:
        assert counts == stated["assignments_per_expert"]
    if (whole := stated.get("tokens_per_expert_whole_batch")) is not None:
        assert counts == (whole if isinstance(whole, list) else [whole] * num_experts)
    if "tokens_per_expert_per_sample" in stated:
        per_sample = plan.stats.tokens_per_expert_BE[partition.is_routed_B]
        assert (per_sample == stated["tokens_per_expert_per_sample"]).all()


def _check_losses(aux_losses, expected, routing, close) -> None:
    expected = expected or {}
    near = {"rel": close["rtol"], "abs": close["atol"]}
    for ours, theirs in {"rcl": "routing_contrastive", "balance": "load_balance"}.items():
        if expected.get(theirs) is not None:
            assert aux_losses[ours].item() == pytest.approx(expected[theirs], **near)
    if "capacity_prediction_bce" in expected:
        bce = aux_losses["capacity"].item() / routing.capacity_weight
        assert bce == pytest.approx(expected["capacity_prediction_bce"], **near)
        assert expected["weight"] == routing.capacity_weight
        return
    # No loss at all in the reference (null) is the constant 0 here.
    total = float(sum(loss.detach() for loss in aux_losses.values()))
    assert total == pytest.approx(expected.get("total") or 0.0, **near)


def _check_observation(layer, plan, expected, close) -> None:
    """The running state after this one pass of one process."""
    if "threshold_after" not in expected:
        return
    layer.router.update_running_state(plan.observation)
    torch.testing.assert_close(layer.router.thresholds, expected["threshold_after"], **close)
