"""`--dry-run`: what would be run, without running it."""

from __future__ import annotations

import sys

import yaml

from promoe_ds.config import (
    BatchPlan,
    DeepSpeedPlan,
    RunConfig,
    count_parameters,
    training_flops_per_image,
)
from promoe_ds.files import json_text
from promoe_ds.logs import rank_from_environment
from promoe_ds.planning.cluster import layout_of
from promoe_ds.planning.zero import states_of_config

_GIGABYTE = 1e9


def describe(config: RunConfig, plan: DeepSpeedPlan, batches: BatchPlan) -> None:
    """Write the resolved config, parameter counts and memory plan to standard output, from rank
    0.
    """
    if rank_from_environment() != 0:
        return
    count = count_parameters(config)
    memory = states_of_config(config, layout_of(batches, plan))
    sizes = {
        "parameters": {
            "total": count.total,
            "activated": count.activated,
            "trainable": count.trainable,
            "routed_experts": count.routed,
        },
        "training_gflops_per_image": round(training_flops_per_image(config) / 1e9, 3),
        "batch": {
            "global": batches.global_batch,
            "micro": batches.micro_batch,
            "accumulation": batches.accumulation,
            "ranks": batches.world_size,
        },
        "model_state_gb_per_rank": {
            kind: round(getattr(memory, kind) / _GIGABYTE, 3)
            for kind in ("weights", "gradients", "optimizer", "ema", "total", "device", "host")
        },
        "optimizer_and_ema_lie_in": "host memory" if plan.offloads else "device memory",
    }
    sys.stdout.write("# recipe\n" + yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    sys.stdout.write("# deepspeed\n" + json_text(plan.json, indent=2) + "\n")
    sys.stdout.write(
        "# sizes (GB are 10^9 bytes, without activations: promoe-plan counts those)\n"
        + yaml.safe_dump(sizes, sort_keys=False)
    )
    for name, average in config.optimizer.averages.items():
        if warning := average.warning(name, config.train.max_steps):
            sys.stdout.write(f"# {warning}\n")
