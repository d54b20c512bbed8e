"""The launcher's end of an agent, with a plain process for ssh."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from promoe_ds.launch import remote
from promoe_ds.launch.agent import CONTENT, installed_software
from promoe_ds.launch.preflight import _check_software, _Hosts
from promoe_ds.launch.remote import Agent, RemoteError, connected, on_all, ssh_command, ssh_options

REPOSITORY = Path(__file__).parents[3]
DEEPSPEED = REPOSITORY / "ds_configs/zero2_fp32.json"
ROUTER = REPOSITORY / "examples/custom_router.py"
#: Greets, then answers a variable as its time; hangs when asked for a port.
AGENT = """
import os, time
import promoe_ds.launch.agent as agent
agent._ACTIONS["time"] = lambda: os.environ.get("SECRET")
agent._ACTIONS["port"] = lambda: time.sleep(60)
print("Welcome!\\n{}\\n[1]", flush=True)
agent.main()
"""


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """Let ssh run AGENT here; return the command lines that it was given."""
    seen: list[list[str]] = []

    def ssh_command(host: str, arguments: list[str]) -> list[str]:
        seen.append(arguments)
        python = ["/nowhere/python"] if host == "broken" else [sys.executable, "-c", AGENT]
        return [*arguments[: arguments.index(sys.executable)], *python]

    monkeypatch.setattr(remote, "ssh_command", ssh_command)
    return seen


def test_agent_environment_arrives_and_is_on_no_command_line(commands) -> None:
    secret = 'it\'s a "$HOME" `id` \\ 50% secret'
    with connected(["host"], {"SECRET": secret}) as agents:
        assert agents["host"].ask("time") == secret
        shown = subprocess.run(
            ["ps", "-A", "-ww", "-o", "args"], capture_output=True, text=True, check=True
        ).stdout
    assert "50% secret" not in shown + str(commands)


def test_agent_that_fails_is_reported_beside_one_that_does_not(commands) -> None:
    with connected(["broken", "host"], {}) as agents:
        for _ in range(2):
            answers, problems = on_all(agents, lambda agent: agent.ask("time"))
            assert "code 127: " in problems["broken"] and "/nowhere/python" in problems["broken"]
            assert answers == {"host": None}
        with pytest.raises(RemoteError, match="KeyError: 'nothing'"):
            agents["host"].ask("nothing")


def test_agent_that_is_late_is_given_up(commands) -> None:
    agent = Agent("host", {})
    agent.ask("time")
    for action in ("port", "time"):
        with pytest.raises(RemoteError, match="no answer within"):
            agent.ask(action, timeout=0.3)
    agent.close()
    assert agent._process.returncode == -9


def test_agent_reads_a_recipe_with_a_router_of_one_s_own(commands) -> None:
    files = {"recipe": "digits_promoe", "deepspeed_config": str(DEEPSPEED)}
    asked = {**files, "overrides": ["routing.method=nearest"], "timeout": 300.0}
    with connected(["host"], {}) as agents:
        with pytest.raises(RemoteError, match=r"ConfigError: .*routing\.method=nearest"):
            agents["host"].ask("config_hash", **asked, imports=[])
        assert agents["host"].ask("config_hash", **asked, imports=[str(ROUTER)])


def test_host_with_another_code_is_named_and_asked_nothing_more(commands) -> None:
    """What its agent answers may have another meaning."""
    here = installed_software()
    software = here | {CONTENT: "another", "torch": "1.0"}
    described = {
        name: {"hostname": name, "interfaces": {}, "software": values}
        for name, values in (("host", here), ("other", software))
    }
    with connected(["host", "other"], {}) as agents:
        hosts = _Hosts(agents)
        _check_software(hosts, described)
        assert list(hosts.agents) == ["host"]
    assert [problem.partition(" is ")[0] for problem in hosts.problems] == [
        "other: torch",
        f"other: {CONTENT}",
    ]


@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs ssh")
def test_ssh_shares_no_connection_whose_patience_is_another_s(tmp_path) -> None:
    """With a user's `ControlMaster auto` the ranks' would run over that of the agent."""
    config = tmp_path / "config"
    config.write_text("Host *\n  ControlMaster auto\n  ControlPath ~/%h\n  ControlPersist 600\n")
    command = ["ssh", "-F", str(config), "-G", *ssh_options(911), "host1"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"controlmaster false", "serveralivecountmax 183"} <= set(shown)


def test_ssh_holds_a_silent_connection_as_long_as_asked() -> None:
    assert "ServerAliveCountMax=3" in ssh_command("host1", ["true"])
    assert [ssh_options(seconds)[-1] for seconds in (0.1, 911)] == [
        "ServerAliveCountMax=1",
        "ServerAliveCountMax=183",
    ]
