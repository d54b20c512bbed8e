"""MoE layers with fused kernels against the same layers with plain operations, for every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.routing import ROUTERS, partition_samples

from ..builders import METHODS, random_tensor
from ..model.test_methods import NULL, denoise, make_network

pytest.importorskip("triton", reason="needs triton: pip install triton")

#: Of each value's largest number. fp32: sums in another order. bf16: rounded at other places.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
CASES: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS if method != "dense"},
    "swiglu": {"method": "token_choice", "expert_type": "swiglu"},
    "three choices": {"method": "token_choice", "top_k": 3, "num_experts": 4},
    "first choices form centroids": {"method": "token_choice", "rcl_assignments": "first"},
    "no shared expert": {"method": "token_choice", "num_shared_experts": 0},
    "no unconditional expert": {"method": "token_choice", "num_unconditional_experts": 0},
    **{
        f"{method}, unconditional expert joined": {"method": method, "top_k": 1, "joins": True}
        for method in METHODS
        if method != "dense" and ROUTERS[method].is_per_sample
    },
}


def run_layer(
    kernels: str,
    dtype: torch.dtype,
    labels: list[int],
    method: str,
    *,
    joins: bool = False,
    **routing: Any,
) -> dict[str, Tensor]:
    """Return the last MoE layer's output, losses, sums and all gradients, in training.

    Args:
        joins: where kernels are fused, compute the unconditional expert as one more routed one.
    """
    network = make_network(method, routing=routing, parallel={"kernels": kernels}).to(dtype).train()
    layer = list(network.moe_layers().values())[-1]
    partition = partition_samples(
        ClassCondition(torch.tensor(labels), NULL),
        has_unconditional_expert=layer.unconditional is not None,
        joins_unconditional=joins and kernels == "triton",
    )
    model = network.config.model
    tokens = random_tensor(len(labels), model.tokens_per_image, model.hidden_size, seed=5)
    tokens = tokens.to(dtype).requires_grad_()
    output, plan = layer(tokens, partition)
    assert (plan.assignment.places is not None) == (kernels == "triton")
    losses = plan.aux_losses
    weighted = (output * random_tensor(*output.shape, seed=6).to(dtype)).sum()
    (weighted + sum(loss.sum() for loss in losses.values())).backward()
    found = {"output": output, "sums": plan.stats.token_sums_ED, "tokens": tokens.grad}
    found |= {f"loss {name}": value for name, value in losses.items()}
    found |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("labels", [[1, NULL, 4], [NULL, NULL]], ids=["mixed", "all null"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES)
def test_fused_layer_equals_the_plain_one(case, dtype, labels) -> None:
    plain, fused = (run_layer(k, dtype, labels, **CASES[case]) for k in ("eager", "triton"))
    assert fused.keys() == plain.keys()
    for name, value in plain.items():
        assert fused[name].dtype == value.dtype and fused[name].shape == value.shape, name
        scale = max([1.0, *value.float().abs().flatten().tolist()])
        difference = (fused[name].float() - value.float()).abs().flatten().tolist()
        assert max(difference, default=0.0) <= TOLERANCE[dtype] * scale, name


@pytest.mark.parametrize(
    ("case", "block"), [*((case, "dit") for case in CASES), ("token_choice", "modern")]
)
def test_fused_network_equals_the_plain_one(case, block) -> None:
    """Blocks and layers, on tokens whose memory is laid out as the patch embedding leaves it."""
    results = []
    for kernels in ("eager", "triton"):
        routing = {name: value for name, value in CASES[case].items() if name != "joins"}
        network = make_network(
            routing.pop("method"),
            model={"block": block},
            routing=routing,
            parallel={"kernels": kernels},
        ).train()
        output = denoise(network, [1, NULL, 4])
        losses = [loss for plan in output.plans.values() for loss in plan.aux_losses.values()]
        total = (output.prediction_BZHW * 2.0).square().sum() + sum(each.sum() for each in losses)
        total.backward()
        gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        results.append({"loss": total.detach(), **gradients})
    plain, fused = results
    assert fused.keys() == plain.keys()
    for name, value in plain.items():
        difference = (fused[name] - value).norm() / value.norm().clamp_min(1e-3)
        assert difference < 1e-3, name
