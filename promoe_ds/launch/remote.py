"""Commands on other hosts, by ssh, never with a password and never waiting for ever."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")
#: A host that does not answer is given up after two attempts, about 20 s. The second is for a host that has just come back: the
#: kernel may still fail a first one by what it found out before ("No route").
_CONNECT_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ConnectionAttempts=2")
_ALIVE_SECONDS, _QUESTION_SECONDS = 5, 15.0
_MOST_AT_ONCE = 64


class RemoteError(Exception):
    """A command that could not be run on a host, or failed there: one line."""


def ssh_options(patience: float) -> list[str]:
    """Return ssh's options: no question, and how long it holds on to a connection over which nothing comes any more.

    Args:
        patience: at least so many seconds.
    """
    return [*_CONNECT_OPTIONS, "-o", f"ServerAliveInterval={_ALIVE_SECONDS}", "-o",
            f"ServerAliveCountMax={math.ceil(patience / _ALIVE_SECONDS)}"]


def ssh_command(host: str, arguments: Sequence[str]) -> list[str]:
    """Return the command that runs `arguments` on `host`, each quoted for the shell there."""
    return ["ssh", *ssh_options(_QUESTION_SECONDS), host, shlex.join(arguments)]


def python_module(module: str, *arguments: str) -> list[str]:
    """Return the command of a module of this package on a host: same folder, same interpreter as here."""
    # env -C would need new coreutils: a shell changes the folder.
    script = f"cd {shlex.quote(str(Path.cwd()))} && exec \"$@\""
    return ["sh", "-c", script, "promoe", sys.executable, "-m", module, *arguments]


def ask(host: str, module: str, request: dict[str, Any], *, timeout: float) -> dict[str, Any]:
    """Run a module on a host with a JSON object on its standard input; return the one that it answers.

    Raises: RemoteError with what went wrong, in one line.
    """
    try:
        done = subprocess.run(ssh_command(host, python_module(module)), input=json.dumps(request), capture_output=True, text=True,
                              timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RemoteError(f"no answer within {timeout:g} s") from None
    except FileNotFoundError:
        raise RemoteError("ssh failed: this host has no ssh client, install the package openssh-client") from None
    if done.returncode == 255:
        raise RemoteError(f"ssh failed: {last_line(done.stderr) or 'connection lost'}")
    if done.returncode != 0:
        raise RemoteError(f"{sys.executable} -m {module} ended with code {done.returncode}: {last_line(done.stderr)}")
    try:
        # A login script may print a greeting first.
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise RemoteError(f"{module} answered {done.stdout[-200:]!r}") from None


def on_all(hosts: Sequence[str], action: Callable[[str], _T]) -> dict[str, _T | RemoteError]:
    """Run an action for every host at once; return what it gave or how it failed."""
    def attempt(host: str) -> _T | RemoteError:
        try:
            return action(host)
        except RemoteError as error:
            return error

    with ThreadPoolExecutor(max_workers=min(_MOST_AT_ONCE, len(hosts))) as pool:
        return dict(zip(hosts, pool.map(attempt, hosts), strict=True))


def last_line(text: str) -> str:
    """Return the last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
