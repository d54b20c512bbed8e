"""The training loop, on one screen, and what surrounds it: run directory, resume, logging, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from promoe_ds.checkpoint.expert_order import with_placement_of
from promoe_ds.checkpoint.load import differing_fields, load_checkpoint
from promoe_ds.checkpoint.manifest import list_checkpoints
from promoe_ds.checkpoint.resume import choose_checkpoint
from promoe_ds.checkpoint.save import Saver
from promoe_ds.config import DeepSpeedPlan, RunConfig, config_from_dict, plan_batches
from promoe_ds.data import build_dataset
from promoe_ds.distributed.context import Ranks, from_main
from promoe_ds.errors import CheckpointError, Preempted, PromoeError, TrainingError
from promoe_ds.launch.heartbeat import DUMP_FOLDER, LAUNCH_FOLDER
from promoe_ds.logs import configure_logging, get_logger
from promoe_ds.train.metrics import MetricsWriter
from promoe_ds.train.step import StepResult
from promoe_ds.train.supervisor import Supervisor
from promoe_ds.train.trainer import Session, build_session, start_routers, train_step

_LOG = get_logger("train")

#: Returns figures of a step's averaged weights by name.
Evaluate = Callable[[Session], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a user asked for."""

    config: RunConfig
    deepspeed_plan: DeepSpeedPlan
    run_dir: Path
    resume: str
    #: Judges the averaged weights every `evaluation.every` steps; its figures join that step's log line.
    evaluate: Evaluate | None = None


def train(run: Run, ranks: Ranks, supervisor: Supervisor | None = None) -> None:
    """Train to the end, or to `train.stop_after_steps`, from wherever the run stands.

    Raises: PromoeError of the kind that fits, the same on every rank; Preempted if the job was asked to stop.
    """
    supervisor = supervisor or Supervisor(run.config.supervision, run.run_dir)
    supervisor.know_peers()
    _claim_run_directory(run, ranks)
    configure_logging(ranks.rank, log_file=run.run_dir / "train.log")
    choice = choose_checkpoint(run.resume, run.run_dir, ranks)
    run = replace(run, config=with_placement_of(run.config, choice.folder))
    batches = plan_batches(run.config, ranks.world_size)
    session = build_session(run.config, run.deepspeed_plan, batches, ranks, build_dataset(run.config, ranks.device))
    if choice.folder is None:
        start_routers(session)
        session.routing.forget_waits()
    else:
        load_checkpoint(session, choice.folder, same_run=choice.same_run)
    parallel, plan = run.config.parallel, run.deepspeed_plan
    _LOG.info("%s: %d ranks, ep_size %d, dispatch %s, experts by %s, ZeRO %d, %s, micro-batch %d, accumulation %d, from step %d",
              run.config.name, ranks.world_size, parallel.ep_size, parallel.resolved_dispatch, run.config.experts_by,
              plan.zero_stage, plan.precision, batches.micro_batch, batches.accumulation, session.step)
    writer = MetricsWriter(run.run_dir, run.config, ranks, start_step=session.step)
    try:
        _loop(session, writer, Saver(session, run.run_dir / "checkpoints"), supervisor, run.evaluate)
    finally:
        writer.close()


def _loop(session: Session, writer: MetricsWriter, saver: Saver, supervisor: Supervisor, evaluate: Evaluate | None) -> None:
    settings, started, logged, skipped_in_a_row = session.config.train, session.step, session.step, 0
    last = min(settings.max_steps, started + (settings.stop_after_steps or settings.max_steps))
    if started >= settings.max_steps:
        _LOG.info("nothing to do: step %d of %d is reached", started, settings.max_steps)
    session.health.wants_to_stop = supervisor.wants_to_stop
    while session.step < last:
        supervisor.begin_step(session.step)
        result = train_step(session)
        supervisor.end_step()
        last = session.step if session.health.stop_agreed else last
        writer.tick()
        skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
        if result.skipped and session.ranks.is_main:
            _LOG.warning("skipped the update, %d in a row: %s", skipped_in_a_row, result.problem)
        saver.poll()
        if skipped_in_a_row >= settings.max_nonfinite_steps:
            saver.finish()
            raise TrainingError(f"{skipped_in_a_row} updates in a row were not finite (train.max_nonfinite_steps="
                                f"{settings.max_nonfinite_steps}); {result.problem}. Branch from a checkpoint before it, "
                                "with a lower optimizer.lr: --resume CHECKPOINT --run-dir NEW")
        if session.step % settings.log_every == 0 or session.step == last:
            lines = session.routing.reduce(step=session.step, steps=session.step - logged, last=session.step == last)
            images_per_second, figures = writer.images_per_second(), {}
            if evaluate is not None and session.step % session.config.evaluation.every == 0 and _has_time_for_it(session):
                with supervisor.evaluating():
                    figures = evaluate(session)
                session.routing.forget_waits()
            writer.write(session.step, {**_reduced(result), **figures}, lines, images_per_second)
            logged = session.step
        if session.step % settings.checkpoint_every == 0 or session.step == last:
            with supervisor.saving():
                saver.save()
            writer.restart_clock()
    with supervisor.saving():
        saver.finish()
    if session.health.stop_agreed and session.step < settings.max_steps:
        raise Preempted(f"asked to stop ({supervisor.stop_reason}): saved step {session.step} of {settings.max_steps} and ended; "
                        "go on with --resume auto")
    if session.step < settings.max_steps:
        _LOG.info("stopped after step %d of %d (train.stop_after_steps)", session.step, settings.max_steps)


def _has_time_for_it(session: Session) -> bool:
    """Whether to begin an evaluation: a job that was asked to stop has minutes, which belong to its checkpoint."""
    if session.health.stop_agreed and session.ranks.is_main:
        _LOG.warning("asked to stop: step %d goes without its evaluation", session.step)
    return not session.health.stop_agreed


def _reduced(result: StepResult) -> dict[str, float]:
    """Average the loss terms over the ranks.  Collectives: one."""
    names = sorted(result.terms)
    values = torch.stack([result.terms[name].float() for name in names])
    dist.all_reduce(values)
    means = dict(zip(names, (values / dist.get_world_size()).tolist(), strict=True))
    return {"loss": sum(means.values()), **{f"loss_{name}": value for name, value in means.items()}, "lr": result.lr,
            "grad_norm": result.grad_norm}


def _claim_run_directory(run: Run, ranks: Ranks) -> None:
    """Create the run directory, or recognise it as this run's; the same verdict on every rank."""
    problem: PromoeError | None = None
    if ranks.is_main:
        try:
            _claim(run)
        except PromoeError as error:
            problem = error
        except OSError as error:
            problem = CheckpointError(f"--run-dir {run.run_dir}: {error}")
    if (problem := from_main(problem)) is not None:
        raise problem


def _claim(run: Run) -> None:
    saved = run.run_dir / "config.yaml"
    started = (run.run_dir / "metrics.jsonl").exists() or list_checkpoints(run.run_dir / "checkpoints")
    if saved.is_file() and started:
        if run.resume == "none":
            raise CheckpointError(f"--run-dir {run.run_dir} already holds a run and --resume none would overwrite it: use "
                                  "--resume auto to go on with it, or another directory")
        before = _read_saved(saved)
        differing = differing_fields(before.model_dump(mode="json"), run.config, architecture_only=False)
        if differing:
            raise CheckpointError(f"--run-dir {run.run_dir} already holds another run: {'; '.join(differing)}. To go on from it "
                                  f"with other settings, branch: --resume {run.run_dir} --run-dir NEW")
    elif not saved.is_file() and run.run_dir.is_dir() and {p.name for p in run.run_dir.iterdir()} - {LAUNCH_FOLDER, DUMP_FOLDER}:
        raise CheckpointError(f"--run-dir {run.run_dir} is not empty and holds no run of this package: use another directory")
    run.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    (run.run_dir / "checkpoints").mkdir(exist_ok=True)
    temporary = saved.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    temporary.replace(saved)


def _read_saved(path: Path) -> RunConfig:
    try:
        return config_from_dict(yaml.safe_load(path.read_text(encoding="utf-8")), source=str(path), saved_by="another version")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): restore it from a checkpoint's manifest.json") from None
