"""Processes to measure in: this one as a group of its own, a fresh one, a group of several."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.multiprocessing as mp

from promoe_ds.backends.deepspeed_private import forget_expert_groups
from promoe_ds.backends.process_group import start_distributed
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.distributed.process_group import complete_environment, stop_distributed
from promoe_ds.errors import TrainingError

_T = TypeVar("_T")
_TIMEOUT_SECONDS = 300.0


@contextmanager
def single_process() -> Iterator[torch.device]:
    """Be a process group of one, as the engines want it; gives the device. May be entered again."""
    with patch.dict(os.environ):
        complete_environment()
        ranks = start_distributed(_TIMEOUT_SECONDS)
        try:
            yield ranks.device
        finally:
            stop_distributed()
            forget_expert_groups()


def process_memory(name: str) -> int:
    """Return `VmRSS` or `VmHWM` of this process in bytes.

    Not getrusage: its maximum is inherited from the process that started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def in_fresh_process(work: Callable[..., _T], *arguments: Any) -> _T:
    """Return work(*arguments) of a new process."""
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def on_ranks(
    ranks: int,
    work: Callable[..., _T],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
) -> list[_T]:
    """Return work(DistributedContext, *arguments) of every rank of a new process group of one
    thread each.

    Raises: TrainingError with the traceback of a rank that failed.
    """
    results = mp.get_context("spawn").SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(server.getsockname()[1]),
        }
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1", **place, **(environment or {})}):
        try:
            mp.spawn(_rank, (work, arguments, results), nprocs=ranks)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise TrainingError(
                f"{work.__name__} on {ranks} processes failed:\n{str(error)[-2000:]}"
            ) from None
    return [
        value
        for _, value in sorted((results.get() for _ in range(ranks)), key=lambda result: result[0])
    ]


def _rank(rank: int, work: Callable[..., Any], arguments: tuple, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    ranks: DistributedContext = start_distributed(_TIMEOUT_SECONDS)
    results.put((rank, work(ranks, *arguments)))
    stop_distributed()
