"""Finding out that nobody watches this process any more, from the processes above it.

A rank started by DeepSpeed hangs from a chain: `deepspeed.launcher.launch`, above it the runner (one host) or, through a shell,
an ssh server's session (several hosts). Whatever link dies, the rest would train on unseen.
"""

from __future__ import annotations

import os
from pathlib import Path

_LAUNCHERS = ("deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "torch.distributed.launch", "torch/distributed/run")
_SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "ash"}


def launcher_chain() -> tuple[int, ...]:
    """Return the process ids above this one whose end orphans it: none where no known launcher is its parent.

    A plain `python -m` may outlive the shell that started it, and so may a launcher started under nohup: their parents do not
    count. `deepspeed.launcher.launch` never stands alone: what started it counts, a shell between them skipped.
    """
    parent = os.getppid()
    command = _command(parent)
    if not _is_launcher(command):
        return ()
    chain = [parent]
    if any("deepspeed.launcher.launch" in part for part in command):
        above = _parent(parent)
        chain.append(above)
        if _is_shell_with_command(_command(above)):
            chain.append(_parent(above))
    return tuple(chain)


def lost_deepspeed() -> bool:
    """Whether DeepSpeed's launcher started this process, by its variables, and no process above it is one any more."""
    if not {"CROSS_RANK", "CROSS_SIZE", "LOCAL_RANK", "RANK"} <= os.environ.keys():
        return False
    pid = os.getppid()
    while pid > 0:
        if _is_launcher(_command(pid)):
            return False
        pid = _parent(pid)
    return True


def broken_link(chain: tuple[int, ...]) -> str:
    """Return which link of a chain is gone, "" while it holds."""
    child = os.getpid()
    for pid in chain:
        if _parent(child) != pid:
            return f"process {pid}, which had started this rank's launcher," if child != os.getpid() else f"launcher process {pid}"
        child = pid
    return ""


def _parent(pid: int) -> int:
    """Return the parent of a process, 0 where there is no such process."""
    try:
        # The command name, in parentheses, may hold anything.
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _is_launcher(command: list[str]) -> bool:
    return any(name in part for part in command for name in _LAUNCHERS)


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []


def _is_shell_with_command(command: list[str]) -> bool:
    return len(command) > 1 and Path(command[0]).name.lstrip("-") in _SHELLS and command[1].startswith("-") and "c" in command[1]
