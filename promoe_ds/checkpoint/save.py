"""Saving: a checkpoint is complete or ignored, written at once or while training continues."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from msgspec.structs import replace
from torch import nn

from promoe_ds.backends.parameter_groups import is_reordered, lays_joined
from promoe_ds.checkpoint.manifest import (
    UNFINISHED,
    Layout,
    Manifest,
    find_problems,
    list_checkpoints,
    read_wandb_id,
    step_folder,
    step_of,
)
from promoe_ds.config import BatchPlan, DeepSpeedPlan, RunConfig
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import CheckpointError, first_few
from promoe_ds.files import replace_text
from promoe_ds.logs import get_logger
from promoe_ds.model.dit import DiT
from promoe_ds.versions import versions_of

_LOG = get_logger("checkpoint")
#: Ends the name of a checkpoint that is being deleted.
_DELETED = ".deleted"


class TrainingState(Protocol):
    """The trainer, as far as checkpoints know it."""

    config: RunConfig
    deepspeed_plan: DeepSpeedPlan
    batches: BatchPlan
    context: DistributedContext
    #: DeepSpeed's engine.
    engine: Any
    #: The moving averages in the optimizer's state: `averages`, `averages_since`.
    ema: Any
    step: int
    samples_seen: int

    @property
    def dataset(self) -> Sized:
        """The data set."""

    @property
    def module(self) -> nn.Module:
        """The module inside the engine."""

    @property
    def network(self) -> DiT:
        """The network that is trained."""


def layout_of(trainer: TrainingState) -> Layout:
    """Return the layout that a run's checkpoints have."""
    config, plan = trainer.config, trainer.deepspeed_plan
    return Layout(
        world_size=trainer.context.world_size,
        ep_size=config.parallel.ep_size,
        dispatch=config.parallel.expert_storage,
        zero_stage=plan.zero_stage,
        precision=plan.precision,
        data_before_expert=bool(plan.json.get("use_data_before_expert_parallelism", False)),
        aligned=is_reordered(trainer.module, config.optimizer, plan.precision),
        joined=lays_joined(trainer.module, config.optimizer, plan.precision),
    )


class Saver:
    """Saves a trainer's checkpoints, one at a time.

    With `train.async_checkpoint` each rank copies its share to host memory and writes it while
    training continues. At most one checkpoint is in flight; `poll`, after every step, completes it
    once all ranks have written, or raises what went wrong.
    """

    def __init__(self, trainer: TrainingState, root: Path) -> None:
        """Save under `root`."""
        self._trainer, self._root = trainer, root
        #: Of the save in flight, still without its files.
        self._pending: Manifest | None = None

    def save(self) -> None:
        """Save the trainer as it is now; all ranks call this together.  A save in flight is waited
        for.

        Order: shards into `step_N.tmp`, manifest, rename to `step_N`, `latest`, then old
            checkpoints beyond keep_last go.
        Raises: CheckpointError on every rank if any rank could not write; what was complete before
            stays so.
        """
        self.finish()
        trainer = self._trainer
        manifest = Manifest(
            step=trainer.step,
            samples_seen=trainer.samples_seen,
            config=trainer.config.model_dump(mode="json"),
            layout=layout_of(trainer),
            files={},
            versions=versions_of("deepspeed"),
            averages_since=dict(trainer.ema.averages_since),
            dataset_size=len(trainer.dataset),
            wandb_id=read_wandb_id(self._root.parent),
        )
        folder = self._root / f"{step_folder(trainer.step)}{UNFINISHED}"
        with self._explaining(trainer.step):
            trainer.context.on_main(lambda: _make_empty(folder), flag="rank 0: ")
        trainer.engine.save_checkpoint(str(self._root), tag=folder.name, save_latest=False)
        self._pending = manifest
        if not trainer.config.train.async_checkpoint:
            self.finish()

    def poll(self) -> None:
        """Complete the save in flight if every rank has written its share; all ranks call this
        together.

        Raises: as `save`.  Collectives: one while a save is in flight, more when it ends.
        """
        if self._pending is None:
            return
        context = self._trainer.context
        is_writing = self._trainer.engine.checkpoint_engine.is_writing
        busy = torch.tensor(float(is_writing), device=context.device)
        dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        if not busy.item():
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, if there is one, and complete it; all ranks call this
        together.

        Raises: as `save`.
        """
        if self._pending is None:
            return
        manifest, self._pending = self._pending, None
        trainer, storage = self._trainer, self._trainer.engine.checkpoint_engine
        storage.wait()
        shares = trainer.context.gather((storage.records, storage.failure))
        failed = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(shares) if failure]
        files = {name: record for records, _ in shares for name, record in records.items()}
        train = trainer.config.train
        with self._explaining(manifest.step):
            if failed:
                raise CheckpointError("; ".join(failed))
            complete = replace(manifest, files=files)
            trainer.context.on_main(
                lambda: complete_checkpoint(
                    self._root, complete, keep_last=train.keep_last, keep_every=train.keep_every
                ),
                flag="rank 0: ",
            )
        _LOG.info("step %d: saved %s", manifest.step, self._root / step_folder(manifest.step))

    @contextmanager
    def _explaining(self, step: int) -> Iterator[None]:
        """Say of an error what to do, and what is left; remove what was written."""
        try:
            yield
        except CheckpointError as error:
            unfinished = self._root / f"{step_folder(step)}{UNFINISHED}"
            self._trainer.context.on_main(lambda: shutil.rmtree(unfinished, ignore_errors=True))
            newest = next(iter(list_checkpoints(self._root)), "not there yet")
            raise CheckpointError(
                f"step {step}: the checkpoint could not be written: {error}. Free or enlarge the"
                " disk, or take a --run-dir that all hosts share, and resume; the newest complete"
                f" checkpoint is {newest}"
            ) from None


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def complete_checkpoint(
    root: Path, manifest: Manifest, *, keep_last: int, keep_every: int = 0
) -> None:
    """Make the shards of `step_N.tmp` a checkpoint, and delete those that are not to be kept.

    Raises: CheckpointError if a file is not here as the rank that wrote it has it: on another
        host's disk it is no part of this checkpoint.  OSError.
    """
    final = root / step_folder(manifest.step)
    unfinished = final.with_name(f"{final.name}{UNFINISHED}")
    if problems := find_problems(unfinished, manifest.files, sizes_only=True):
        raise CheckpointError(f"{first_few(problems)}, unlike where it was written")
    manifest.write(unfinished)
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)
    replace_text(root / "latest", final.name)
    for left in root.glob(f"*{_DELETED}"):
        shutil.rmtree(left, ignore_errors=True)
    # Of those up to this step, which was just written and stays.
    written = [folder for folder in list_checkpoints(root) if step_of(folder) <= manifest.step]
    for old in written[keep_last:]:
        gone = old.with_name(f"{old.name}{_DELETED}")
        if not gone.exists() and (not keep_every or step_of(old) % keep_every):
            # Renamed first: half a deletion must not look like a checkpoint.
            shutil.rmtree(old.rename(gone), ignore_errors=True)
