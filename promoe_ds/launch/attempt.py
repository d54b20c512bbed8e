"""One attempt at a job: start `deepspeed --hostfile`, watch it, end it, leave no rank behind."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from promoe_ds.launch.environment import (
    deepspeed_command,
    runner_environment,
    shell_arguments,
    write_environment,
)
from promoe_ds.launch.heartbeat import (
    ATTEMPT_VARIABLE,
    RankStatus,
    read_rank_statuses,
    renew_heartbeat,
)
from promoe_ds.launch.hostfile import Host, write_hostfile
from promoe_ds.launch.processes import kill_processes_with
from promoe_ds.launch.remote import connected, on_all, ssh_options
from promoe_ds.launch.shutdown import ShutdownRequest
from promoe_ds.logs import get_logger

_LOG = get_logger("launch")
_POLL_SECONDS = 0.5
_KILL_SECONDS = 60.0
#: Names the file with the ranks' environment, for DeepSpeed's runner; its child processes inherit
#: it.
_ENVIRONMENT_VARIABLE, _ENVIRONMENT = "DS_ENV_FILE", "environment"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What to start, where, and how long to wait.

    `heartbeat_seconds`: after them ranks consider the launcher gone. `link_seconds`: a link may be
    down so long. `failure_seconds`, `shutdown_seconds`: ranks may take so long to end after the
    first of them failed, and after a shutdown request.
    """

    folder: Path
    hosts: tuple[Host, ...]
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    master_address: str
    master_port: int
    heartbeat_seconds: float
    link_seconds: float
    failure_seconds: float
    shutdown_seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended: the runner's code, the ranks' statuses, why hosts do not answer."""

    code: int
    statuses: Sequence[RankStatus]
    unreachable: Mapping[str, str]


def run_attempt(attempt: Attempt, shutdown: ShutdownRequest) -> Outcome:
    """Start the ranks, renew their heartbeat until the runner ends, kill every rank that is left.

    On a shutdown request ranks finish their step, save and end.
    """
    attempt.folder.mkdir(parents=True, mode=0o700)
    write_hostfile(attempt.folder / "hostfile", attempt.hosts)
    rank_environment = {**attempt.environment, ATTEMPT_VARIABLE: str(attempt.folder)}
    write_environment(attempt.folder / _ENVIRONMENT, rank_environment)
    renew_heartbeat(attempt.folder, 0)
    command = _command(attempt)
    _LOG.info("starting %s", shlex.join(command))
    # In a session of its own: a signal to our process group would make the runner kill ranks that
    # save.
    runner = subprocess.Popen(command, env=_environment(attempt), start_new_session=True)
    try:
        _watch(runner, attempt, shutdown)
    finally:
        # A runner that is killed leaves pdsh and its ssh connections behind.
        kill_processes_with(_ENVIRONMENT_VARIABLE, str(attempt.folder / _ENVIRONMENT))
        runner.wait()
    names = [host.name for host in attempt.hosts]
    unreachable = kill_leftovers_on(names, attempt.folder, attempt.heartbeat_seconds)
    statuses = read_rank_statuses(attempt.folder)
    return Outcome(code=runner.returncode, statuses=statuses, unreachable=unreachable)


def _watch(runner: subprocess.Popen, attempt: Attempt, shutdown: ShutdownRequest) -> None:
    """Return when the runner ended, or had its time to after a request or a rank's failure."""
    count, renewed, deadline, reason = 0, time.monotonic(), float("inf"), ""
    while runner.poll() is None and time.monotonic() < deadline and not shutdown.at_once:
        time.sleep(_POLL_SECONDS)
        due = time.monotonic() - renewed > attempt.heartbeat_seconds / 10
        ending, patience = "", attempt.shutdown_seconds
        if not reason and (reason := shutdown.reason):
            ending = f"shutdown requested ({reason})"
        elif due and deadline == float("inf") and (failed := _first_failed(attempt)):
            ending, patience = failed, attempt.failure_seconds
        if ending:
            _LOG.info("%s: waiting up to %.0f s for all ranks to end", ending, patience)
            deadline = time.monotonic() + patience
        if ending or due:
            count, renewed = count + 1, time.monotonic()
            with suppress(OSError):  # ranks wait for the next one, which may succeed
                renew_heartbeat(attempt.folder, count, reason)
    if runner.poll() is None:
        _LOG.error("not all ranks ended: breaking their connections, which ends the rest")


def _first_failed(attempt: Attempt) -> str:
    for status in read_rank_statuses(attempt.folder):
        if status.code:
            return f"rank {status.rank} on {status.host} ended with code {status.code}"
    return ""


def _command(attempt: Attempt) -> list[str]:
    options = {
        "--hostfile": attempt.folder / "hostfile",
        "--launcher": "pdsh",
        "--master_addr": attempt.master_address,
        "--master_port": attempt.master_port,
        "--log_level": "warning",
        "--module": "promoe_ds.cli.train",
    }
    # Hosts have just answered; DeepSpeed's own check knows neither our options nor a time-out.
    switches = ("--force_multi", "--no_ssh_check")
    launcher = [deepspeed_command(), *switches, *chain.from_iterable(options.items())]
    return [*map(str, launcher), *shell_arguments(attempt.arguments)]


def _environment(attempt: Attempt) -> dict[str, str]:
    environment = runner_environment(os.environ)
    environment[_ENVIRONMENT_VARIABLE] = str(attempt.folder / _ENVIRONMENT)
    # These connections must outlast a broken link as long as the ranks do, and the runner must not
    # outlast the ranks by much.
    arguments = [environment.get("PDSH_SSH_ARGS_APPEND", ""), *ssh_options(attempt.link_seconds)]
    environment["PDSH_SSH_ARGS_APPEND"] = " ".join(arguments).strip()
    if accelerator := attempt.environment.get("DS_ACCELERATOR"):
        environment["DS_ACCELERATOR"] = accelerator
    return environment


def kill_leftovers_on(hosts: Sequence[str], folder: Path, patience: float) -> dict[str, str]:
    """Wait up to `patience` seconds for an attempt's ranks on some hosts to end, kill the rest.

    Returns: the hosts that did not answer, and why.
    """
    with connected(hosts, {}) as agents:
        answers, unreachable = on_all(
            agents,
            lambda agent: agent.ask(
                "kill_leftovers",
                timeout=patience + _KILL_SECONDS,
                folder=str(folder),
                patience=patience,
            ),
        )
    for host, why in unreachable.items():
        _LOG.error("%s: %s; its ranks end within supervision.launcher_timeout_seconds", host, why)
    for host, killed in answers.items():
        if killed:
            _LOG.warning("%s: killed what was left of the job: processes %s", host, killed)
    return unreachable
