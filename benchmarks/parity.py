"""How far fast kernels and low precisions are from float64, of one layer and of a whole network."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.candidates import (
    LIBRARIES,
    Context,
    build_each,
    build_layer,
    for_timing,
    initialised,
    with_trainer,
)
from promoe_ds.condition import ClassCondition
from promoe_ds.config import RunConfig, change_config
from promoe_ds.errors import TrainingError
from promoe_ds.model import build_model
from promoe_ds.model.build import build_moe_layer
from promoe_ds.moe.experts import BACKENDS
from promoe_ds.moe.layer import MoELayer
from promoe_ds.routing import Partition, partition_samples
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.training.step import TrainingModule

#: Precisions that a run may have.
PRECISIONS = ("fp32", "bf16", "fp8")
_IMAGES = 4


def layer_comparisons(
    config: RunConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """Return what compares one layer by each backend with the loop in float64, on the same routing
    decision.

    Returns: by backend, what returns the largest error of outputs, input gradients and expert
    gradients over their largest value; and why other backends are missing.
    """

    layers, missing = build_each(
        (*BACKENDS, *LIBRARIES, "fp8"), lambda kind: build_layer(kind, config, device, dtype)
    )
    return (
        {
            f"layer, {name}": partial(_compare_layer, config, layer, context, device)
            for name, (layer, context) in layers.items()
        },
        {f"layer, {name}" if name == "fp8" else name: reason for name, reason in missing.items()},
    )


def _compare_layer(
    config: RunConfig, layer: MoELayer, context: Context, device: torch.device
) -> float:
    model = config.model
    torch.manual_seed(0)
    tokens = torch.randn(
        _IMAGES,
        model.tokens_per_image,
        model.hidden_size,
        device=device,
        dtype=next(layer.parameters()).dtype,
    )
    labels = torch.arange(_IMAGES, device=device)
    labels[-1] = model.null_label
    partition = partition_samples(ClassCondition(labels, model.null_label))
    with torch.no_grad():
        plan = replace(layer.route(tokens, partition), tokens_BSD=None)  # both bring their own
    found = _results(layer, tokens, partition, plan, context)
    reference = initialised(build_moe_layer(config)).to(device).double()
    values = dict(layer.named_parameters())
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(values[name])
    reference.routed.backend = "loop"
    expected = _results(reference, tokens.double(), partition, plan)
    return max(
        float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30))
        for a, b in zip(found, expected, strict=True)
    )


def _results(
    layer: MoELayer,
    tokens: Tensor,
    partition: Partition,
    plan: RoutingPlan,
    context: Context = nullcontext,
) -> list[Tensor]:
    """Return output, gradient of the tokens and of the routed experts."""
    layer.zero_grad(set_to_none=True)
    tokens = tokens.detach().requires_grad_()
    with context():
        output = layer.apply_experts(tokens, partition, plan)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator).to(output))
    experts = [parameter.grad for _, parameter in sorted(layer.routed.named_parameters())]
    return [output.detach(), tokens.grad, *experts]


def network_parity(config: RunConfig, precision: str, device: torch.device) -> float:
    """Compare the trainer's network in `precision` with the same weights in float64: relative error
    of the prediction.

    Near ties between prototypes may fall differently: they are part of the error.
    Raises: TrainingError if FP8 was asked for and the prediction is the one without it.
    """
    return with_trainer(
        for_timing(config, micro_batch=_IMAGES),
        bf16=precision != "fp32",
        body=lambda trainer: distance_to_float64(trainer.module, device),
    )


def distance_to_float64(module: TrainingModule, device: torch.device) -> float:
    """Fill a network with numbers, run it as training does, and return how far it is from float64;
    as `network_parity`.
    """
    network, config = module.denoiser, module.denoiser.config
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):  # untrained, it predicts zero
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    # One expert after the other, torch's own layers.
    reference = build_model(
        change_config(
            config,
            parallel={"expert_backend": "loop"},
            precision={"compute": "auto", "fp8_recipe": "auto", "kernels": "torch"},
        )
    )
    reference.load_state_dict(
        {name: value.double() for name, value in network.state_dict().items()}
    )
    reference.reset_positions()
    reference = reference.to(device).double().eval()
    model, generator = config.model, torch.Generator().manual_seed(0)
    latents = torch.randn(_IMAGES, model.in_channels, *model.latent_size, generator=generator).to(
        device
    )
    inputs = torch.linspace(100, 900, _IMAGES, device=device), torch.arange(_IMAGES, device=device)
    network.eval()
    with torch.no_grad():
        with module.compute_context():
            found = network(latents, *inputs).double()
        if config.precision.compute == "fp8" and torch.equal(
            found, network(latents, *inputs).double()
        ):
            raise TrainingError(
                f"{config.name}: the network predicts the same with FP8 as without: its "
                "layers did not compute in FP8, and no error of FP8 was measured"
            )
        expected = reference(latents.double(), inputs[0].double(), inputs[1])
    return float((found - expected).norm() / expected.norm())
