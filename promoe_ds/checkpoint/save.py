"""Saving: a checkpoint is complete or ignored, written at once or while training continues."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from promoe_ds.backends.parameter_groups import is_reordered
from promoe_ds.checkpoint.engine import RecordingStorage
from promoe_ds.checkpoint.manifest import (
    UNFINISHED,
    FileRecord,
    Layout,
    Manifest,
    list_checkpoints,
    read_wandb_id,
    step_folder,
    step_of,
)
from promoe_ds.checkpoint.training_state import TrainingState
from promoe_ds.config.schema import TrainConfig
from promoe_ds.errors import CheckpointError
from promoe_ds.files import replace_text
from promoe_ds.logs import get_logger
from promoe_ds.versions import versions_of

_LOG = get_logger("checkpoint")
#: Ends the name of a checkpoint that is being deleted.
_DELETED = ".deleted"


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
        self._pending: _Pending | None = None

    def save(self) -> None:
        """Save the trainer as it is now; all ranks call this together.  A save in flight is waited
        for.

        Order: shards into `step_N.tmp`, manifest, rename to `step_N`, `latest`, then old
            checkpoints beyond keep_last go.
        Raises: CheckpointError on every rank if any rank could not write; what was complete before
            stays so.
        """
        self.finish()
        self._pending = _begin(self._trainer, self._root)
        if not self._trainer.config.train.async_checkpoint:
            self.finish()

    def poll(self) -> None:
        """Complete the save in flight if every rank has written its share; all ranks call this
        together.

        Raises: as `save`.  Collectives: one while a save is in flight, more when it ends.
        """
        if self._pending is None:
            return
        busy = torch.tensor(
            float(self._pending.storage.is_writing), device=self._trainer.context.device
        )
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
        pending, self._pending = self._pending, None
        path = _complete(self._trainer, self._root, pending)
        _LOG.info("step %d: saved %s", pending.step, path)


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A save whose shards are being written."""

    storage: RecordingStorage
    step: int
    samples_seen: int
    failure: str | None

    @property
    def folder(self) -> str:
        return step_folder(self.step)


def _begin(trainer: TrainingState, root: Path) -> _Pending:
    """Hand every rank's share to the storage."""
    unfinished = root / f"{step_folder(trainer.step)}{UNFINISHED}"
    failure = trainer.context.from_main(_clear(unfinished) if trainer.context.is_main else None)
    if failure is None:
        trainer.engine.save_checkpoint(str(root), tag=unfinished.name, save_latest=False)
    return _Pending(
        storage=trainer.engine.checkpoint_engine,
        step=trainer.step,
        samples_seen=trainer.samples_seen,
        failure=failure,
    )


def _complete(trainer: TrainingState, root: Path, pending: _Pending) -> Path:
    """Wait for this rank's files, gather all ranks' records, make the shards a checkpoint."""
    unfinished, final = root / f"{pending.folder}{UNFINISHED}", root / pending.folder
    pending.storage.wait()
    records, failures = {}, [pending.failure] if pending.failure else []
    for rank, (files, problem) in enumerate(
        trainer.context.gather((pending.storage.records, pending.storage.failure))
    ):
        records.update(files)
        failures += [f"rank {rank}: {problem}"] if problem else []
    if not failures:
        failure = trainer.context.from_main(
            _finish(trainer, root, pending, records) if trainer.context.is_main else None
        )
        failures = [failure] if failure else []
    if failures:
        if trainer.context.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        sound = list_checkpoints(root)
        remains = (
            f"the newest complete checkpoint is {sound[0]}"
            if sound
            else "there is no complete checkpoint yet"
        )
        raise CheckpointError(
            f"step {pending.step}: the checkpoint could not be written: {'; '.join(failures)}. Free"
            f" or enlarge the disk, or take a --run-dir that all hosts share, and resume; {remains}"
        )
    return final


def _clear(folder: Path) -> str | None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    except OSError as error:
        return f"{folder}: {error}"
    return None


def _finish(
    trainer: TrainingState, root: Path, pending: _Pending, records: dict[str, FileRecord]
) -> str | None:
    """Make the written shards a checkpoint; rank 0 only. Return what went wrong."""
    unfinished, final = root / f"{pending.folder}{UNFINISHED}", root / pending.folder
    try:
        if problem := _find_unseen(unfinished, records):
            return f"rank 0: {problem}"
        manifest = Manifest(
            step=pending.step,
            samples_seen=pending.samples_seen,
            config=trainer.config.model_dump(mode="json"),
            layout=layout_of(trainer),
            files=records,
            versions=versions_of("deepspeed"),
            averages_since=dict(trainer.ema.averages_since),
            dataset_size=len(trainer.dataset),
            wandb_id=read_wandb_id(root.parent),
        )
        manifest.write(unfinished)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        replace_text(root / "latest", final.name)
        _prune(root, pending.step, trainer.config.train)
    except OSError as error:
        return f"rank 0: {error}"
    return None


def _find_unseen(folder: Path, records: dict[str, FileRecord]) -> str | None:
    """Say which file is not there as the rank that wrote it has it: on another host's disk, it is
    no part of this checkpoint.
    """
    for name, record in sorted(records.items()):
        path = folder / name
        if not path.is_file():
            return f"{path} was written by another rank and is not there"
        if path.stat().st_size != record.bytes:
            return (
                f"{path} has {path.stat().st_size} bytes, the rank that wrote it says"
                f" {record.bytes}"
            )
    return None


def _prune(root: Path, newest: int, train: TrainConfig) -> None:
    """Delete what is beyond `train.keep_last` of the checkpoints up to step `newest`, which was
    just written and stays.
    """
    for left in root.glob(f"*{_DELETED}"):
        shutil.rmtree(left, ignore_errors=True)
    written = [folder for folder in list_checkpoints(root) if step_of(folder) <= newest]
    for old in written[train.keep_last :]:
        if not train.keep_every or step_of(old) % train.keep_every:
            gone = old.with_name(
                f"{old.name}{_DELETED}"
            )  # first: half a deletion must not look like a checkpoint
            if not gone.exists():
                old.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
