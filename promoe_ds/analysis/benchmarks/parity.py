"""How far fast kernels and low precisions are from float64, of one layer and of a whole network."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from promoe_ds.analysis.benchmarks.contenders import fp8_layer, library_layers
from promoe_ds.analysis.benchmarks.layers import initialised
from promoe_ds.analysis.benchmarks.step import for_timing, in_session
from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.errors import PromoeError, TrainingError
from promoe_ds.model import build_model
from promoe_ds.model.build import build_moe_layer
from promoe_ds.moe.experts import BACKENDS
from promoe_ds.moe.layer import MoELayer
from promoe_ds.routing import Partition, partition_samples
from promoe_ds.routing.assignment import RoutingPlan
from promoe_ds.train.step import TrainingModule

#: Precisions that a run may have; those that this version does not know are reported as missing.
PRECISIONS = ("fp32", "bf16", "fp8")
_IMAGES = 4


def layer_comparisons(config: RunConfig, device: torch.device,
                      dtype: torch.dtype) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """Return what compares one layer by each backend with the loop in float64, on the same routing decision.

    Returns: by backend, what returns the largest error of outputs, input gradients and expert gradients over their largest
    value; and why other backends are missing.
    """
    layers: dict[str, tuple[MoELayer, Callable[[], AbstractContextManager]]] = {}
    for backend in BACKENDS:
        layers[backend] = initialised(build_moe_layer(config)).to(device, dtype), nullcontext
        layers[backend][0].routed.backend = backend
    libraries, missing = library_layers(config, device, dtype)
    layers |= {name: (layer, nullcontext) for name, layer in libraries.items()}
    try:
        layer, context = fp8_layer(config, device, dtype)
        layers["fp8"] = initialised(layer), context
    except (PromoeError, ImportError) as error:
        missing["layer, fp8"] = str(error)
    return {f"layer, {name}": partial(_compare_layer, config, layer, context, device)
            for name, (layer, context) in layers.items()}, missing


def _compare_layer(config: RunConfig, layer: MoELayer, context: Callable[[], AbstractContextManager],
                   device: torch.device) -> float:
    dtype = next(layer.parameters()).dtype
    torch.manual_seed(0)
    tokens = torch.randn(_IMAGES, config.model.tokens_per_image, config.model.hidden_size, device=device, dtype=dtype)
    labels = torch.arange(_IMAGES, device=device)
    labels[-1] = config.model.null_label
    partition = partition_samples(labels, config.model.null_label)
    with torch.no_grad():
        plan = layer.route(tokens, partition)
    found = _results(layer, tokens, partition, plan, context)
    reference = initialised(build_moe_layer(config)).to(device).double()
    _copy_weights(layer, reference)
    reference.routed.backend = "loop"
    return _largest_error(found, _results(reference, tokens.double(), partition, plan))


def network_parity(config: RunConfig, precision: str, device: torch.device) -> float:
    """Compare the trainer's network in `precision` with the same weights in float64: relative error of the prediction.

    Near ties between prototypes may fall differently: they are part of the error.
    Raises: TrainingError if FP8 was asked for and the prediction is the one without it.
    """
    return in_session(for_timing(config, micro_batch=_IMAGES), lambda session: distance_to_float64(session.module, device),
                      bf16=precision != "fp32")


def distance_to_float64(module: TrainingModule, device: torch.device) -> float:
    """Fill a network with numbers, run it as training runs it, and return how far it is from float64; as `network_parity`."""
    network, config = module.denoiser, module.denoiser.config
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):  # an untrained network predicts zero
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    reference = build_model(_plain(config))
    reference.load_state_dict({name: value.double() for name, value in network.state_dict().items()})
    reference.reset_positions()
    reference = reference.to(device).double().eval()
    model = config.model
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(_IMAGES, model.in_channels, model.input_size, model.input_size, generator=generator).to(device)
    timestep, labels = torch.linspace(100, 900, _IMAGES, device=device), torch.arange(_IMAGES, device=device)
    network.eval()
    with torch.no_grad():
        with module.compute_context():
            found = network(latents, timestep, labels).double()
        if config.precision.compute == "fp8" and torch.equal(found, network(latents, timestep, labels).double()):
            raise TrainingError(f"{config.name}: with FP8 the network predicts, bit for bit, what it predicts without: its layers "
                                "did not compute in FP8, and no error of FP8 was measured")
        expected = reference(latents.double(), timestep.double(), labels)
    return float((found - expected).norm() / expected.norm())


def _plain(config: RunConfig) -> RunConfig:
    """Return a config for float64: one expert after the other, torch's own layers."""
    values = config.model_dump(mode="json")
    values["parallel"] |= {"expert_backend": "loop"}
    values["precision"] |= {"compute": "auto", "fp8_recipe": "auto", "kernels": "torch"}
    return config_from_dict(values, source=config.name)


def _results(layer: MoELayer, tokens: Tensor, partition: Partition, plan: RoutingPlan,
             context: Callable[[], AbstractContextManager] = nullcontext) -> list[Tensor]:
    """Return output, gradient of the tokens and of the routed experts."""
    layer.zero_grad(set_to_none=True)
    tokens = tokens.detach().requires_grad_()
    with context():
        output = layer.apply_experts(tokens, partition, plan)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator).to(output))
    experts = [parameter.grad for _, parameter in sorted(layer.routed.named_parameters())]
    return [output.detach(), tokens.grad, *experts]


def _copy_weights(source: MoELayer, target: MoELayer) -> None:
    values = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(values[name])


def _largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(found, expected, strict=True))
