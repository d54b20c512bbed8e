"""One rank of a distributed test: runs the real training loop for several jobs in one process
group.

Forked by `jobs.run_jobs`; a job is a run directory, overrides, a ZeRO stage and, if asked, a fault.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from promoe_ds.backends.process_group import start_distributed
from promoe_ds.checkpoint.engine import RecordingStorage
from promoe_ds.checkpoint.load import load_checkpoint
from promoe_ds.checkpoint.save import Saver
from promoe_ds.config import load_config, plan_batches, resolve_deepspeed
from promoe_ds.data import build_dataset
from promoe_ds.diffusion.rectified_flow import RectifiedFlow
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.distributed.process_group import complete_environment, stop_distributed
from promoe_ds.errors import PromoeError
from promoe_ds.training import trainer as trainer_module
from promoe_ds.training.run import Run, train
from promoe_ds.training.trainer import Trainer

REAL_LOSSES = RectifiedFlow.losses
REAL_WRITE = RecordingStorage._write


class _NanGradient(torch.autograd.Function):
    """Leaves a value as it is and makes its gradient NaN."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def run_job(job: dict, ranks: DistributedContext) -> str:
    """Run one job; return "" or the message of the error that ended it."""
    values = {
        "zero_optimization": {"stage": job["zero_stage"]},
        "bf16": {"enabled": job["bf16"]},
        **job["deepspeed"],
    }
    fault = job["fault"]
    is_write = fault is not None and fault["kind"] == "write"
    RectifiedFlow.losses = _poisoned_losses(fault, ranks) if fault and not is_write else REAL_LOSSES
    trainer_module.decides_on_device = lambda *unused: job["decides_on_device"]
    RecordingStorage._write = _slow_write(fault, ranks) if is_write else REAL_WRITE
    try:
        config = load_config(job["recipe"], job["overrides"])
        plan = resolve_deepspeed(
            values, config, plan_batches(config, ranks.world_size), source="job"
        )
        run = Run(
            config=config, deepspeed_plan=plan, run_dir=Path(job["run_dir"]), resume=job["resume"]
        )
        if job["resave_to"]:
            _resave(run, ranks, Path(job["resave_to"]))
        else:
            train(run, ranks)
    except PromoeError as error:
        return str(error)
    return ""


def _resave(run: Run, ranks: DistributedContext, root: Path) -> None:
    """Load a checkpoint and save it again as it is, without a step between."""
    trainer = Trainer(run.config, run.deepspeed_plan, ranks, build_dataset(run.config))
    load_checkpoint(trainer, Path(run.resume), same_run=False)
    Saver(trainer, root).save()


def _poisoned_losses(fault: dict, ranks: DistributedContext):
    """Make loss or gradient NaN on one rank at the given calls (one call a micro-step)."""
    calls = iter(range(10**6))

    def losses(self, prediction, batch):
        call = next(calls)
        if ranks.rank != fault["rank"] or call not in fault["calls"]:
            return REAL_LOSSES(self, prediction, batch)
        if fault["kind"] == "loss":
            return {
                name: value * float("nan")
                for name, value in REAL_LOSSES(self, prediction, batch).items()
            }
        return REAL_LOSSES(self, _NanGradient.apply(prediction), batch)

    return losses


def _slow_write(fault: dict, ranks: DistributedContext):
    """Take a while for every file, and fail with the files of some steps on one rank."""

    def write(self, state, path):
        time.sleep(fault["seconds"])
        if ranks.rank == fault["rank"] and path.parent.name.startswith(fault["fails"]):
            self.failure = f"{path}: the disk is on fire"
            return
        REAL_WRITE(self, state, path)

    return write


def run_worker(jobs: list[dict], target: Path) -> None:
    """Be one rank: run all jobs, rank 0 writes their errors."""
    complete_environment()
    ranks = start_distributed(timeout_seconds=60)
    errors = [run_job(job, ranks) for job in jobs]
    if ranks.is_main:
        target.write_text(json.dumps(errors))
    stop_distributed()
