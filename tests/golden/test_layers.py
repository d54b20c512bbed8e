"""Parity of MoE layers with the published implementation: outputs, choices, losses, every gradient."""

from __future__ import annotations

import pytest
import torch

from promoe_ds.model.build import build_moe_layer
from promoe_ds.model.official import rename_official
from promoe_ds.routing import partition_samples

from .conftest import Case
from .published import layer_config, method_or_skip

#: Grouped GEMM has no float64: it is held against the same numbers in float32, within that type's rounding.
FLOAT32_TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.mark.golden_level("layer")
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_layer_equals_published(case: Case, backend: str) -> None:
    side = case.sidecar
    config = layer_config(side["hyperparameters"], method_or_skip(side["model_class"]))
    dtype = case.dtype if backend == "loop" else torch.float32
    close = dict(side["tolerance"]) if dtype == case.dtype else dict(FLOAT32_TOLERANCE)
    close.pop("note", None)
    layer = build_moe_layer(config).to(dtype).train(side["mode"] == "train")
    layer.routed.backend = backend
    state = rename_official({f"blocks.1.mlp.{k}": v for k, v in case.tensors("state").items()}, config)
    layer.load_state_dict({k.removeprefix("blocks.1.moe."): v for k, v in state.items()})
    inputs, expected = _cast(case.tensors("in"), dtype), _cast(case.tensors("out"), dtype)
    hidden = inputs["hidden"].requires_grad_()
    partition = partition_samples(inputs["labels"], config.model.null_label,
                                  has_unconditional_expert=config.routing.num_unconditional_experts > 0)
    output, plan = layer(hidden, partition)
    torch.testing.assert_close(output, expected["hidden"], **close)
    assert plan.assignment.tokens_per_expert_E.tolist() == side["routing"]["assignments_per_expert"]
    _check_choices(layer, hidden, partition, expected, close)
    if side["mode"] != "train":
        return
    _check_losses(plan.aux_losses, side["aux_loss"], close)
    objective = (output * inputs["objective_weights"]).sum() + sum(plan.aux_losses.values())
    objective.backward()
    assert objective.item() == pytest.approx(side["objective_value"], rel=close["rtol"], abs=close["atol"])
    torch.testing.assert_close(hidden.grad, _cast(case.tensors("grad_input"), dtype)["hidden"], **close)
    gradients = _cast(rename_official({f"blocks.1.mlp.{k}": v for k, v in case.tensors("grad").items()}, config), dtype)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[f"blocks.1.moe.{name}"], **close, msg=lambda m, n=name: f"{n}: {m}")


def _cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


def _check_choices(layer, hidden, partition, expected, close) -> None:
    """Gates and experts of each routed token, as sets: the list is sorted by expert, the reference by score."""
    plan = layer.route(hidden.detach(), partition)
    num_experts = plan.assignment.tokens_per_expert_E.numel()
    batch, tokens, _ = expected["expert_indices"].shape
    gates = torch.zeros(batch * tokens, num_experts + 1, dtype=hidden.dtype)
    experts = torch.repeat_interleave(torch.arange(num_experts), plan.assignment.tokens_per_expert_E)
    gates[plan.assignment.token_ids_N, experts] = plan.assignment.gates_N.detach()
    gates.view(batch, tokens, -1)[partition.unconditional_ids, :, num_experts] = 1.0
    reference = torch.zeros_like(gates).view(batch, tokens, -1)
    reference.scatter_add_(-1, expected["expert_indices"].long(), expected["router_weights"].to(hidden.dtype))
    torch.testing.assert_close(gates.view(batch, tokens, -1), reference, **close)


def _check_losses(aux_losses, expected, close) -> None:
    names = {"rcl": "routing_contrastive", "balance": "load_balance"}
    for ours, theirs in names.items():
        if expected[theirs] is None:
            assert ours not in aux_losses
        else:
            assert aux_losses[ours].item() == pytest.approx(expected[theirs], rel=close["rtol"], abs=close["atol"])
    total = float(sum(loss.detach() for loss in aux_losses.values()))
    assert total == pytest.approx(expected["total"] or 0.0, rel=close["rtol"], abs=close["atol"])
