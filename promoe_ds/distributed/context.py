"""The processes of a job, and what they say to each other."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from promoe_ds.distributed.process_group import (
    check_device,
    complete_environment,
    join_process_group,
    local_device,
)
from promoe_ds.errors import CheckpointError, ConfigError, PromoeError

_T = TypeVar("_T")
_Key = TypeVar("_Key", str, int)
#: Of barriers after work of one's own: a rank's share may take hours longer than another's.
_PATIENCE = timedelta(days=30)


class DistributedContext:
    """This process among those of a job, or alone: every collective is a no-op then.

    Each method but `is_main` is one collective, which all ranks call together.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        waiting_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Be one of the ranks of a process group that exists, if there are several.

        Args:
            waiting_group: of all ranks, for all but sums; None: the same as for these.
        """
        self.rank, self.world_size, self.device = rank, world_size, device
        self._waiting = waiting_group

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def gather(self, value: _T) -> list[_T]:
        """Return every rank's small picklable value, by rank: for rare events, not for tensors.

        Waits as a barrier does.
        """
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self._waiting)
        return values

    def from_main(self, value: _T) -> _T:
        """Return rank 0's value on every rank.  Waits as a barrier does."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self._waiting)
        return box[0]

    def barrier(self) -> None:
        """Wait for all, however much longer the others work than this one."""
        if self.world_size > 1:
            dist.barrier(group=self._waiting)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of the ranks' float64 arrays of one shape."""
        if self.world_size == 1:
            return values
        # Training on GPUs has nccl alone, which moves what is there.
        device = self.device if dist.get_backend() == "nccl" else torch.device("cpu")
        total = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(device)
        dist.all_reduce(total)
        return total.cpu().numpy()

    def on_main(self, action: Callable[[], _T], *, flag: str = "") -> _T:
        """Run something on rank 0 alone; return its small picklable result on every rank.

        Raises: on every rank, what it raised there, its message after `flag`: a PromoeError, or
        CheckpointError for an OSError.
        """
        outcome: Any = None
        if self.is_main:
            try:
                outcome = action()
            except PromoeError as error:
                outcome = type(error)(f"{flag}{error}")
            except OSError as error:
                outcome = CheckpointError(f"{flag}{error}")
        outcome = self.from_main(outcome)
        if isinstance(outcome, PromoeError):
            raise outcome
        return outcome

    def main_first(self, action: Callable[[], _T]) -> _T:
        """Run something on rank 0 and then on the others, which find the files that it has fetched;
        return each rank's own result. The others wait as at a barrier.

        Raises: what the action raises.
        """
        if not self.is_main:
            self.barrier()
        try:
            return action()
        finally:
            if self.is_main:
                self.barrier()

    def on_all_ranks(self, action: Callable[[], None]) -> None:
        """Run something that may fail on one rank alone, so that it fails on all.

        Raises: CheckpointError with every rank's message.
        """
        problem = ""
        try:
            action()
        except CheckpointError as error:
            problem = str(error)
        if problems := [one for one in self.gather(problem) if one]:
            raise CheckpointError("; ".join(dict.fromkeys(problems)))


def sum_over_ranks(parts: dict[_Key, Tensor]) -> dict[_Key, Tensor]:
    """Return the sum of all ranks' tensors of each name; they have one dtype.  Collectives: one."""
    flat = torch.cat([part.flatten() for part in parts.values()])
    dist.all_reduce(flat)
    pieces = flat.split([part.numel() for part in parts.values()])
    return {name: piece.view_as(parts[name]) for name, piece in zip(parts, pieces, strict=True)}


def single_process(device: torch.device | str = "cpu") -> DistributedContext:
    """Return the context of a process that is alone."""
    return DistributedContext(rank=0, world_size=1, device=torch.device(device))


def join_processes(
    device: str | None = None, *, timeout_seconds: float = 1800.0
) -> DistributedContext:
    """Join the job that the launcher started: gloo for what is in memory, nccl for what is on
    GPUs.

    Args:
        device: of this process; if left out, or just "cuda", its own GPU where there are any, else
        the CPU.
        timeout_seconds: of sums; every other collective waits for as long as a rank's share of the
        work takes.
    Raises: ConfigError if the launcher's variables do not fit, there is no such device, or rank 0
        cannot listen on MASTER_ADDR and MASTER_PORT.
    """
    if device is not None:
        check_device(device)
    world_size = complete_environment()
    own = local_device() if device in (None, "cuda") else torch.device(device)
    if device == "cuda" and own.type == "cpu":
        raise ConfigError("--device cuda: DS_ACCELERATOR is set to something else: unset it")
    if world_size == 1:
        return single_process(own)
    join_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", timeout_seconds)
    # A rank that dies ends the waiting all the same: its connections break.
    waiting_group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return DistributedContext(
        rank=dist.get_rank(), world_size=world_size, device=own, waiting_group=waiting_group
    )
