"""Resuming on other ranks, expert parallelism or ZeRO stage: every rank fills what it owns from the
files of any layout.

Only plain copies happen, in fp32: weights, moments and moving averages are bit for bit those that
were saved.

Experts may move to other ranks at a resume. The experts of a layer are in order over the ranks of
an expert-parallel group, so another placement is another order: they are relabelled in everything
that a checkpoint holds, results unchanged, the router's tensors with them, so that a token finds
the same expert under its new number. The order in force is kept with the run
(`parallel.expert_order`), in the first numbers of the experts, and is in routing.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promoe_ds.backends.deepspeed_private import ZeroPartitions
from promoe_ds.backends.expert_parallel import ShardedExperts
from promoe_ds.checkpoint.manifest import Manifest, read_manifest
from promoe_ds.checkpoint.save import TrainingState
from promoe_ds.checkpoint.zero_files import MOMENTS, PREFIX, WEIGHTS, is_weights
from promoe_ds.checkpoint.zero_reader import ShardedCheckpoint
from promoe_ds.config import RunConfig
from promoe_ds.config.optimizer import OptimizerConfig
from promoe_ds.errors import ConfigError
from promoe_ds.logs import get_logger
from promoe_ds.model.dit import DiT
from promoe_ds.moe.experts import EXPERT_PARAMETERS

_LOG = get_logger("checkpoint")


@torch.no_grad()
def load_resharded(trainer: TrainingState, folder: Path, manifest: Manifest) -> None:
    """Fill the trainer's weights, optimizer state, averages and routers' state from a checkpoint of
    any layout.

    A checkpoint without moments gives a fresh optimizer state, one without averages starts them at
    the weights: a conversion without --with-optimizer makes such ones, and the log says so.
    Averages are known by how they forget, whatever their names: another order of
    `optimizer.ema_decays` is no other average. All ranks call this together.
    Raises: CheckpointError naming the tensor that does not fit.
    """
    trainer.context.on_all_ranks(lambda: _fill(trainer, folder, manifest))
    if trainer.deepspeed_plan.zero_stage > 0:
        ZeroPartitions(trainer.engine.optimizer).write_back()


def _fill(trainer: TrainingState, folder: Path, manifest: Manifest) -> None:
    checkpoint = ShardedCheckpoint(folder, manifest)
    checkpoint.move_experts(moved_experts(manifest, trainer.network))
    saved = OptimizerConfig.model_validate(manifest.config["optimizer"]).averages
    names = {average: name for name, average in saved.items()}
    averages = trainer.ema.averages
    wanted: dict[str, str | None] = {kind: kind for kind in MOMENTS}
    wanted |= {name: names.get(average) for name, average in averages.items()}
    found = {kind: source for kind, source in wanted.items() if source in checkpoint.kinds}
    missing = [kind for kind in wanted if kind not in found]
    since = {kind: manifest.averages_since.get(source) for kind, source in found.items()}
    since |= {kind: manifest.step for kind in missing if kind in averages}
    trainer.ema.averages_since = {kind: step for kind, step in since.items() if step is not None}
    if trainer.context.is_main:
        _report_losses(
            folder,
            [f"{name} ({saved[name]})" for name in saved if name not in wanted.values()],
            [f"{name} ({averages[name]})" if name in averages else name for name in missing],
        )
    for name, start, kinds in _owned_values(trainer, checkpoint.optimizer_step or 0):
        for kind, out in kinds.items():
            if source := found.get(kind, WEIGHTS if is_weights(kind) else None):
                checkpoint.read_into(out, source, name, start)
    state = dict(trainer.network.named_buffers())
    for name, value in checkpoint.buffers.items():
        state[name].copy_(value)


def _report_losses(folder: Path, dropped: list[str], missing: list[str]) -> None:
    """Say which averages are left behind, and which state begins anew."""
    if dropped:
        _LOG.warning(
            "resume: the averages %s are given up: optimizer.ema_decays and ema_sigma_rels no"
            " longer name them",
            ", ".join(dropped),
        )
    if missing:
        _LOG.warning(
            "resume: %s holds no %s: the optimizer's moments start at zero, averages at the"
            " weights, where they are missing",
            folder,
            ", ".join(missing),
        )


def _owned_values(
    trainer: TrainingState, step: int
) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    """Yield all that this rank keeps, its optimizer state made: a parameter's name, where the
    values begin in the whole parameter, and this rank's tensors of them by kind.
    """
    names = {
        id(parameter): name.removeprefix(PREFIX)
        for name, parameter in trainer.module.named_parameters()
    }
    first = {
        id(parameter): module.first_expert * math.prod(parameter.shape[1:])
        for module in trainer.module.modules()
        if isinstance(module, ShardedExperts)
        for parameter in module.parameters()
    }

    def place(parameter: Tensor, start: int = 0) -> tuple[str, int]:
        return names[id(parameter)], first.get(id(parameter), 0) + start

    for parameter in trainer.module.parameters():
        if not parameter.requires_grad:
            yield *place(parameter), {WEIGHTS: parameter.data.view(-1)}
    state_kinds = (*MOMENTS, *trainer.ema.averages)
    if trainer.deepspeed_plan.zero_stage == 0:
        optimizer = trainer.engine.optimizer
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = _fresh_state(optimizer.state, parameter, step, state_kinds)
                kinds = {WEIGHTS: parameter.data, **state}
                yield *place(parameter), {kind: value.view(-1) for kind, value in kinds.items()}
        return
    partitions = ZeroPartitions(trainer.engine.optimizer)
    for group, flat in enumerate(partitions.flats):
        kinds = {WEIGHTS: flat.data, **_fresh_state(partitions.states, flat, step, state_kinds)}
        for part in partitions.slices(group):
            within = slice(part.flat_start, part.flat_start + part.numel)
            values = {kind: value[within] for kind, value in kinds.items()}
            yield *place(part.parameter, part.start), values


def _fresh_state(
    states: dict, parameter: Tensor, step: int, kinds: tuple[str, ...]
) -> dict[str, Tensor]:
    """Make the optimizer state of one parameter or flat slice, as AdamW and `Ema` would at its
    first update; return its `kinds`.
    """
    values = {kind: torch.zeros_like(parameter.data) for kind in kinds}
    states[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **values}
    return values


def with_placement_of(config: RunConfig, checkpoint: Path | None) -> RunConfig:
    """Return the config with the order that experts will have: the one asked for, else the
    checkpoint's.

    Raises: ConfigError if a placement is asked for and there is no checkpoint whose experts could
        be moved.
    """
    if config.parallel.expert_placement is not None:
        if checkpoint is None:
            raise ConfigError(
                f"parallel.expert_placement={config.parallel.expert_placement} moves trained"
                " experts, but this run starts at step 0: leave it out, or --resume from a"
                " checkpoint"
            )
        return config
    order = None if checkpoint is None else _saved_order(read_manifest(checkpoint))
    return config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"expert_order": order})}
    )


def moves_experts(manifest: Manifest, config: RunConfig) -> bool:
    """Return whether experts are in another order than when the checkpoint was written."""
    saved, wanted = _saved_order(manifest), config.parallel.expert_order
    plain = tuple(tuple(range(config.routing.num_experts)) for _ in config.moe_block_indices)
    return (saved or plain) != (wanted or plain)


def moved_experts(manifest: Manifest, network: DiT) -> dict[str, list[int]]:
    """Return, for each tensor of experts, where each place's expert is in the checkpoint; nothing
    where they stay.
    """
    config = network.config
    if not moves_experts(manifest, config):
        return {}
    _LOG.info(
        "resume: experts move to the places of parallel.expert_placement=%s",
        config.parallel.expert_placement,
    )
    saved, plain = _saved_order(manifest), range(config.routing.num_experts)
    sources: dict[str, list[int]] = {}
    for row, (block, layer) in enumerate(network.moe_layers().items()):
        before = saved[row] if saved else plain
        places = [before.index(expert) for expert in config.expert_order_of(row) or plain]
        names = [f"routed.{name}" for name in EXPERT_PARAMETERS[config.routing.expert_type]]
        names += [f"router.{name}" for name in layer.router.per_expert]
        sources |= {f"blocks.{block}.moe.{name}": places for name in names}
    return sources


def _saved_order(manifest: Manifest) -> tuple[tuple[int, ...], ...] | None:
    order: Any = manifest.config.get("parallel", {}).get("expert_order")
    return None if order is None else tuple(tuple(layer) for layer in order)
