"""Agents on other hosts, over ssh: never with a password, never waiting without end."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import Any, TypeVar

_T = TypeVar("_T")
_ANSWER_SECONDS = 40.0
#: ssh gives a host up after two attempts, about 20 s. The second is for a host that has just come
#: back: the kernel may still fail a first one by what it knew before ("No route"). No connection is
#: a master: the ranks' would otherwise share the agent's, and end after its few seconds of silence.
_CONNECT_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ControlMaster=no"),
    *("-o", "ConnectTimeout=10", "-o", "ConnectionAttempts=2"),
)
_ALIVE_SECONDS, _QUESTION_SECONDS = 5, 15.0
_MOST_AT_ONCE = 64
#: `read` takes one line and leaves the rest, the requests, to the agent.
_WITH_EXPORTS = 'cd "$1" && IFS= read -r exports && eval "$exports" && shift && exec "$@"'


class RemoteError(Exception):
    """What went wrong on a host, in one line."""


def ssh_options(patience: float) -> list[str]:
    """Return ssh's options: never ask, hold a silent connection for `patience` seconds."""
    interval = f"ServerAliveInterval={_ALIVE_SECONDS}"
    count = f"ServerAliveCountMax={math.ceil(patience / _ALIVE_SECONDS)}"
    return [*_CONNECT_OPTIONS, "-o", interval, "-o", count]


def ssh_command(host: str, arguments: Sequence[str]) -> list[str]:
    """Return the command that runs `arguments` on `host`, each quoted for the shell there."""
    return ["ssh", *ssh_options(_QUESTION_SECONDS), host, shlex.join(arguments)]


class Agent:
    """The launcher's end of an agent (agent.py) on one host; it answers one request at a time."""

    def __init__(self, host: str, environment: Mapping[str, str]) -> None:
        """Start the agent in this folder, with this interpreter and environment; do not wait.

        The environment goes through standard input: every user of a host can read command lines.
        """
        self.host, self._lost = host, ""
        exports = " ".join(
            f"export {name}={shlex.quote(value)};" for name, value in environment.items()
        )
        python = [sys.executable, "-m", "promoe_ds.launch.agent"]
        command = ssh_command(host, ["sh", "-c", _WITH_EXPORTS, "promoe", str(Path.cwd()), *python])
        pipe = subprocess.PIPE  # in a session of its own: Ctrl-C here is for the launcher alone
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        self._send(exports)

    def ask(self, action: str, *, timeout: float = _ANSWER_SECONDS, **values: Any) -> Any:
        """Send a request, return its answer; after a time-out the agent is ended.

        Raises: RemoteError if the agent is gone, does not answer in time or reports a failure.
        """
        expired = Timer(timeout, self._expire, [timeout])
        expired.start()
        try:
            self._send(json.dumps({"action": action, **values}))
            answer = self._receive()
        finally:
            expired.cancel()
        if answer is None:
            self._lost = self._lost or self._why_gone()
            raise RemoteError(self._lost)
        if "failed" in answer:
            raise RemoteError(answer["failed"])
        return answer["answer"]

    def close(self) -> None:
        """End the agent and its connection."""
        with suppress(OSError), self._process:  # which closes its pipes, and so ends the agent
            self._process.kill()

    def _send(self, line: str) -> None:
        with suppress(OSError):  # it is gone: reading its answer finds out why
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any] | None:
        for line in self._process.stdout:  # a login script may print a greeting first
            with suppress(ValueError):
                answer = json.loads(line)
                if isinstance(answer, dict) and answer.keys() & {"answer", "failed"}:
                    return answer
        return None

    def _expire(self, seconds: float) -> None:
        self._lost = f"no answer within {seconds:g} s"
        self._process.kill()

    def _why_gone(self) -> str:
        errors = [line.strip() for line in self._process.stderr if line.strip()]
        code, last = self._process.wait(10), errors[-1] if errors else ""
        if code == 255:
            return f"ssh failed: {last or 'connection lost'}"
        return f"the agent ended with code {code}: {last}"


@contextmanager
def connected(hosts: Sequence[str], environment: Mapping[str, str]) -> Iterator[dict[str, Agent]]:
    """Give an agent on each host, started at once and ended at the end."""
    with ExitStack() as stack:
        agents = {}
        for host in hosts:
            agents[host] = Agent(host, environment)
            stack.callback(agents[host].close)
        yield agents


def on_all(
    agents: Mapping[str, Agent], action: Callable[[Agent], _T]
) -> tuple[dict[str, _T], dict[str, str]]:
    """Do something with all agents at once; return the results, and the problems of other hosts."""
    results, problems = {}, {}
    with ThreadPoolExecutor(max_workers=min(_MOST_AT_ONCE, max(1, len(agents)))) as pool:
        futures = {host: pool.submit(action, agent) for host, agent in agents.items()}
        for host, future in futures.items():
            try:
                results[host] = future.result()
            except RemoteError as error:
                problems[host] = str(error)
    return results, problems
