"""A job between its attempts: arguments of a restart, shutdown requests, the patience of its parts.

Hosts are stand-ins; no process is started but where a test says so.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from promoe_ds.config import load_config
from promoe_ds.launch import attempt as attempts
from promoe_ds.launch import job as jobs
from promoe_ds.launch import shutdown as shutdowns
from promoe_ds.launch.attempt import Attempt, Outcome
from promoe_ds.launch.hostfile import Host
from promoe_ds.launch.job import _prepare, run_job
from promoe_ds.launch.layout import Job
from promoe_ds.launch.shutdown import ShutdownRequest

HOSTS = (Host("host1", 1), Host("host2", 1))
ATTEMPT = Attempt(
    folder=Path(),
    hosts=HOSTS,
    arguments=(),
    environment={},
    master_address="",
    master_port=0,
    heartbeat_seconds=60,
    link_seconds=60,
    failure_seconds=60,
    shutdown_seconds=60,
)


@pytest.fixture
def shutdown(monkeypatch, tmp_path) -> Iterator[ShutdownRequest]:
    """A request of its own, with the signals given back, in a folder whose name no shell would
    split.
    """
    monkeypatch.chdir(tmp_path)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    request = ShutdownRequest(terminal=True)
    monkeypatch.setattr(jobs, "ShutdownRequest", lambda terminal: request)
    monkeypatch.setattr(
        jobs,
        "check_hosts",
        lambda job, environment: {host.name: _described(host.name) for host in job.hosts},
    )
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def started(monkeypatch) -> list[Attempt]:
    """Return the attempts that were started, of none of which a rank writes a status."""
    found: list[Attempt] = []

    def run_attempt(attempt: Attempt, shutdown: ShutdownRequest) -> Outcome:
        found.append(attempt)
        return Outcome(code=1, statuses=[], unreachable={})

    monkeypatch.setattr(jobs, "run_attempt", run_attempt)
    return found


def _job(folder: Path, *overrides: str, restarts: int = 2) -> Job:
    (folder / "launch").mkdir(parents=True)
    overrides = ("parallel.ep_size=1", *overrides)
    return Job(
        hosts=HOSTS,
        arguments=(),
        recipe="digits_promoe",
        overrides=overrides,
        deepspeed_config="",
        config=load_config("digits_promoe", overrides),
        run_dir=folder,
        max_restarts=restarts,
        host_wait=60.0,
    )


def _described(host: str) -> dict:
    return {
        "interfaces": {"eth0": f"10.0.0.{host[-1]}"},
        "addresses": {name: f"10.0.0.{name[-1]}" for name in ("host1", "host2")},
    }


@pytest.mark.parametrize("dead", [set(), {"host2"}, {"host1", "host2"}])
def test_job_shutdown_between_attempts_starts_none(
    tmp_path, monkeypatch, shutdown, started, dead
) -> None:
    """The request comes while the launcher asks the hosts, whether it waits for one of them or
    not.
    """

    def on_all(*unused: object) -> tuple[dict, dict]:
        os.kill(os.getpid(), signal.SIGTERM)
        living = {"host1", "host2"} - dead
        return {name: _described(name) for name in living}, dict.fromkeys(dead, "no route")

    monkeypatch.setattr(jobs, "connected", lambda *unused: nullcontext({}))
    monkeypatch.setattr(jobs, "on_all", on_all)
    before = time.monotonic()
    report = run_job(_job(tmp_path))
    assert (report.code, report.restart, len(started)) == (75, False, 1)
    assert "SIGTERM" in report.message and "host1: rank 0 never started" in report.message
    assert time.monotonic() - before < 10, "it must not wait for the dead host"
    assert not (tmp_path / "launch/launcher.json").exists()


def test_job_patience_covers_set_up_evaluation_and_save(tmp_path, shutdown, started) -> None:
    common = (
        "supervision.setup_timeout_seconds=100",
        "supervision.evaluation_timeout_seconds=3000",
        "supervision.checkpoint_timeout_seconds=20",
        "supervision.step_timeout_seconds=7",
        "parallel.timeout_seconds=6",
    )
    for name, more in (
        ("without", ()),
        ("with", ("evaluation.every=50", "evaluation.reference=x")),
    ):
        run_job(_job(tmp_path / name, *common, *more, restarts=0))
    assert 6 < started[0].link_seconds < 6 + 15, "as long as an exchange lasts, and hardly longer"
    without, with_evaluation = started[0].shutdown_seconds, started[-1].shutdown_seconds
    assert without >= 100 + 7 + 20
    assert with_evaluation - without == 2900


def test_ssh_of_ranks_outlasts_their_exchanges(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222")
    attempt = replace(ATTEMPT, folder=tmp_path, link_seconds=911)
    given = attempts._environment(attempt)["PDSH_SSH_ARGS_APPEND"]
    assert given.startswith("-p 2222 -o BatchMode=yes") and given.endswith(
        "-o ServerAliveCountMax=183"
    ), "5 s * 183 > 911 s"


def test_attempt_ends_at_once_though_ranks_do_not(tmp_path, monkeypatch, shutdown) -> None:
    """A second Ctrl-C ends a runner that would take its minutes."""
    script = tmp_path / "runner"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(attempts, "_command", lambda attempt: [str(script)])
    monkeypatch.setattr(attempts, "kill_leftovers_on", lambda *unused: {})
    monkeypatch.setattr(shutdowns, "_REPEAT_SECONDS", -1.0)
    attempt = replace(ATTEMPT, folder=tmp_path / "attempt_001")
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    before = time.monotonic()
    assert attempts.run_attempt(attempt, shutdown).code == -9
    assert time.monotonic() - before < 50


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("step_0000004", ("--resume", "starts/promoe", "--resume", "auto")),
        ("step_0000004.tmp", ("--resume", "starts/promoe")),
        ("step_0000004.abandoned", ("--resume", "starts/promoe")),
        (None, ("--resume", "starts/promoe")),
    ],
)
def test_restart_leaves_the_named_start_for_finished_checkpoints_only(
    tmp_path: Path, folder: str | None, expected: tuple
) -> None:
    (tmp_path / "checkpoints" / (folder or "")).mkdir(parents=True)
    job = replace(_job(tmp_path), arguments=("--resume", "starts/promoe"))
    hosts = {host.name: _described(host.name) for host in HOSTS}
    attempt = _prepare(job, hosts, {}, tmp_path / "launch", restart=True)
    assert attempt.arguments == expected
