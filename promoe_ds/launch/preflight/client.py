"""The launcher's end of an agent's connection."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shlex
import subprocess
import time
from types import TracebackType
from typing import Any

from promoe_ds.launch.remote import RemoteError, last_line, python_module, ssh_command

_GREETING_SECONDS = 40.0
#: `read` takes one line and leaves the rest, the requests, to the agent.
_WITH_EXPORTS = 'IFS= read -r exports && eval "$exports" && exec "$@"'


class Agent:
    """An agent on one host; requests are answered one after the other."""

    def __init__(self, host: str, environment: dict[str, str]) -> None:
        """Start the agent on `host` with the ranks' environment; nothing is waited for.

        The environment goes through standard input: a command line is there for all users of either host to read.
        """
        self.host, self._number, self._unread = host, 0, b""
        exports = shlex.join(["export", *(f"{name}={value}" for name, value in environment.items())])
        command = ssh_command(host, ["sh", "-c", _WITH_EXPORTS, "promoe", *python_module("promoe_ds.launch.preflight.agent")])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with contextlib.suppress(OSError):  # gone already: the first question finds out why
            self._send(f"{exports}\n".encode())

    def ask(self, action: str, *, timeout: float = _GREETING_SECONDS, **values: Any) -> dict[str, Any]:
        """Send a request; return its answer.

        Raises: RemoteError if the agent is gone, does not answer in time or reports a failure.
        """
        self._number += 1
        try:
            self._send(json.dumps({"do": action, "id": self._number, **values}).encode() + b"\n")
        except OSError:
            raise RemoteError(self._why_gone()) from None
        answer: Any = None
        deadline = time.monotonic() + timeout
        # A login script's greeting is no answer, nor is one to a question that had been given up.
        while not isinstance(answer, dict) or answer.get("id") != self._number:
            line = self._read_line(deadline)
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
        if "failed" in answer:
            raise RemoteError(answer["failed"])
        return answer

    def close(self) -> None:
        """End the agent, and the connection with it."""
        assert self._process.stdin is not None
        if self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(3)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def _read_line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        # Not through the stream's own buffer: what lies there already would never make it readable again.
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise RemoteError("no answer in time")
                if not (block := os.read(descriptor, 1 << 16)):
                    raise RemoteError(self._why_gone())
                self._unread += block
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _why_gone(self) -> str:
        assert self._process.stderr is not None
        code = self._process.wait(10)
        said = last_line(self._process.stderr.read().decode(errors="replace"))
        return f"ssh failed: {said or 'connection lost'}" if code == 255 else f"the agent ended with code {code}: {said}"
