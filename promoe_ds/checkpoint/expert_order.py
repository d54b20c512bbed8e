"""Moving experts to other ranks at a resume: they are relabelled in everything that a checkpoint
holds, results unchanged.

The experts of a layer are in order over the ranks of an expert-parallel group, so another placement
is another order. The router's tensors follow it, so that a token finds the same expert under its
new number. The order in force is kept with the run (`parallel.expert_order`), in the first numbers
of the experts, and is in routing.jsonl.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from promoe_ds.checkpoint.manifest import Manifest, read_manifest
from promoe_ds.config import RunConfig
from promoe_ds.errors import ConfigError
from promoe_ds.logs import get_logger
from promoe_ds.model.dit import DiT
from promoe_ds.moe.experts import EXPERT_PARAMETERS

_LOG = get_logger("checkpoint")
Order = tuple[tuple[int, ...], ...]


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
    """Return whether experts lie in another order than when the checkpoint was written."""
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


def _saved_order(manifest: Manifest) -> Order | None:
    order: Any = manifest.config.get("parallel", {}).get("expert_order")
    return None if order is None else tuple(tuple(layer) for layer in order)
