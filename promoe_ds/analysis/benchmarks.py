"""Timings of the package's parts: contenders interleaved in one run, medians and spread, paired ratios.

Interleaving lets a machine's drift hit all contenders alike; the ratio to the baseline is taken round by round.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promoe_ds.config import RunConfig, config_from_dict, load_config
from promoe_ds.diffusion import DiffusionBatch
from promoe_ds.engine.step import TrainingModule
from promoe_ds.errors import ConfigError
from promoe_ds.model import build_model, initialise
from promoe_ds.model.build import build_moe_layer
from promoe_ds.model.routers import ROUTERS, build_router
from promoe_ds.moe.experts import FeedForward
from promoe_ds.moe.layer import MoELayer
from promoe_ds.routing import ClassificationRouter, Partition, Router, partition_samples

_INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one contender: wall clock, and processor time over all threads; ratios are to the baseline."""

    wall_ms: float
    wall_ms_low: float
    wall_ms_high: float
    cpu_ms: float
    wall_ratio: float
    cpu_ratio: float


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """One suite's timings by contender, and what they were measured on."""

    suite: str
    baseline: str
    rounds: int
    timings: dict[str, Timing]
    settings: dict[str, object]
    machine: dict[str, object] = field(default_factory=lambda: machine_description())


def machine_description() -> dict[str, object]:
    """Return processor, threads and versions."""
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def interleave(contenders: dict[str, Callable[[], None]], *, rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Run every contender once a round; the first one is the baseline.

    The order turns from round to round, so that nobody always runs after the same neighbour.
    """
    names = list(contenders)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(warmup + rounds):
        for name in names[round_ % len(names):] + names[:round_ % len(names)]:
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            contenders[name]()
            _synchronise()
            if round_ >= warmup:
                wall[name].append(1e3 * (time.perf_counter() - wall_start))
                cpu[name].append(1e3 * (time.process_time() - cpu_start))
    return {name: Timing(
        wall_ms=statistics.median(wall[name]), wall_ms_low=min(wall[name]), wall_ms_high=max(wall[name]),
        cpu_ms=statistics.median(cpu[name]), wall_ratio=_paired(wall[name], wall[names[0]]),
        cpu_ratio=_paired(cpu[name], cpu[names[0]])) for name in names}


def benchmark_moe_layer(*, tokens: int, rounds: int, recipe: str = "promoe_s") -> BenchmarkResult:
    """Time one MoE layer of a recipe, forward and backward, against a dense feed-forward of equal activated width.

    Contenders: `dense`; `moe`, the layer as trained (router, RCL, shared and unconditional expert, grouped GEMM);
    `moe_loop_backend`, the same with `parallel.expert_backend=loop`; `per_expert_loop`, which picks out and computes the
    tokens of one expert after the other, as research code does.
    Args:
        tokens: conditional tokens, a multiple of the recipe's tokens per image.
    """
    config = mixture_recipe(recipe, tokens=tokens, rounds=rounds)
    if not config.routing.num_shared_experts:
        raise ConfigError(f"--recipe {recipe}: the per-expert loop of this suite wants a shared expert: use a promoe recipe")
    width, per_image = config.model.hidden_size, config.model.tokens_per_image
    images = max(1, tokens // per_image)
    torch.manual_seed(0)
    inputs = torch.randn(images, per_image, width)
    direction = torch.randn_like(inputs)
    partition = partition_samples(torch.zeros(images, dtype=torch.int64), config.model.null_label)
    active = config.routing.top_k * config.expert_width + config.routing.num_shared_experts * config.shared_expert_width
    dense = _initialised(FeedForward(width, active))
    layers = {name: _initialised(build_moe_layer(config)) for name in ("moe", "moe_loop_backend", "per_expert_loop")}
    layers["moe_loop_backend"].routed.backend = "loop"
    contenders = {
        "dense": lambda: _pass(dense, lambda x: (dense(x), []), inputs, direction),
        "moe": lambda: _pass(layers["moe"], _layer_call(layers["moe"], partition), inputs, direction),
        "moe_loop_backend": lambda: _pass(layers["moe_loop_backend"], _layer_call(layers["moe_loop_backend"], partition), inputs,
                                          direction),
        "per_expert_loop": lambda: _pass(layers["per_expert_loop"], _loop_call(layers["per_expert_loop"], partition), inputs,
                                         direction),
    }
    return BenchmarkResult(suite="moe-layer", baseline="dense", rounds=rounds, timings=interleave(contenders, rounds=rounds),
                           settings=_settings(config, tokens=images * per_image, active_width=active))


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
        router = _initialised(build_router(config_from_dict(values, source="benchmark")))
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


def _pass(module: nn.Module, call: Callable[[Tensor], tuple[Tensor, list[Tensor]]], inputs: Tensor, direction: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    output, losses = call(inputs.detach().requires_grad_())
    torch.autograd.backward([output, *losses], [direction, *(None for _ in losses)])


def _layer_call(layer: MoELayer, partition: Partition) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
    def _call(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        output, plan = layer(tokens, partition)
        return output, list(plan.aux_losses.values())

    return _call


def _loop_call(layer: MoELayer, partition: Partition) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
    def _call(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        plan = layer.route(tokens, partition)
        flat, routed, assignment = tokens.flatten(0, 1), layer.routed, plan.assignment
        experts = torch.repeat_interleave(torch.arange(routed.num_local_experts), assignment.tokens_per_expert_E)
        chosen = torch.empty_like(experts).index_copy_(0, assignment.token_ids_N, experts)
        gates = torch.empty_like(assignment.gates_N).index_copy(0, assignment.token_ids_N, assignment.gates_N)
        output = layer.shared(flat)
        for expert in range(routed.num_local_experts):
            ids = torch.where(chosen == expert)[0]
            hidden = F.gelu(F.linear(flat[ids], routed.up_weight[expert], routed.up_bias[expert]), approximate="tanh")
            result = F.linear(hidden, routed.down_weight[expert], routed.down_bias[expert])
            output = output.index_add(0, ids, result * gates[ids, None])
        return output.view_as(tokens), list(plan.aux_losses.values())

    return _call


def _initialised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=_INIT_STD)
    return module.train()


def _paired(values: list[float], baseline: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, baseline, strict=True))


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
