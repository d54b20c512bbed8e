"""What is timed: the trainer of a config, and MoE layers, ours and other libraries'."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from promoe_ds.backends.deepspeed_private import make_expert_groups
from promoe_ds.backends.expert_parallel import mark_experts, shard_experts
from promoe_ds.backends.te_layers import use_transformer_engine
from promoe_ds.config import (
    RunConfig,
    change_config,
    config_from_dict,
    load_config,
    plan_batches,
    resolve_deepspeed,
)
from promoe_ds.config.parallel import EXTERNAL_DISPATCH
from promoe_ds.data import build_dataset
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.distributed.process_group import local_device
from promoe_ds.errors import ConfigError, PromoeError
from promoe_ds.model import DiT, build_model, initialise
from promoe_ds.moe.layer import MoELayer
from promoe_ds.moe.products import BACKENDS
from promoe_ds.training.router_state import give_superclasses
from promoe_ds.training.trainer import Trainer

#: `parallel.dispatch` of the layers that other libraries bring.
LIBRARIES = EXTERNAL_DISPATCH

#: Makes the context that a layer's passes must run in.
Context = Callable[[], AbstractContextManager]

_T = TypeVar("_T")
_INIT_STD = 0.02


def mixture_recipe(recipe: str, *, tokens: int, rounds: int) -> tuple[RunConfig, int]:
    """Return a recipe that has experts, and how many images so many tokens are, at least 1.

    Raises: ConfigError for a recipe without experts, or a number below 1.
    """
    for name, value in (("--tokens", tokens), ("--rounds", rounds)):
        if value < 1:
            raise ConfigError(f"{name} {value}: must be at least 1")
    config = load_config(recipe)
    if not config.moe_block_indices:
        raise ConfigError(
            f"--recipe {recipe}: has no mixture of experts to time: use e.g. promoe_s"
        )
    return config, max(1, tokens // config.model.tokens_per_image)


def for_timing(config: RunConfig, *, micro_batch: int) -> RunConfig:
    """Return a config for one process on synthetic samples, with steps of one pass."""
    return change_config(
        config,
        parallel={"ep_size": 1},
        data={"dataset": "synthetic", "path": None, "synthetic_samples": micro_batch},
        train={"global_batch_size": micro_batch, "micro_batch_size": micro_batch},
    )


def without_experts(config: RunConfig) -> RunConfig:
    """Return the dense network of a recipe's size: of the same activated parameters, nearly."""
    values = config.model_dump(mode="json")
    values |= {"name": f"{config.name}_dense", "routing": {"method": "dense"}}
    values["parallel"] |= {"dispatch": "auto", "expert_backend": "auto"}
    return config_from_dict(values, source=config.name)


def with_dispatch(config: RunConfig, dispatch: str) -> RunConfig:
    """Return a config whose rows are moved by `dispatch`, between all processes of this group.

    Raises: ConfigError if the recipe does not fit it.
    """
    return change_config(
        config,
        parallel={"dispatch": dispatch, "expert_backend": "auto", "ep_size": dist.get_world_size()},
    )


def with_precision(config: RunConfig, precision: str) -> RunConfig:
    """Return a config that computes in `precision`.

    Raises: ConfigError if the recipe does not fit FP8.
    """
    return change_config(config, precision={"compute": "fp8"}) if precision == "fp8" else config


def build_trainer(config: RunConfig, *, bf16: bool, zero: dict[str, Any] | None = None) -> Trainer:
    """Build the trainer of a config for this process group.

    Args:
        zero: `zero_optimization` of the DeepSpeed JSON, stage 2 if left out.
    """
    ranks = DistributedContext(
        rank=dist.get_rank(), world_size=dist.get_world_size(), device=local_device()
    )
    values = {
        "zero_optimization": zero or {"stage": 2, "overlap_comm": bf16},
        "bf16": {"enabled": bf16},
    }
    batches = plan_batches(config, ranks.world_size)
    plan = resolve_deepspeed(values, config, batches, source="benchmark")
    return Trainer(config, plan, ranks, build_dataset(config))


def with_trainer(config: RunConfig, body: Callable[[Trainer], _T], *, bf16: bool) -> _T:
    """Return body(trainer) for a trainer of its own, of which nothing is left in memory afterwards.

    A trainer is full of references to itself and can be collected only when no frame holds it any
    more: neither the body's nor, after an error, those that the error keeps until it was handled.
    So collection comes after, and again before the next.
    """

    def run() -> _T:
        trainer = build_trainer(config, bf16=bf16)
        try:
            return body(trainer)
        finally:
            trainer.engine.destroy()  # its hooks tie it to the process

    free_memory()
    try:
        return run()
    finally:
        free_memory()


def free_memory() -> None:
    """Collect what nobody holds any more, and give the device's cached blocks back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def build_each(
    names: Iterable[str], build: Callable[[str], _T]
) -> tuple[dict[str, _T], dict[str, str]]:
    """Return build(name) by name where this installation can, and elsewhere the reason."""
    built: dict[str, _T] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            built[name] = build(name)
        except (PromoeError, ImportError) as error:
            missing[name] = str(error)
    return built, missing


def build_layer(
    kind: str, config: RunConfig, device: torch.device, dtype: torch.dtype
) -> tuple[MoELayer, Context]:
    """Build one MoE layer, all experts here, and the context of its passes.

    Args:
        kind: of its experts: "own" for the recipe's, a backend of `parallel.expert_backend`, a
            library, or "fp8" for Transformer Engine's.
    Raises: ConfigError naming what the recipe, the device or the installation lacks.
    """
    if kind in LIBRARIES:
        return layer_of(with_dispatch(config, kind), device, dtype), nullcontext
    network = _two_blocks(with_precision(config, kind)).to_empty(device=device)
    initialise(network, 0)
    network.to(dtype)
    is_fp8 = kind == "fp8"
    context = use_transformer_engine(network, network.config, device) if is_fp8 else nullcontext
    layer = initialised(_first_layer(network))
    if kind in BACKENDS:
        layer.routed.backend = kind
    return layer, context


def layer_of(config: RunConfig, device: torch.device, dtype: torch.dtype) -> MoELayer:
    """Build one MoE layer whose experts the engine places, on the groups of this process."""
    network = _two_blocks(config)
    parallel = config.parallel
    group = make_expert_groups(parallel.ep_size, parallel.timeout_seconds)
    shard_experts(network, group, device)
    initialise(network.to_empty(device=device), 0)
    mark_experts(network.to(dtype))
    return _first_layer(network)


def _two_blocks(config: RunConfig) -> DiT:
    """Build a network of two blocks, one of which has experts, on the meta device."""
    with torch.device("meta"):
        return build_model(change_config(config, model={"preset": None, "depth": 2}))


def _first_layer(network: DiT) -> MoELayer:
    give_superclasses(network, network.config)
    return next(iter(network.moe_layers().values())).train()


def initialised(module: nn.Module) -> nn.Module:
    """Fill every parameter with small normal numbers; training mode."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=_INIT_STD)
    return module.train()
