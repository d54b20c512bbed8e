"""A job between its attempts: what a restart is told, the wish to stop, the patience of its parts.

Hosts are stand-ins; no process is started.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from promoe_ds.config import load_config
from promoe_ds.launch import attempt as attempts
from promoe_ds.launch import job as jobs
from promoe_ds.launch.attempt import Attempt, Outcome
from promoe_ds.launch.hostfile import Host
from promoe_ds.launch.job import Job, _prepare, run_job
from promoe_ds.launch.layout import Layout
from promoe_ds.launch.remote import RemoteError, ssh_command, ssh_options
from promoe_ds.launch.shutdown import StopWish

HOSTS = (Host("host1", 1), Host("host2", 1))
ATTEMPT = Attempt(folder=Path(), hosts=HOSTS, arguments=(), environment={}, master_address="", master_port=0, lease_seconds=60,
                  link_seconds=60, failure_seconds=60, stop_seconds=60)


@pytest.fixture
def stop(monkeypatch, tmp_path) -> Iterator[StopWish]:
    """A wish of its own, with the signals given back, in a folder whose name no shell would split."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)}
    wish = StopWish()
    monkeypatch.setattr(jobs, "StopWish", lambda: wish)
    yield wish
    for number, handler in before.items():
        signal.signal(number, handler)


def _recording(started: list[Attempt]) -> Callable[[Attempt, StopWish], Outcome]:
    """Stand in for an attempt of which no rank leaves a note."""
    def run_attempt(attempt: Attempt, stop: StopWish) -> Outcome:
        started.append(attempt)
        return Outcome(code=1, notes=[], unreachable={})

    return run_attempt


def _job(folder: Path, *overrides: str, restarts: int = 2) -> Job:
    (folder / "launch").mkdir()
    return Job(hosts=HOSTS, arguments=(), recipe="digits_promoe", overrides=("parallel.ep_size=1", *overrides), run_dir=folder,
               max_restarts=restarts, host_wait=60.0)


def _facts(host: str) -> dict:
    return {"interfaces": {"eth0": f"10.0.0.{host[-1]}"}, "addresses": {name: f"10.0.0.{name[-1]}" for name in ("host1", "host2")}}


@pytest.mark.parametrize("dead", [set(), {"host2"}])
def test_job_stop_between_attempts_starts_none(tmp_path, monkeypatch, stop, dead) -> None:
    """The wish comes while the launcher asks the hosts, whether it waits for one of them or not."""
    started: list[Attempt] = []

    def ask(host: str, *unused: object, **options: object) -> dict:
        if started:
            os.kill(os.getpid(), signal.SIGTERM)
            if host in dead:
                raise RemoteError("no route")
        return _facts(host)

    monkeypatch.setattr(jobs, "ask", ask)
    monkeypatch.setattr(jobs, "run_attempt", _recording(started))
    before = time.monotonic()
    verdict = run_job(_job(tmp_path))
    assert (verdict.code, verdict.restart, len(started)) == (75, False, 1)
    assert verdict.message.startswith("asked to stop (SIGTERM) while no rank ran; before that: host1: rank 0 never started")
    assert time.monotonic() - before < 10, "it must not wait for the dead host"
    assert not (tmp_path / "launch/launcher.json").exists()


def test_job_patience_covers_set_up_evaluation_and_save(tmp_path, monkeypatch, stop) -> None:
    started: list[Attempt] = []
    monkeypatch.setattr(jobs, "ask", lambda host, *unused, **options: _facts(host))
    monkeypatch.setattr(jobs, "run_attempt", _recording(started))
    common = ("supervision.setup_timeout_seconds=100", "supervision.evaluation_timeout_seconds=3000",
              "supervision.checkpoint_timeout_seconds=20", "supervision.step_timeout_seconds=7", "parallel.timeout_seconds=6")
    for name, more in (("without", ()), ("with", ("evaluation.every=50", "evaluation.reference=x"))):
        (tmp_path / name).mkdir()
        run_job(_job(tmp_path / name, *common, *more, restarts=0))
    assert 6 < started[0].link_seconds < 6 + 15, "as long as an exchange lasts, and hardly longer"
    without, with_evaluation = started[0].stop_seconds, started[-1].stop_seconds
    assert without >= 100 + 7 + 20
    assert with_evaluation - without == 2900


def test_ssh_of_ranks_outlasts_their_exchanges_and_that_of_questions_does_not(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222")
    attempt = replace(ATTEMPT, folder=tmp_path, link_seconds=911)
    given = attempts._environment(attempt)["PDSH_SSH_ARGS_APPEND"]
    assert given.startswith("-p 2222 -o BatchMode=yes")
    assert given.endswith("-o ServerAliveInterval=5 -o ServerAliveCountMax=183"), "5 s * 183 > 911 s"
    assert "ServerAliveCountMax=3" in ssh_command("host1", ["true"])
    assert ssh_options(0.1)[-1] == "ServerAliveCountMax=1"


def test_stop_wish_second_interrupt_hurries_and_other_signals_do_not(stop) -> None:
    for number, hurry in ((signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGINT, True), (signal.SIGTERM, True)):
        os.kill(os.getpid(), number)
        assert (stop(), stop.hurry) == ("SIGTERM", hurry)


def test_attempt_hurried_ends_though_ranks_do_not(tmp_path, monkeypatch, stop) -> None:
    """A second Ctrl-C ends a runner that would take its minutes."""
    script = tmp_path / "runner"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(attempts, "_command", lambda attempt: [str(script)])
    monkeypatch.setattr(attempts, "sweep_hosts", lambda *unused: {})
    attempt = replace(ATTEMPT, folder=tmp_path / "attempt_001")
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    before = time.monotonic()
    assert attempts.run_attempt(attempt, stop).code == -9
    assert time.monotonic() - before < 50


@pytest.mark.parametrize(("folder", "expected"), [
    ("step_0000004", ("--resume", "starts/promoe", "--resume", "auto")), ("step_0000004.tmp", ("--resume", "starts/promoe")),
    ("step_0000004.abandoned", ("--resume", "starts/promoe")), (None, ("--resume", "starts/promoe")),
])
def test_restart_leaves_the_named_start_for_finished_checkpoints_only(tmp_path: Path, folder: str | None, expected: tuple) -> None:
    (tmp_path / "checkpoints" / (folder or "")).mkdir(parents=True)
    config, host = load_config("digits_promoe"), Host(name="localhost", slots=1)
    job = Job(hosts=(host,), arguments=("--resume", "starts/promoe"), recipe="digits_promoe", overrides=(), run_dir=tmp_path,
              interface="lo")
    layout = Layout(config=config, hosts=(host,), ep_size=config.parallel.ep_size)
    facts = {"localhost": {"interfaces": {"lo": "127.0.0.1"}, "addresses": {}}}
    assert _prepare(job, layout, facts, {}, tmp_path / "launch", again=True).arguments == expected
