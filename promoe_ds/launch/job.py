"""A job over its attempts: started on all hosts, restarted on those that are left."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from promoe_ds.config import load_config
from promoe_ds.errors import LaunchError, Preempted
from promoe_ds.launch.attempt import Attempt, run_attempt, sweep_hosts
from promoe_ds.launch.claim import claimed
from promoe_ds.launch.diagnosis import Verdict, judge
from promoe_ds.launch.environment import job_environment, require_launchable
from promoe_ds.launch.heartbeat import CHECKPOINT_NAME, LAUNCH_FOLDER
from promoe_ds.launch.hostfile import Host
from promoe_ds.launch.layout import Layout, choose_layout, full_layout
from promoe_ds.launch.network import INTERFACE_VARIABLES, choose_interface, reached_by
from promoe_ds.launch.remote import RemoteError, ask, on_all
from promoe_ds.launch.shutdown import StopWish
from promoe_ds.logs import get_logger

_LOG = get_logger("launch")
_ANSWER_SECONDS = 40.0
_RETRY_SECONDS = 2.0
_MARGIN_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a user asked for; `arguments` are those of promoe_ds.cli.train, out of which the rest was read."""

    hosts: tuple[Host, ...]
    arguments: tuple[str, ...]
    recipe: str
    overrides: tuple[str, ...]
    run_dir: Path
    interface: str = ""
    master_port: int = 29500
    max_restarts: int = 0
    host_wait: float = 30.0


def run_job(job: Job) -> Verdict:
    """Run the job to its end, over at most `max_restarts` restarts; return the last attempt's verdict.

    Raises: LaunchError if it cannot be started: a host that does not answer, no legal layout, no common interface, another
        launcher at work in the run directory.
    """
    stop, environment = StopWish(), job_environment(os.environ)
    require_launchable(job.run_dir)
    folder = job.run_dir.absolute() / LAUNCH_FOLDER
    patience = load_config(job.recipe, job.overrides).supervision.launcher_timeout_seconds
    with claimed(folder, patience) as left_behind:
        if left_behind:  # its ranks have at most so long to find out
            names = [host.name for host in job.hosts]
            for attempt in sorted(folder.glob("attempt_*"))[-1:]:
                sweep_hosts(attempt, names, patience)
        return _attempts(job, folder, environment, stop)


def _attempts(job: Job, folder: Path, environment: dict[str, str], stop: StopWish) -> Verdict:
    verdict = None
    for number in range(job.max_restarts + 1):
        if (found := _hosts_for(job, stop, first=number == 0)) is None:
            before = f"; before that: {verdict.message}" if verdict else ""
            return Verdict(Preempted.exit_code, f"asked to stop ({stop()}) while no rank ran{before}", restart=False)
        layout, facts = found
        attempt = _prepare(job, layout, facts, environment, folder, again=number > 0)
        verdict = judge(layout.hosts, run_attempt(attempt, stop))
        left = job.max_restarts - number
        if verdict.code == 0 or stop() or not verdict.restart or not left:
            return verdict
        _LOG.error("%s", verdict.message)
        _LOG.warning("restart %d of %d, from the newest complete checkpoint", number + 1, job.max_restarts)
    raise AssertionError("unreachable: the last attempt returns")


def _hosts_for(job: Job, stop: StopWish, *, first: bool) -> tuple[Layout, dict[str, dict]] | None:
    """Return the layout to start and each host's facts; at a restart, hosts that stay dead are left out.  None: asked to stop."""
    names = [host.name for host in job.hosts]
    deadline = time.monotonic() + (0.0 if first else job.host_wait)
    while True:
        answers = on_all(names, lambda name: ask(name, "promoe_ds.launch.host_info", {"names": names}, timeout=_ANSWER_SECONDS))
        dead = {name: answer for name, answer in answers.items() if isinstance(answer, RemoteError)}
        if stop():
            return None
        if not dead or time.monotonic() > deadline:
            break
        time.sleep(_RETRY_SECONDS)
    if dead and (first or len(dead) == len(names)):
        raise LaunchError("; ".join(f"{name}: {problem}" for name, problem in dead.items()) +
                          ". Mend or remove these hosts (docs/multinode.md, \"Keys\")")
    choose = full_layout if first else choose_layout
    layout = choose(job.recipe, job.overrides, [host for host in job.hosts if host.name not in dead])
    for name, problem in dead.items():
        _LOG.warning("going on without %s: %s", name, problem)
    return layout, {name: answer for name, answer in answers.items() if name not in dead}


def _prepare(job: Job, layout: Layout, facts: dict[str, dict], environment: dict[str, str], folder: Path, *,
             again: bool) -> Attempt:
    names = [host.name for host in layout.hosts]
    interfaces = {name: facts[name]["interfaces"] for name in names}
    interface = choose_interface(job.interface, environment, interfaces, reached_by(facts))
    wanted = dict.fromkeys(INTERFACE_VARIABLES, interface)
    environment = {**wanted, **environment} if not job.interface else {**environment, **wanted}
    settings = layout.config.supervision
    arguments = list(job.arguments)
    if layout.ep_size != load_config(job.recipe, job.overrides).parallel.ep_size:
        arguments += ["--set", f"parallel.ep_size={layout.ep_size}"]
    if again and any(CHECKPOINT_NAME.match(path.name) for path in (job.run_dir / "checkpoints").glob("*")):
        arguments += ["--resume", "auto"]  # the last one counts: what the user named was for the first start
    wait = max(settings.step_timeout_seconds, layout.config.parallel.timeout_seconds)
    # A wish to stop may find the ranks in set-up or in an evaluation; they agree on it at the end of the step after that.
    stage = max(settings.setup_timeout_seconds, settings.evaluation_timeout_seconds if layout.config.evaluation.every else 0.0)
    shown = ", ".join(f"{host.name} ({host.slots})" for host in layout.hosts)
    _LOG.info("%d ranks on %s, ep_size %d, over %s", layout.ranks, shown, layout.ep_size, interface)
    return Attempt(folder=folder / f"attempt_{_next_number(folder):03d}", hosts=layout.hosts, arguments=tuple(arguments),
                   environment=environment, master_address=interfaces[names[0]][interface], master_port=job.master_port,
                   lease_seconds=settings.launcher_timeout_seconds,
                   link_seconds=layout.config.parallel.timeout_seconds + _MARGIN_SECONDS, failure_seconds=wait + _MARGIN_SECONDS,
                   stop_seconds=stage + wait + settings.checkpoint_timeout_seconds + _MARGIN_SECONDS)


def _next_number(folder: Path) -> int:
    found: Sequence[str] = [path.name.rpartition("_")[2] for path in folder.glob("attempt_*")]
    return 1 + max((int(number) for number in found if number.isdigit()), default=0)
