"""Processes of a host: those above a rank, whose death it watches, and an attempt's leftovers.

DeepSpeed starts a rank below `deepspeed.launcher.launch`, which is below the runner (one host) or,
through a shell, below an ssh server's session (several hosts). When one of them dies, the rest
would train unwatched.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

from promoe_ds.launch.heartbeat import ATTEMPT_VARIABLE

_DEEPSPEED = "deepspeed.launcher.launch"
_TORCHRUN = (
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "torch/distributed/run",
)
_SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "ash"}


def launcher_chain() -> tuple[int, ...]:
    """Return the ids of the processes above this one whose end orphans it; none without a launcher.

    A plain `python -m` may outlive the shell that started it, and so may a launcher under nohup:
    their parents do not count. What started `deepspeed.launcher.launch` counts; a shell between
    them is skipped.
    """
    parents = psutil.Process().parents()
    command = _command(parents[0]) if parents else []
    if not _names(command, _DEEPSPEED, *_TORCHRUN):
        return ()
    length = 1
    if _names(command, _DEEPSPEED):
        length = 3 if len(parents) > 1 and _is_shell_with_command(_command(parents[1])) else 2
    return tuple(parent.pid for parent in parents[:length])


def lost_deepspeed() -> bool:
    """Return whether DeepSpeed's launcher started this process, by its variables, and is gone."""
    if not {"CROSS_RANK", "CROSS_SIZE", "LOCAL_RANK", "RANK"} <= os.environ.keys():
        return False
    return not any(
        _names(_command(parent), _DEEPSPEED, *_TORCHRUN) for parent in psutil.Process().parents()
    )


def broken_link(chain: tuple[int, ...]) -> str:
    """Return which process of a chain is gone, "" if all are there."""
    child = os.getpid()
    for pid in chain:
        if _parent(child) != pid:
            if child == os.getpid():
                return f"launcher process {pid}"
            return f"process {pid}, which started this rank's launcher,"
        child = pid
    return ""


def processes_with(variable: str, value: str) -> list[psutil.Process]:
    """Return the processes that were started with a variable of that value, this one left out."""
    return [
        process
        for process in psutil.process_iter(["environ"])  # None for another user's
        if process.pid != os.getpid() and (process.info["environ"] or {}).get(variable) == value
    ]


def kill_processes_with(variable: str, value: str) -> list[int]:
    """Kill the processes that were started with a variable of that value; return their ids."""
    left = processes_with(variable, value)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return [process.pid for process in left]


def kill_leftover_processes(folder: str, patience: float) -> list[int]:
    """Wait up to `patience` seconds for an attempt's processes to end; kill and return the rest.

    A rank is known by the attempt's folder in its environment, which no other job shares.
    """
    deadline = time.monotonic() + patience
    while processes_with(ATTEMPT_VARIABLE, folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    return kill_processes_with(ATTEMPT_VARIABLE, folder)


def _parent(pid: int) -> int:
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return 0


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _names(command: list[str], *names: str) -> bool:
    return any(name in part for part in command for name in names)


def _is_shell_with_command(command: list[str]) -> bool:
    shell, option = [*command, "", ""][:2]
    return Path(shell).name.lstrip("-") in _SHELLS and option.startswith("-") and "c" in option
