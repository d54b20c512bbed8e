"""Resuming on other ranks, expert parallelism or ZeRO stage: every rank fills what it owns from the
files of any layout.

Only plain copies happen, in fp32: weights, moments and moving averages are bit for bit those that
    were saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from promoe_ds.backends.deepspeed_private import ZeroPartitions
from promoe_ds.backends.expert_parallel import ShardedExperts
from promoe_ds.checkpoint.expert_order import relabelled
from promoe_ds.checkpoint.manifest import Manifest
from promoe_ds.checkpoint.training_state import TrainingState
from promoe_ds.checkpoint.zero_reader import MOMENTS, PREFIX, WEIGHTS, ShardedCheckpoint
from promoe_ds.config.optimizer import EMA, OptimizerConfig
from promoe_ds.logs import get_logger

_LOG = get_logger("checkpoint")


@dataclass(frozen=True)
class _Owned:
    """Values of one parameter that this rank keeps: where they lie in the whole parameter, and in
    this rank's tensors.
    """

    name: str
    start: int
    kinds: dict[str, Tensor]


@torch.no_grad()
def load_resharded(trainer: TrainingState, folder: Path, manifest: Manifest) -> None:
    """Fill the trainer's weights, optimizer state, averages and routers' state from a checkpoint of
    any layout.

    A checkpoint without moments gives a fresh optimizer state, one without averages starts them at
    the weights: a conversion without --with-optimizer makes such ones, and the log says so.
    Averages are known by how they forget, whatever
    their names: another order of `optimizer.ema_decays` is no other average. All ranks call this
        together.
    Raises: CheckpointError naming the tensor that does not fit.
    """
    trainer.context.on_all_ranks(lambda: _fill(trainer, folder, manifest))
    if trainer.deepspeed_plan.zero_stage > 0:
        ZeroPartitions(trainer.engine.optimizer).write_back()


def _fill(trainer: TrainingState, folder: Path, manifest: Manifest) -> None:
    checkpoint = relabelled(ShardedCheckpoint(folder, manifest), manifest, trainer.network)
    kept = kept_averages(manifest, trainer.config.optimizer)
    sources = {
        kind: kept.get(kind) if kind.startswith(EMA) else kind for kind in _state_kinds(trainer)
    }
    missing = [kind for kind, source in sources.items() if source not in checkpoint.kinds]
    trainer.ema.averages_since = {
        kind: manifest.step for kind in missing if kind.startswith(EMA)
    } | {
        kind: manifest.averages_since[source]
        for kind, source in sources.items()
        if source in manifest.averages_since
    }
    if trainer.context.is_main:
        _report_losses(trainer, folder, manifest, missing)
    for owned in _owned_values(trainer, checkpoint.optimizer_step or 0):
        for kind, out in owned.kinds.items():
            if kind == WEIGHTS or kind not in missing:
                checkpoint.read_into(out, sources.get(kind, kind), owned.name, owned.start)
            elif kind.startswith(EMA):
                checkpoint.read_into(out, WEIGHTS, owned.name, owned.start)
            else:
                out.zero_()
    state = dict(trainer.network.named_buffers())
    for name, value in checkpoint.buffers().items():
        state[name].copy_(value)


def _report_losses(
    trainer: TrainingState, folder: Path, manifest: Manifest, missing: list[str]
) -> None:
    """Say which averages are left behind, and which state begins anew."""
    before = OptimizerConfig.model_validate(manifest.config["optimizer"]).averages
    kept = kept_averages(manifest, trainer.config.optimizer).values()
    if dropped := [f"{name} ({average})" for name, average in before.items() if name not in kept]:
        _LOG.warning(
            "resume: the averages %s are given up: optimizer.ema_decays and ema_sigma_rels no"
            " longer name them",
            ", ".join(dropped),
        )
    if missing:
        named = [
            f"{kind} ({trainer.ema.averages[kind]})" if kind.startswith(EMA) else kind
            for kind in missing
        ]
        _LOG.warning(
            "resume: %s holds no %s: the optimizer's moments start at zero, averages at the"
            " weights, where they are missing",
            folder,
            ", ".join(named),
        )


def _owned_values(trainer: TrainingState, step: int) -> Iterator[_Owned]:
    """Yield all that this rank keeps, its optimizer state made."""
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
    state_kinds = _state_kinds(trainer)
    if trainer.deepspeed_plan.zero_stage == 0:
        optimizer = trainer.engine.optimizer
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                kinds = {
                    WEIGHTS: parameter.data,
                    **_fresh_state(optimizer.state, parameter, step, state_kinds),
                }
                yield _Owned(
                    names[id(parameter)],
                    first.get(id(parameter), 0),
                    {kind: value.view(-1) for kind, value in kinds.items()},
                )
        return
    partitions = ZeroPartitions(trainer.engine.optimizer)
    for group, flat in enumerate(partitions.flats):
        kinds = {WEIGHTS: flat.data, **_fresh_state(partitions.states, flat, step, state_kinds)}
        for part in partitions.slices(group):
            within = slice(part.flat_start, part.flat_start + part.numel)
            yield _Owned(
                names[id(part.parameter)],
                first.get(id(part.parameter), 0) + part.start,
                {kind: value[within] for kind, value in kinds.items()},
            )


def kept_averages(manifest: Manifest, config: OptimizerConfig) -> dict[str, str]:
    """Return the averages that a run continues: their names -> the names that they have in a
    checkpoint.
    """
    saved = {
        average: name
        for name, average in OptimizerConfig.model_validate(
            manifest.config["optimizer"]
        ).averages.items()
    }
    return {name: saved[average] for name, average in config.averages.items() if average in saved}


def _state_kinds(trainer: TrainingState) -> tuple[str, ...]:
    """Return what the optimizer keeps of every value beside the value itself."""
    return (*MOMENTS, *trainer.ema.averages)


def _fresh_state(
    states: dict, parameter: Tensor, step: int, kinds: tuple[str, ...]
) -> dict[str, Tensor]:
    """Make the optimizer state of one parameter or flat slice, as AdamW and `Ema` would at its
    first update; return its `kinds`.
    """
    values = {kind: torch.zeros_like(parameter.data) for kind in kinds}
    states[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **values}
    return values
