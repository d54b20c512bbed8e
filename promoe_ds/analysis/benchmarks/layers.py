"""Time of one MoE layer and of the routers, each beside its contenders."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.analysis.benchmarks.contenders import fp8_layer, library_layers, single_process
from promoe_ds.analysis.benchmarks.timing import BenchmarkResult, interleave
from promoe_ds.config import RunConfig, config_from_dict, load_config
from promoe_ds.diffusion import DiffusionBatch
from promoe_ds.errors import ConfigError, PromoeError
from promoe_ds.model import build_model, initialise
from promoe_ds.model.build import build_moe_layer
from promoe_ds.model.routers import ROUTERS, build_router
from promoe_ds.moe.experts import EXPERT_PARAMETERS, FeedForward
from promoe_ds.moe.layer import MoELayer
from promoe_ds.routing import ClassificationRouter, Partition, Router, partition_samples
from promoe_ds.train.step import TrainingModule

_INIT_STD = 0.02


def benchmark_moe_layer(*, tokens: int, rounds: int, recipe: str = "promoe_s") -> BenchmarkResult:
    """Time one MoE layer of a recipe, forward and backward, against a dense feed-forward of equal activated width.

    Contenders: `dense`; `moe`, the layer as trained (router, RCL, shared and unconditional expert, grouped GEMM);
    `moe_loop_backend`, the same with `parallel.expert_backend=loop`; `per_expert_loop`, which picks out and computes the
    tokens of one expert after the other, as research code does; `deepspeed_moe` and `megatron`, the layers of the
    libraries where this installation has them, around the same router and replicated experts.
    Args:
        tokens: conditional tokens, a multiple of the recipe's tokens per image.
    """
    config = mixture_recipe(recipe, tokens=tokens, rounds=rounds)
    images = max(1, tokens // config.model.tokens_per_image)
    with single_process() as device:
        contenders, missing = layer_contenders(config, images, device, torch.float32)
        timings = interleave(contenders, rounds=rounds)
    return BenchmarkResult(suite="moe-layer", baseline="dense", rounds=rounds, timings=timings, not_available=missing,
                           settings=_settings(config, tokens=images * config.model.tokens_per_image,
                                              active_width=_active_width(config)))


def layer_contenders(config: RunConfig, images: int, device: torch.device,
                     dtype: torch.dtype) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Return a pass of each contender, and why others are missing. The libraries' layers need `contenders.single_process`."""
    if not config.routing.num_shared_experts:
        raise ConfigError(f"--recipe {config.name}: the per-expert loop of this suite wants a shared expert: use a promoe recipe")
    width, per_image = config.model.hidden_size, config.model.tokens_per_image
    torch.manual_seed(0)
    inputs = torch.randn(images, per_image, width, device=device, dtype=dtype)
    direction = torch.randn_like(inputs)
    partition = partition_samples(torch.zeros(images, dtype=torch.int64, device=device), config.model.null_label)
    dense = initialised(FeedForward(width, _active_width(config))).to(device, dtype)
    contenders: dict[str, Callable[[], None]] = {"dense": lambda: _pass(dense, lambda x: (dense(x), []), inputs, direction)}
    libraries, missing = library_layers(config, device, dtype)
    layers = {name: initialised(build_moe_layer(config)).to(device, dtype)
              for name in ("moe", "moe_loop_backend", "per_expert_loop")}
    layers["moe_loop_backend"].routed.backend = "loop"
    context: Callable[[], AbstractContextManager] = nullcontext
    if dtype == torch.bfloat16:  # what FP8 weights are
        try:
            layers["moe_fp8"], context = fp8_layer(config, device, dtype)
            initialised(layers["moe_fp8"])
        except (PromoeError, ImportError) as error:
            missing["moe_fp8"] = str(error)
    for name, layer in (layers | libraries).items():
        if name == "per_expert_loop":
            call = _loop_call(layer, partition)
        else:
            call = _layer_call(layer, partition, context if name == "moe_fp8" else nullcontext)
        contenders[name] = lambda layer=layer, call=call: _pass(layer, call, inputs, direction)
    return contenders, missing


def _active_width(config: RunConfig) -> int:
    routing = config.routing
    return routing.top_k * config.expert_width + routing.num_shared_experts * config.shared_expert_width


def benchmark_router(*, tokens: int, rounds: int, recipe: str = "promoe_s") -> BenchmarkResult:
    """Time the routers of all layers, losses and backward pass included, against a training step of a recipe.

    Contenders: `training_step`, forward and backward pass of the whole network without the optimizer; `router_losses_METHOD`,
    for the recipe's own method and then for the others at the same size, everything that routing adds to such a step:
    scores, choice, list, losses, statistics, and the gradients of all of them.
    Args:
        tokens: conditional tokens, a multiple of the recipe's tokens per image.
    """
    config = mixture_recipe(recipe, tokens=tokens, rounds=rounds)
    module, batch = training_module(config, tokens)
    model, images = config.model, batch.labels_B.numel()
    inputs = torch.randn(images, model.tokens_per_image, model.hidden_size, generator=torch.Generator().manual_seed(1))
    partition = partition_samples(batch.labels_B, model.null_label)
    contenders: dict[str, Callable[[], None]] = {"training_step": lambda: training_pass(module, batch)}
    layers = len(config.moe_block_indices)
    for name, router in _routers(config).items():
        contenders[f"router_losses_{name}"] = lambda router=router: _routing_passes(router, inputs, partition, layers)
    return BenchmarkResult(suite="router", baseline="training_step", rounds=rounds,
                           timings=interleave(contenders, rounds=rounds, warmup=1), settings=_settings(config, images=images))


def training_module(config: RunConfig, tokens: int) -> tuple[TrainingModule, DiffusionBatch]:
    """Return a network to train, on the CPU, and a batch of so many conditional tokens."""
    model = config.model
    images = max(1, tokens // model.tokens_per_image)
    generator = torch.Generator().manual_seed(0)
    shape = (images, model.in_channels, model.input_size, model.input_size)
    batch = DiffusionBatch(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator),
                           torch.rand(images, generator=generator), torch.arange(images) % model.num_classes)
    network = build_model(config)
    initialise(network, 0)
    return TrainingModule(network).train(), batch


def mixture_recipe(recipe: str, *, tokens: int, rounds: int) -> RunConfig:
    """Load a recipe that has experts; refuse numbers that cannot be."""
    for name, value in (("--tokens", tokens), ("--rounds", rounds)):
        if value < 1:
            raise ConfigError(f"{name} {value}: must be at least 1")
    config = load_config(recipe)
    if not config.moe_block_indices:
        raise ConfigError(f"--recipe {recipe}: has no mixture of experts to time: use e.g. promoe_s")
    return config


def _routers(config: RunConfig) -> dict[str, Router]:
    routers = {}
    for method in (config.routing.method, *(m for m in ROUTERS if m != config.routing.method)):
        values = config.model_dump(mode="json")
        fields = {"num_experts": config.routing.num_experts, "top_k": config.routing.top_k, "method": method}
        if method == "classification":
            fields["superclass_map"] = "none read here"
        values["routing"] = config.model_dump(mode="json")["routing"] if method == config.routing.method else fields
        router = initialised(build_router(config_from_dict(values, source="benchmark")))
        if isinstance(router, ClassificationRouter):
            router.set_superclasses([label % config.routing.num_experts for label in range(config.model.num_classes)])
        routers[method] = router
    return routers


def training_pass(module: TrainingModule, batch: DiffusionBatch) -> None:
    """Run a forward and a backward pass."""
    module.zero_grad(set_to_none=True)
    module(batch).loss.backward()


def _routing_passes(router: Router, tokens: Tensor, partition: Partition, layers: int) -> None:
    for _ in range(layers):
        router.zero_grad(set_to_none=True)
        plan = router(tokens.detach().requires_grad_(), partition)
        results = [plan.assignment.gates_N.sum(), *plan.aux_losses.values()]
        results += [] if plan.target_patches_BSP is None else [plan.target_patches_BSP.sum()]
        torch.autograd.backward(results)


def _settings(config: RunConfig, **more: object) -> dict[str, object]:
    return {"recipe": config.name, "width": config.model.hidden_size, "expert_width": config.expert_width,
            "experts": config.routing.num_experts, "top_k": config.routing.top_k, "dtype": "float32", **more}


def layer_pass(layer: MoELayer, inputs: Tensor, direction: Tensor, partition: Partition) -> None:
    """Run a layer forward and backward, its losses included."""
    _pass(layer, _layer_call(layer, partition), inputs, direction)


def _pass(module: nn.Module, call: Callable[[Tensor], tuple[Tensor, list[Tensor]]], inputs: Tensor, direction: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    output, losses = call(inputs.detach().requires_grad_())
    torch.autograd.backward([output, *losses], [direction, *(None for _ in losses)])


def _layer_call(layer: MoELayer, partition: Partition,
                context: Callable[[], AbstractContextManager] = nullcontext) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
    def _call(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        with context():
            output, plan = layer(tokens, partition)
        return output, list(plan.aux_losses.values())

    return _call


def _loop_call(layer: MoELayer, partition: Partition) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
    """Return a pass that looks up and computes the tokens of one expert after the other; for any K and expert type."""
    def _call(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        plan = layer.route(tokens, partition)
        flat, assignment = tokens.flatten(0, 1), plan.assignment
        every = torch.arange(layer.routed.num_local_experts, device=flat.device)
        expert_N = torch.repeat_interleave(every, assignment.tokens_per_expert_E)
        output = layer.shared(flat)
        weights = zip(*(getattr(layer.routed, name).unbind(0) for name in EXPERT_PARAMETERS[layer.routed.expert_type]), strict=True)
        for expert, values in enumerate(weights):
            rows = torch.where(expert_N == expert)[0]
            ids = assignment.token_ids_N[rows]
            result = _one_expert(layer.routed.expert_type, flat[ids], values)
            output = output.index_add(0, ids, (result * assignment.gates_N[rows, None]).to(output.dtype))
        return output.view_as(tokens), list(plan.aux_losses.values())

    return _call


def _one_expert(expert_type: str, x: Tensor, values: tuple[Tensor, ...]) -> Tensor:
    """Compute one expert with its parameters in the order of EXPERT_PARAMETERS."""
    if expert_type == "gelu":
        up, up_bias, down, down_bias = values
        return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)
    gate, up, down = values
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def initialised(module: nn.Module) -> nn.Module:
    """Fill every parameter with small normal numbers; training mode."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=_INIT_STD)
    return module.train()
