"""A job over its attempts: checked and started on all hosts, restarted on those that are left."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from promoe_ds.errors import LaunchError, Preempted
from promoe_ds.launch.attempt import Attempt, kill_leftovers_on, run_attempt
from promoe_ds.launch.diagnosis import FailureReport, diagnose_failure
from promoe_ds.launch.environment import job_environment
from promoe_ds.launch.layout import Job, choose_layout
from promoe_ds.launch.lock import locked
from promoe_ds.launch.network import INTERFACE_VARIABLES, choose_interface
from promoe_ds.launch.preflight import check_hosts
from promoe_ds.launch.remote import connected, on_all
from promoe_ds.launch.shutdown import ShutdownRequest
from promoe_ds.logs import get_logger
from promoe_ds.run_files import CHECKPOINT_NAME, CHECKPOINTS, LAUNCH_FOLDER, LAUNCHER_LOCK

_LOG = get_logger("launch")
_RETRY_SECONDS = 2.0
_MARGIN_SECONDS = 10.0


def run_job(job: Job) -> FailureReport:
    """Check the hosts, run the job, restart it; return the last attempt's report.

    Raises: LaunchError if it cannot be started: the pre-flight's findings, no legal layout, another
        launcher in the run directory.
    """
    shutdown, environment = ShutdownRequest(terminal=True), job_environment(os.environ)
    folder = job.run_dir.absolute() / LAUNCH_FOLDER
    patience = job.config.supervision.launcher_timeout_seconds
    with locked(folder / LAUNCHER_LOCK, patience) as left_behind:
        if left_behind:  # its ranks need at most so long to see that it is gone
            for last in sorted(folder.glob("attempt_*"))[-1:]:
                kill_leftovers_on(job.host_names, last, patience)
        current, hosts, before = job, check_hosts(job, environment), ""
        for number in range(job.max_restarts + 1):
            found, dead = _wait_for_hosts(job, shutdown) if number else (hosts, {})
            if shutdown.reason:
                message = f"shutdown requested ({shutdown.reason}) while no rank ran{before}"
                return FailureReport(Preempted.exit_code, message, restart=False)
            if number:
                current = _job_for_restart(job, dead)
            attempt = _prepare(current, found, environment, folder, restart=number > 0)
            report = diagnose_failure(current.hosts, run_attempt(attempt, shutdown))
            if shutdown.reason or not report.restart or number == job.max_restarts:
                break
            before = f"; before that: {report.message}"
            _LOG.error("%s", report.message)
            _LOG.warning(
                "restart %d of %d, from the newest complete checkpoint",
                number + 1,
                job.max_restarts,
            )
    return report


def _wait_for_hosts(
    job: Job, shutdown: ShutdownRequest
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the hosts' descriptions, and the problems of those that do not answer in `host_wait`
    seconds.

    A shutdown request ends the wait.
    """
    deadline = time.monotonic() + job.host_wait
    while True:
        with connected(job.host_names, {}) as agents:
            found, dead = on_all(agents, lambda agent: agent.ask("describe", names=job.host_names))
        if not dead or shutdown.reason or time.monotonic() > deadline:
            return found, dead
        time.sleep(_RETRY_SECONDS)


def _job_for_restart(job: Job, dead: Mapping[str, str]) -> Job:
    """Return the job without dead hosts.

    Raises: LaunchError if none is left, with each one's problem.
    """
    problems = [f"{host}: {problem}" for host, problem in dead.items()]
    if len(dead) == len(job.hosts):
        raise LaunchError(
            f"{'; '.join(problems)}. Repair or remove these hosts"
            ' (docs/guides/multinode.md, "Keys")'
        )
    smaller = choose_layout(job, [host for host in job.hosts if host.name not in dead])
    for problem in problems:
        _LOG.warning("continuing without %s", problem)
    return smaller


def _prepare(
    job: Job,
    hosts: Mapping[str, Any],
    environment: Mapping[str, str],
    folder: Path,
    *,
    restart: bool,
) -> Attempt:
    hosts = {host: hosts[host] for host in job.host_names}
    interface = choose_interface(job.interface, environment, hosts)
    variables = dict.fromkeys(INTERFACE_VARIABLES, interface)
    settings, parallel = job.config.supervision, job.config.parallel
    arguments, checkpoints = job.arguments, (job.run_dir / CHECKPOINTS).glob("*")
    if restart and any(CHECKPOINT_NAME.match(path.name) for path in checkpoints):
        # The last one counts: what the user named was for the first start.
        arguments = (*arguments, "--resume", "auto")
    wait = max(settings.step_timeout_seconds, parallel.timeout_seconds) + _MARGIN_SECONDS
    # A shutdown request may find ranks in set-up or in an evaluation; they agree at the end of the
    # next step.
    evaluation = settings.evaluation_timeout_seconds if job.config.evaluation.every else 0.0
    phase = max(settings.setup_timeout_seconds, evaluation)
    shown = ", ".join(f"{host.name} ({host.slots})" for host in job.hosts)
    _LOG.info("%d ranks on %s, ep_size %d, over %s", job.ranks, shown, parallel.ep_size, interface)
    return Attempt(
        folder=folder / f"attempt_{_next_number(folder):03d}",
        hosts=job.hosts,
        arguments=arguments,
        environment={**environment, **variables} if job.interface else {**variables, **environment},
        master_address=hosts[job.host_names[0]]["interfaces"][interface],
        master_port=job.master_port,
        heartbeat_seconds=settings.launcher_timeout_seconds,
        link_seconds=parallel.timeout_seconds + _MARGIN_SECONDS,
        failure_seconds=wait,
        shutdown_seconds=phase + wait + settings.checkpoint_timeout_seconds,
    )


def _next_number(folder: Path) -> int:
    found: Sequence[str] = [path.name.rpartition("_")[2] for path in folder.glob("attempt_*")]
    return 1 + max((int(number) for number in found if number.isdigit()), default=0)
