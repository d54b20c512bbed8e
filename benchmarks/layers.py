"""Time of one MoE layer and of the routers, each beside other candidates."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.candidates import (
    LIBRARIES,
    Context,
    build_each,
    build_layer,
    for_timing,
    initialised,
    mixture_recipe,
)
from benchmarks.processes import single_process
from benchmarks.timing import Result, compare
from promoe_ds.condition import ClassCondition
from promoe_ds.config import RunConfig, change_config, config_from_dict
from promoe_ds.config.routing import METHODS
from promoe_ds.data import build_dataset
from promoe_ds.diffusion import DiffusionBatch, draw_batch
from promoe_ds.errors import ConfigError
from promoe_ds.model import build_model, initialise
from promoe_ds.moe.experts import EXPERT_PARAMETERS, FEED_FORWARDS, FeedForward
from promoe_ds.moe.layer import MoELayer
from promoe_ds.routing import (
    ROUTERS,
    ClassificationRouter,
    Partition,
    Router,
    build_router,
    partition_samples,
)
from promoe_ds.routing.assignment import expert_of_rows
from promoe_ds.training.router_state import give_superclasses
from promoe_ds.training.step import TrainingModule

_Call = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


def benchmark_moe_layer(*, tokens: int, rounds: int, recipe: str = "promoe_s") -> Result:
    """Time one MoE layer of a recipe, forward and backward, against a dense feed-forward of equal
    activated width; `layer_candidates` lists the others.

    Args:
        tokens: conditional tokens, a multiple of the recipe's tokens per image.
    """
    config, images = mixture_recipe(recipe, tokens=tokens, rounds=rounds)
    settings = _settings(
        config, tokens=images * config.model.tokens_per_image, active_width=active_width(config)
    )
    with single_process() as device:
        candidates, missing = layer_candidates(config, images, device, torch.float32)
        return compare("moe-layer", candidates, rounds=rounds, settings=settings, missing=missing)


def layer_candidates(
    config: RunConfig,
    images: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Return a pass of each candidate, and why others are missing; call in `single_process`.

    `dense`; `moe`, the layer as trained (router, RCL, shared and unconditional expert, grouped
    GEMM); `moe_loop_backend`, the same with `parallel.expert_backend=loop`; `per_expert_loop`,
    which picks out and computes the tokens of one expert after the other, as research code does;
    the libraries' layers, around the same router and replicated experts; in bf16, `moe_fp8`.
    """
    if not config.routing.num_shared_experts:
        raise ConfigError(
            f"--recipe {config.name}: the per-expert loop of this suite wants a "
            "shared expert: use a promoe recipe"
        )
    model = config.model
    torch.manual_seed(0)
    inputs = torch.randn(
        images, model.tokens_per_image, model.hidden_size, device=device, dtype=dtype
    )
    direction = torch.randn_like(inputs)
    partition = conditional(images, config, device)
    dense = initialised(FeedForward(model.hidden_size, active_width(config))).to(device, dtype)
    candidates = {"dense": partial(pass_of, dense, lambda x: (dense(x), []), inputs, direction)}
    kinds = {"moe": "own", "moe_loop_backend": "loop", "per_expert_loop": "own"}
    kinds |= {name: name for name in LIBRARIES}
    if dtype == torch.bfloat16:  # what FP8 weights are
        kinds["moe_fp8"] = "fp8"
    built, missing = build_each(kinds, lambda name: build_layer(kinds[name], config, device, dtype))
    for name, (layer, context) in built.items():
        call = layer_call(layer, partition, context)
        if name == "per_expert_loop":
            call = loop_call(layer, partition)
        candidates[name] = partial(pass_of, layer, call, inputs, direction)
    return candidates, missing


def conditional(images: int, config: RunConfig, device: torch.device | str = "cpu") -> Partition:
    """Return the partition of images that all have a label."""
    labels = torch.zeros(images, dtype=torch.int64, device=device)
    return partition_samples(ClassCondition(labels, config.model.null_label))


def active_width(config: RunConfig) -> int:
    """Return the hidden width that a token activates, the shared experts' included."""
    routing = config.routing
    shared = routing.num_shared_experts * config.shared_expert_width
    return routing.top_k * config.expert_width + shared


def _settings(config: RunConfig, **more: object) -> dict[str, object]:
    return {
        "recipe": config.name,
        "width": config.model.hidden_size,
        "expert_width": config.expert_width,
        "experts": config.routing.num_experts,
        "top_k": config.routing.top_k,
        "dtype": "float32",
        **more,
    }


def pass_of(module: nn.Module, call: _Call, inputs: Tensor, direction: Tensor) -> None:
    """Run a forward and a backward pass of a module from given inputs and output gradients."""
    module.zero_grad(set_to_none=True)
    output, losses = call(inputs.detach().requires_grad_())
    torch.autograd.backward([output, *losses], [direction, *(None for _ in losses)])


def layer_call(layer: MoELayer, partition: Partition, context: Context = nullcontext) -> _Call:
    """Return a forward pass in a context: output and losses."""

    def call(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        with context():
            output, plan = layer(tokens, partition)
        return output, list(plan.aux_losses.values())

    return call


def loop_call(layer: MoELayer, partition: Partition) -> _Call:
    """Return a forward pass that looks up and computes the tokens of one expert after the other."""
    routed = layer.routed
    expert_module = FEED_FORWARDS[routed.expert_type](1, 1)

    def call(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        plan = layer.route(tokens, partition)
        flat, assignment = tokens.flatten(0, 1), plan.assignment
        expert_N = expert_of_rows(assignment)
        output = layer.shared(flat)
        weights = {
            name.replace("_", "."): getattr(routed, name).unbind(0)
            for name in EXPERT_PARAMETERS[routed.expert_type]
        }
        for expert in range(routed.num_local_experts):
            rows = torch.where(expert_N == expert)[0]
            ids, own = assignment.token_ids_N[rows], {k: w[expert] for k, w in weights.items()}
            result = functional_call(expert_module, own, flat[ids]) * assignment.gates_N[rows, None]
            output = output.index_add(0, ids, result.to(output.dtype))
        return output.view_as(tokens), list(plan.aux_losses.values())

    return call


def benchmark_router(*, tokens: int, rounds: int, recipe: str = "promoe_s") -> Result:
    """Time the routers of all layers, losses and backward pass included, against a training step.

    Candidates: `training_step`, forward and backward pass of the whole network without the
    optimizer; `router_losses_METHOD`, for the recipe's own method and then for the others at the
    same size, everything that routing adds to such a step: scores, choice, list, losses,
    statistics, and the gradients of all of them.
    Args:
        tokens: conditional tokens, a multiple of the recipe's tokens per image.
    """
    config, images = mixture_recipe(recipe, tokens=tokens, rounds=rounds)
    model, layers = config.model, len(config.moe_block_indices)
    candidates = {"training_step": partial(training_pass, *training_module(config, images))}
    torch.manual_seed(1)
    inputs = torch.randn(images, model.tokens_per_image, model.hidden_size)
    partition = conditional(images, config)
    methods = dict.fromkeys((config.routing.method, *ROUTERS))
    routers, missing = build_each(methods, partial(_router, config))
    for name, router in routers.items():
        call = partial(_routing_passes, router, inputs, partition, layers)
        candidates[f"router_losses_{name}"] = call
    settings = _settings(config, images=images)
    return compare(
        "router", candidates, rounds=rounds, warmup=1, settings=settings, missing=missing
    )


def training_module(config: RunConfig, images: int) -> tuple[TrainingModule, DiffusionBatch]:
    """Return a network to train, on the CPU, and a batch of so many images, none of them null."""
    config = for_timing(config, micro_batch=images)
    config = change_config(config, diffusion={"label_dropout": 0.0})
    network = build_model(config)
    initialise(network, 0)
    give_superclasses(network, config)
    module = TrainingModule(network).train()
    samples = build_dataset(config).take(np.arange(images))
    return module, draw_batch(*samples, module.objective, seed=0, step=0, slots=range(images))


def training_pass(module: TrainingModule, batch: DiffusionBatch) -> None:
    """Run a forward and a backward pass."""
    module.zero_grad(set_to_none=True)
    module(batch).loss.backward()


def _router(config: RunConfig, method: str) -> Router:
    """Build a recipe's router or, at the same size, that of another method.

    Raises: ConfigError if the recipe does not fit the method.
    """
    own, values = config.routing, config.model_dump(mode="json")
    if method != own.method:
        values["routing"] = {
            "method": method,
            "num_experts": own.num_experts,
            "top_k": 1 if METHODS[method].single_choice else own.top_k,
            "superclass_map": "not read here" if method == "classification" else None,
        }
    router = initialised(build_router(config_from_dict(values, source=method)))
    if isinstance(router, ClassificationRouter):
        router.set_superclasses([0])
    return router


def _routing_passes(router: Router, tokens: Tensor, partition: Partition, layers: int) -> None:
    for _ in range(layers):
        router.zero_grad(set_to_none=True)
        plan = router(tokens.detach().requires_grad_(), partition)
        results = [plan.assignment.gates_N.sum(), *plan.aux_losses.values()]
        results += [] if plan.target_patches_BSP is None else [plan.target_patches_BSP.sum()]
        torch.autograd.backward([result for result in results if result.requires_grad])
