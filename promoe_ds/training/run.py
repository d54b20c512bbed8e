"""One run, from a config to its end: run directory, checkpoint to resume from, trainer, and what
happens every N steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from promoe_ds.checkpoint.conversion.branch import find_start
from promoe_ds.checkpoint.load import load_checkpoint
from promoe_ds.checkpoint.manifest import read_manifest
from promoe_ds.checkpoint.resharding import with_placement_of
from promoe_ds.checkpoint.resume import choose_checkpoint
from promoe_ds.checkpoint.save import Saver
from promoe_ds.config import DeepSpeedPlan, RunConfig
from promoe_ds.data import build_dataset, with_resolved_data
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import TrainingError
from promoe_ds.logs import get_logger
from promoe_ds.moe.experts import at_autocast_dtype
from promoe_ds.training.loop import FinishedStep, TrainingLoop
from promoe_ds.training.metrics import MetricsWriter
from promoe_ds.training.run_directory import run_directory
from promoe_ds.training.step import StepResult
from promoe_ds.training.supervisor import Supervisor
from promoe_ds.training.trainer import Trainer

_LOG = get_logger("train")

#: Returns figures of the averaged weights by name.
Evaluate = Callable[[Trainer], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a user asked for."""

    config: RunConfig
    deepspeed_plan: DeepSpeedPlan
    run_dir: Path
    resume: str
    #: Of `find_start`, where a branch has other classes.
    label_map: Path | None = None
    #: Evaluates the averaged weights every `evaluation.every` steps; its figures join that step's
    # log line.
    evaluate: Evaluate | None = None


def train(run: Run, context: DistributedContext, supervisor: Supervisor | None = None) -> None:
    """Train to the end, or to `train.stop_after_steps`, from what the run directory holds.

    Raises: PromoeError of the kind that fits, the same on every rank; Preempted after a shutdown
    request.
    """
    supervisor = supervisor or Supervisor(run.config.supervision)
    supervisor.know_peers(context)
    with run_directory(run.run_dir, run.config, context, resume=run.resume):
        _train(run, context, supervisor)


def _train(run: Run, context: DistributedContext, supervisor: Supervisor) -> None:
    choice = choose_checkpoint(
        run.resume,
        run.run_dir,
        context,
        lambda path: find_start(path, run.config, run.run_dir / "start", run.label_map),
    )
    config = with_placement_of(run.config, choice.folder)
    dataset = build_dataset(config, context.device)
    config = with_resolved_data(config, dataset)
    trainer = Trainer(config, run.deepspeed_plan, context, dataset)
    if choice.folder is None:
        trainer.start_routers()
    else:
        load_checkpoint(trainer, choice.folder, same_run=choice.same_run)
    trainer.check_latents()
    _describe(trainer)
    same_run = choice.folder is not None and choice.same_run
    writer = MetricsWriter(
        run.run_dir,
        config,
        context,
        start_step=trainer.step,
        wandb_id=read_manifest(choice.folder).wandb_id if same_run and context.is_main else "",
    )
    saver = Saver(trainer, run.run_dir / "checkpoints")
    try:
        _Actions(trainer, writer, saver, supervisor, run.evaluate).loop().run()
    except TrainingError:
        saver.finish()
        raise
    finally:
        trainer.loader.close()
        writer.close()


class _Actions:
    """What happens beside training."""

    def __init__(
        self,
        trainer: Trainer,
        writer: MetricsWriter,
        saver: Saver,
        supervisor: Supervisor,
        evaluate: Evaluate | None,
    ) -> None:
        self._trainer, self._writer, self._saver = trainer, writer, saver
        self._supervisor, self._evaluate, self._logged = supervisor, evaluate, trainer.step

    def loop(self) -> TrainingLoop:
        """Return the training loop with all actions, in order."""
        config, loop = self._trainer.config, TrainingLoop(self._trainer, self._supervisor)
        loop.every(1, lambda _: self._saver.poll())
        if self._evaluate is not None:
            loop.every(config.evaluation.every, self._run_evaluation, at_end=False)
        loop.every(config.train.log_every, self._log)
        loop.every(config.train.checkpoint_every, self._save)
        return loop

    def _run_evaluation(self, finished: FinishedStep) -> None:
        # A batch system leaves minutes, which the checkpoint needs.
        if finished.result.verdict.stop_requested:
            if self._trainer.context.is_main:
                _LOG.warning("shutdown requested: no evaluation at step %d", finished.step)
            return
        with (
            self._writer.paused(),
            self._supervisor.evaluating(),
            self._trainer.routing.waits_paused(),
        ):
            finished.figures |= self._evaluate(self._trainer)

    def _log(self, finished: FinishedStep) -> None:
        lines = self._trainer.routing.reduce(
            step=finished.step, steps=finished.step - self._logged, last=finished.is_last
        )
        self._writer.write(finished.step, {**_reduced(finished.result), **finished.figures}, lines)
        self._logged = finished.step

    def _save(self, finished: FinishedStep) -> None:
        with self._writer.paused(), self._supervisor.saving():
            self._saver.save()
            if finished.is_last:
                self._saver.finish()


def _reduced(result: StepResult) -> dict[str, float]:
    """Average the loss terms over the ranks.  Collectives: one."""
    names = sorted(result.terms)
    values = torch.stack([result.terms[name].float() for name in names])
    dist.all_reduce(values)
    means = dict(zip(names, (values / dist.get_world_size()).tolist(), strict=True))
    return {
        "loss": sum(means.values()),
        **{f"loss_{name}": value for name, value in means.items()},
        "lr": result.lr,
        "grad_norm": result.verdict.grad_norm,
    }


def _describe(trainer: Trainer) -> None:
    config, plan, batches = trainer.config, trainer.deepspeed_plan, trainer.batches
    _LOG.info(
        "%s: %d ranks, ep_size %d, dispatch %s, experts by %s, ZeRO %d, %s, micro-batch %d,"
        " accumulation %d, from step %d",
        config.name,
        trainer.context.world_size,
        config.parallel.ep_size,
        config.parallel.resolved_dispatch,
        _experts_by(trainer),
        plan.zero_stage,
        plan.precision if config.precision.compute != "bf16_autocast" else "bf16_autocast",
        batches.micro_batch,
        batches.accumulation,
        trainer.step,
    )
    if trainer.context.device.type == "cpu" and plan.precision == "bf16":
        _LOG.warning("bf16 is slow on CPUs: ds_configs/zero2_fp32.json trains in fp32")


def _experts_by(trainer: Trainer) -> str:
    """Return who computes the routed experts: Megatron, Transformer Engine, or the backend that
    `auto` picks for this device.
    """
    config, layers = trainer.config, list(trainer.network.moe_layers().values())
    if not layers:
        return "none"
    if config.parallel.resolved_dispatch == "megatron":
        return "megatron"
    if config.precision.uses_transformer_engine:
        return "transformer_engine"
    experts = layers[0].routed
    with trainer.module.compute_context():
        return experts.backend_for(at_autocast_dtype(experts.up_weight[:0]))
