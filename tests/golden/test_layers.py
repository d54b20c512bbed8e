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
from promoe_ds.routing.assignment import expert_of_rows

from .conftest import Case
from .published import layer_config

#: Grouped GEMM has no float64: it is compared with the same numbers in float32, within that type's
# rounding.
FLOAT32_TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.mark.golden_level("layer")
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_layer_equals_published(case: Case, backend: str) -> None:
    side = case.sidecar
    config = layer_config(side)
    dtype = case.dtype if backend == "loop" else torch.float32
    close = case.tolerance if dtype == case.dtype else FLOAT32_TOLERANCE
    layer = build_moe_layer(config).to(dtype).train(side["mode"] == "train")
    layer.routed.backend = backend
    state = rename_official(
        {f"blocks.1.mlp.{k}": v for k, v in case.tensors("state").items()}, config
    )
    layer.load_state_dict({k.removeprefix("blocks.1.moe."): v for k, v in state.items()})
    routing = config.routing
    is_joinable = layer.router.is_per_sample and routing.num_unconditional_experts == 1
    for joins in (False, True) if is_joinable and routing.top_k == 1 else (False,):
        layer.zero_grad()
        _check_pass(layer, case, config, close, joins=joins)


def _check_pass(layer, case: Case, config, close, *, joins: bool) -> None:
    """Output, choices, losses and gradients; with `joins`, the unconditional expert as one more
    routed one.
    """
    side, dtype = case.sidecar, next(layer.parameters()).dtype
    inputs, expected = case.tensors("in", dtype), case.tensors("out", dtype)
    hidden = inputs["hidden"].requires_grad_()
    # The baselines know no conditional routing: every label is a class.
    labels = inputs.get("labels", torch.zeros(len(hidden), dtype=torch.int64))
    partition = partition_samples(
        ClassCondition(labels, config.model.null_label),
        has_unconditional_expert=config.routing.num_unconditional_experts > 0,
        joins_unconditional=joins,
    )
    output, plan = layer(hidden, partition)
    torch.testing.assert_close(output, expected["hidden"], **close)
    if not joins:
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
    torch.testing.assert_close(hidden.grad, case.tensors("grad_input", dtype)["hidden"], **close)
    gradients = rename_official(
        {f"blocks.1.mlp.{k}": v for k, v in case.tensors("grad", dtype).items()}, config
    )
    unmoved = {
        f"blocks.1.mlp.{name}": torch.zeros(()) for name in side["parameters_without_gradient"]
    }
    gradients |= dict.fromkeys(rename_official(unmoved, config), torch.zeros((), dtype=dtype))
    parameters = {f"blocks.1.moe.{name}": value for name, value in layer.named_parameters()}
    torch.testing.assert_close(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()},
        {name: gradients[name].expand_as(value) for name, value in parameters.items()},
        **close,
    )
    if "threshold_after" in expected:  # the running state after this one pass of one process
        layer.router.update_running_state(plan.observation)
        torch.testing.assert_close(layer.router.thresholds, expected["threshold_after"], **close)


def _check_choices(layer, hidden, partition, case: Case, expected, close) -> None:
    """What was chosen, in whichever form the case states it; lists are compared as sets: ours is
    sorted by expert.
    """
    plan = layer.route(hidden.detach(), partition)
    num_experts = plan.assignment.tokens_per_expert_E.numel()
    batch, tokens, _ = hidden.shape
    gates_TX = torch.zeros(batch * tokens, num_experts + 1, dtype=hidden.dtype)
    rows = plan.assignment.token_ids_N, expert_of_rows(plan.assignment)
    gates_TX[rows] = plan.assignment.gates_N.detach()
    gates = gates_TX.view(batch, tokens, -1)
    gates[partition.unconditional_ids, :, num_experts] = 1.0
    if "expert_indices" in expected:
        weights = expected["router_weights"].to(hidden.dtype)
        reference = torch.zeros_like(gates).scatter_add_(
            -1, expected["expert_indices"].long(), weights
        )
        torch.testing.assert_close(gates, reference, **close)
    if "selection_mask" in expected:
        chosen = (gates[..., :num_experts] != 0).to(hidden.dtype)
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
