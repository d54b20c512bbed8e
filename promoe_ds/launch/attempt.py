"""One attempt at a job: `deepspeed --hostfile` started, watched, ended, swept up."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from promoe_ds.launch.environment import deepspeed_command, runner_environment, shell_arguments, write_environment
from promoe_ds.launch.heartbeat import ATTEMPT_VARIABLE, Note, read_notes, renew_lease
from promoe_ds.launch.hostfile import Host, write_hostfile
from promoe_ds.launch.leftovers import processes_with
from promoe_ds.launch.remote import RemoteError, ask, on_all, ssh_options
from promoe_ds.launch.shutdown import StopWish
from promoe_ds.logs import get_logger

_LOG = get_logger("launch")
_POLL_SECONDS = 0.5
_SWEEP_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec, beside other threads, nothing may be
#: Tells DeepSpeed's runner which file holds the ranks' environment; its child processes inherit it.
_ENVIRONMENT_VARIABLE, _ENVIRONMENT = "DS_ENV_FILE", "environment"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What is started where.

    `lease_seconds`: after which ranks count the launcher as gone; `link_seconds`: that a link may be down; `failure_seconds`,
    `stop_seconds`: that ranks get to end after the first one failed, and after a wish to stop.
    """

    folder: Path
    hosts: tuple[Host, ...]
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    master_address: str
    master_port: int
    lease_seconds: float
    link_seconds: float
    failure_seconds: float
    stop_seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended: the runner's code, the ranks' notes, hosts out of reach after it."""

    code: int
    notes: Sequence[Note]
    unreachable: Mapping[str, str]


def run_attempt(attempt: Attempt, stop: StopWish) -> Outcome:
    """Start the ranks, renew their lease until the runner has ended, make sure that no rank is left on any host.

    On a wish to stop ranks finish their step, save and end.
    """
    attempt.folder.mkdir(parents=True, mode=0o700)
    write_hostfile(attempt.folder / "hostfile", attempt.hosts)
    write_environment(attempt.folder / _ENVIRONMENT, {**attempt.environment, ATTEMPT_VARIABLE: str(attempt.folder)})
    renew_lease(attempt.folder, 0)
    command = _command(attempt)
    _LOG.info("starting %s", shlex.join(command))
    # A session of its own: a signal to our process group must not reach the runner, which would kill by command line.
    runner = subprocess.Popen(command, env=_environment(attempt), start_new_session=True, preexec_fn=_die_with_parent)
    try:
        _watch(runner, attempt, stop)
    finally:
        _break_connections(attempt)
        runner.wait()
    unreachable = sweep_hosts(attempt.folder, [host.name for host in attempt.hosts], attempt.lease_seconds)
    return Outcome(code=runner.returncode, notes=read_notes(attempt.folder), unreachable=unreachable)


def _watch(runner: subprocess.Popen, attempt: Attempt, stop: StopWish) -> None:
    """Return when the runner has ended, or had long enough to end after a wish to stop or a rank's failure."""
    count, renewed, give_up = 0, time.monotonic(), float("inf")
    reason = ""
    while runner.poll() is None and time.monotonic() < give_up and not stop.hurry:
        time.sleep(_POLL_SECONDS)
        ending, patience, due = "", attempt.stop_seconds, time.monotonic() - renewed > attempt.lease_seconds / 10
        if not reason and (reason := stop()):
            ending = f"asked to stop ({reason})"
        elif due and give_up == float("inf") and (failed := [note for note in read_notes(attempt.folder) if note.code]):
            first, patience = failed[0], attempt.failure_seconds
            ending = f"rank {first.rank} on {first.host} ended with code {first.code}"
        if ending:
            _LOG.info("%s: waiting up to %.0f s for all ranks to end", ending, patience)
            give_up = time.monotonic() + patience
        if ending or due:
            count, renewed = count + 1, time.monotonic()
            with suppress(OSError):  # ranks hold out until the lease is too old: the next renewal may succeed
                renew_lease(attempt.folder, count, reason)
    if runner.poll() is None:
        _LOG.error("not all ranks ended: breaking the connections, which ends the rest")


def _command(attempt: Attempt) -> list[str]:
    return [str(deepspeed_command()), "--hostfile", str(attempt.folder / "hostfile"), "--force_multi",
            "--launcher", "pdsh", "--master_addr", attempt.master_address, "--master_port", str(attempt.master_port),
            "--log_level", "warning", "--module", "promoe_ds.cli.train", *shell_arguments(attempt.arguments)]


def _environment(attempt: Attempt) -> dict[str, str]:
    environment = runner_environment(os.environ)
    environment[_ENVIRONMENT_VARIABLE] = str(attempt.folder / _ENVIRONMENT)
    # A link that comes back before the ranks have given it up must not have cost the connection that they hang from; one that does
    # not must not keep the runner much longer than them.
    options = ssh_options(attempt.link_seconds)
    environment["PDSH_SSH_ARGS_APPEND"] = " ".join([environment.get("PDSH_SSH_ARGS_APPEND", ""), *options]).strip()
    return environment | {name: attempt.environment[name] for name in ("DS_ACCELERATOR",) if name in attempt.environment}


def sweep_hosts(folder: Path, names: Sequence[str], patience: float) -> dict[str, str]:
    """Wait up to `patience` seconds for the ranks of an attempt to end on some hosts, then kill them.

    Returns: the hosts that could not be asked, and why.
    """
    request = {"folder": str(folder), "patience": patience}
    answers = on_all(names, lambda name: ask(name, "promoe_ds.launch.leftovers", request, timeout=patience + _SWEEP_SECONDS))
    for name, answer in answers.items():
        if isinstance(answer, RemoteError):
            _LOG.error("%s: %s; its ranks end by themselves within supervision.launcher_timeout_seconds", name, answer)
        elif answer["killed"]:
            _LOG.warning("%s: killed what was left of the job: processes %s", name, answer["killed"])
    return {name: str(answer) for name, answer in answers.items() if isinstance(answer, RemoteError)}


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _break_connections(attempt: Attempt) -> None:
    """Kill what this attempt runs on this host: the runner, pdsh, its ssh connections; a killed runner leaves them behind."""
    for pid in processes_with(_ENVIRONMENT_VARIABLE, str(attempt.folder / _ENVIRONMENT)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
