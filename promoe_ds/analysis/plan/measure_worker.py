"""One rank of a measurement: trains a few steps and leaves its resident memory and traffic. Started by `measured`."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from promoe_ds.analysis.plan.measured import RankMeasurement, write_measurement
from promoe_ds.analysis.plan.trace import CollectiveWatch
from promoe_ds.backends.process_group import start_distributed
from promoe_ds.config import RunConfig, config_from_dict, plan_batches, resolve_deepspeed
from promoe_ds.data import LatentDataset, build_dataset
from promoe_ds.diffusion import draw_batch
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.distributed.process_group import complete_environment, stop_distributed
from promoe_ds.model import build_model, initialise
from promoe_ds.train.step import TrainingModule
from promoe_ds.train.trainer import Trainer

_STEPS = 2
_Step = Callable[[], Any]


def main() -> None:
    """Measure the job whose file is the argument."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config = config_from_dict(job["config"], source="measurement")
    complete_environment()
    ranks = start_distributed(timeout_seconds=300)
    dataset = build_dataset(config)
    rows: list[int] = []
    # Libraries load and compile on first use: that is no cost of the model.
    _prepare(job["zero"], _tiny(config), ranks, build_dataset(_tiny(config)), [])()
    _settle()
    baseline = _resident("VmRSS")
    step = _prepare(job["zero"], config, ranks, dataset, rows)
    step()  # moments and averages are made in the first step
    _settle()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew from here
    for _ in range(_STEPS):
        step()
    peak = _resident("VmHWM")
    rows.clear()
    with CollectiveWatch() as watch:
        step()
    sent = sum(sum(s for m, s in zip(one.members, one.bytes_by_member, strict=True) if m != ranks.rank)
               for one in watch.sent if one.rows)
    write_measurement(Path(job["folder"]) / f"{ranks.rank}.json", RankMeasurement(baseline, peak, sum(rows), sent))
    stop_distributed()


def _tiny(config: RunConfig) -> RunConfig:
    values = config.model_dump(mode="json")
    values["model"] |= {"preset": None, "hidden_size": 32, "num_heads": 2, "depth": 2}
    values["routing"] |= {"expert_width": None, "shared_expert_width": None}
    return config_from_dict(values, source="measurement")


def _prepare(zero: dict[str, Any] | None, config: RunConfig, ranks: DistributedContext, dataset: LatentDataset, rows: list[int]) -> _Step:
    return _plain(config, ranks, dataset) if zero is None else _trainer(zero, config, ranks, dataset, rows)


def _trainer(zero: dict[str, Any], config: RunConfig, ranks: DistributedContext, dataset: LatentDataset, rows: list[int]) -> _Step:
    batches = plan_batches(config, ranks.world_size)
    plan = resolve_deepspeed({"zero_optimization": zero}, config, batches, source="measurement")
    session = Trainer.build(config, plan, ranks, dataset)
    for layer in session.module.denoiser.moe_layers().values():
        layer.router.register_forward_hook(
            lambda router, inputs, plan, layer=layer: rows.append(int(layer.dispatcher.rows_leaving(plan.assignment))))
    return session.train_step


def _plain(config: RunConfig, ranks: DistributedContext, dataset: LatentDataset) -> _Step:
    """Data parallelism as published code has it: every rank holds everything, the moving average a second model."""
    network = build_model(config)
    initialise(network, config.train.seed)
    module = DistributedDataParallel(TrainingModule(network).train(), gradient_as_bucket_view=True)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.optimizer.lr, fused=True)
    batches = plan_batches(config, ranks.world_size)

    def step() -> None:
        for micro_step in range(batches.accumulation):
            slots = batches.slots(micro_step, ranks.rank)
            clean, labels = dataset.take(list(slots))
            batch = draw_batch(clean, labels, module.module.objective, null_label=config.model.null_label,
                               seed=config.train.seed, step=0, slots=slots)
            module(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            for kept, parameter in zip(average.parameters(), network.parameters(), strict=True):
                kept.lerp_(parameter, 1e-4)

    return step


def _settle() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
