"""The launcher's end of an agent's connection."""

from __future__ import annotations

import json
import selectors
import subprocess
import time
from types import TracebackType
from typing import Any

from promoe_ds.launch.remote import RemoteError, last_line, python_module, ssh_command

_GREETING_SECONDS = 40.0


class Agent:
    """An agent on one host; requests are answered one after the other."""

    def __init__(self, host: str, environment: dict[str, str]) -> None:
        """Start the agent on `host` with the ranks' environment; nothing is waited for."""
        self.host = host
        exports = [f"{name}={value}" for name, value in environment.items()]
        command = ssh_command(host, ["env", *exports, *python_module("promoe_ds.launch.preflight.agent")])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def ask(self, action: str, *, timeout: float = _GREETING_SECONDS, **values: Any) -> dict[str, Any]:
        """Send a request; return its answer.

        Raises: RemoteError if the agent is gone, does not answer in time or reports a failure.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": action, **values}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise RemoteError(self._why_gone()) from None
        while True:
            line = self._read_line(time.monotonic() + timeout)
            try:
                answer = json.loads(line)
            except ValueError:
                continue  # a login script's greeting
            if isinstance(answer, dict):
                break
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

    def _read_line(self, deadline: float) -> bytes:
        stream = self._process.stdout
        assert stream is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise RemoteError("no answer in time")
        # The agent writes whole lines at once.
        line = stream.readline()
        if not line:
            raise RemoteError(self._why_gone())
        return line

    def _why_gone(self) -> str:
        assert self._process.stderr is not None
        code = self._process.wait(10)
        said = last_line(self._process.stderr.read().decode(errors="replace"))
        return f"ssh failed: {said or 'connection lost'}" if code == 255 else f"the agent ended with code {code}: {said}"
