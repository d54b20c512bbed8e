"""Many processes at one task without a training engine: sampling, encoding, judging. Needs no deepspeed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from promoe_ds.distributed.context import Ranks, complete_environment, from_main, gather_objects, local_device
from promoe_ds.errors import ConfigError, PromoeError

_T = TypeVar("_T")
#: Of barriers after work of one's own: a rank's share may take hours longer than another's.
_PATIENCE = timedelta(days=30)


def check_device(name: str | None) -> str:
    """Return the device of that name; a GPU where there is one, else the CPU, for None.

    Raises: ConfigError if there is no such device, or it cannot compute.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        return name  # which of them is not known yet: nothing is taken of the first one's memory
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if torch.device(name).type == "meta":
        raise ConfigError(f"--device {name}: computes nothing: name cpu, or cuda for this process's GPU")
    return name


class Team:
    """The processes of a job, or this one alone; every collective is a no-op then."""

    def __init__(self, ranks: Ranks) -> None:
        """Stand for the ranks of a process group that exists, if there are several."""
        self.rank, self.world_size, self.device = ranks.rank, ranks.world_size, ranks.device
        self.is_main = ranks.is_main
        self._waiting: dist.ProcessGroup | None = None

    def gather(self, value: _T) -> list[_T]:
        """Return every rank's small picklable value, by rank."""
        return [value] if self.world_size == 1 else gather_objects(value)

    def from_main(self, value: _T) -> _T:
        """Return rank 0's value on every rank."""
        return value if self.world_size == 1 else from_main(value)

    def barrier(self) -> None:
        """Wait for all, however much longer the others work than this one."""
        if self.world_size > 1:
            dist.barrier(group=self._waiting)

    def wait_patiently(self) -> None:
        """Let barriers outlast the time-out of other collectives; all ranks call this together.

        A rank that dies ends them all the same: its connections break, and the launcher ends the others.
        """
        self._waiting = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of the ranks' float64 arrays of one shape."""
        if self.world_size == 1:
            return values
        # Training on GPUs has nccl alone, which moves what lies there.
        device = self.device if dist.get_backend() == "nccl" else torch.device("cpu")
        total = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(device)
        dist.all_reduce(total)
        return total.cpu().numpy()

    def on_main(self, action: Callable[[], _T]) -> _T:
        """Run something on rank 0 and return its result on every rank.

        Raises: the PromoeError that it raised there, on every rank.
        """
        outcome: Any = None
        if self.is_main:
            try:
                outcome = action()
            except PromoeError as error:
                outcome = error
        outcome = self.from_main(outcome)
        if isinstance(outcome, PromoeError):
            raise outcome
        return outcome


def alone(device: torch.device | str = "cpu") -> Team:
    """Return the team of this process."""
    return Team(Ranks(rank=0, world_size=1, device=torch.device(device)))


def join_team(device: str | None = None, *, timeout_seconds: float = 1800.0) -> Team:
    """Join the job that the launcher started: gloo for what lies in memory, nccl for what lies on GPUs.

    Args:
        device: of this process; if left out, or just "cuda", its own GPU where there are any, else the CPU.
        timeout_seconds: of every collective but barriers, which wait for as long as a rank's share of the work takes.
    Raises: ConfigError if the launcher's variables do not fit, or there is no such device.
    """
    if device is not None:
        check_device(device)
    world_size = complete_environment()
    if device in (None, "cuda"):
        own = local_device()
        if device == "cuda" and own.type == "cpu":
            raise ConfigError("--device cuda: DS_ACCELERATOR is set to something else: unset it")
    else:
        own = torch.device(device)
    if world_size == 1:
        return alone(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_seconds))
    team = Team(Ranks(rank=dist.get_rank(), world_size=world_size, device=own))
    team.wait_patiently()
    return team
