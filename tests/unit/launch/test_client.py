"""The launcher's end of an agent, whose ssh is a plain process here."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from promoe_ds.launch.preflight import client
from promoe_ds.launch.preflight.client import Agent
from promoe_ds.launch.remote import RemoteError

#: An agent that greets, takes a second to find its run directory, and tells a variable.
AGENT = """
import os, time
import promoe_ds.launch.preflight.agent as agent
agent.run_directory = lambda request: time.sleep(1) or {"seen": True}
agent.time_now = lambda request: {"time": os.environ.get("SECRET", "none")}
print("Welcome!\\n{}", flush=True)
agent.main()
"""


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """Let ssh be a shell here that runs AGENT; return the command lines that it was given."""
    seen: list[list[str]] = []

    def ssh_command(host: str, arguments: list[str]) -> list[str]:
        seen.append(arguments)
        return ["sh", "-c", shlex.join(arguments)]

    monkeypatch.setattr(client, "ssh_command", ssh_command)
    monkeypatch.setattr(client, "python_module", lambda module: [sys.executable, "-c", AGENT])
    return seen


def test_agent_answer_that_comes_late_is_not_taken_for_the_next(commands) -> None:
    with Agent("host", {}) as agent:
        agent.ask("time")
        with pytest.raises(RemoteError, match="no answer in time"):
            agent.ask("run_directory", timeout=0.3)
        assert set(agent.ask("port", address="127.0.0.1", port=0)) == {"problem", "id"}


def test_agent_environment_arrives_and_is_on_no_command_line(commands) -> None:
    secret = "it's a \"$HOME\" `id` \\ 50% secret"
    with Agent("host", {"SECRET": secret}) as agent:
        assert agent.ask("time")["time"] == secret
        shown = subprocess.run(["ps", "-A", "-ww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert "50% secret" not in shown + str(commands)


def test_agent_that_cannot_begin_says_why(commands, monkeypatch) -> None:
    monkeypatch.setattr(client, "python_module", lambda module: [str(Path("/nowhere/python"))])
    with Agent("host", {}) as agent, pytest.raises(RemoteError, match=r"the agent ended with code 127: .*/nowhere/python"):
        agent.ask("time")
