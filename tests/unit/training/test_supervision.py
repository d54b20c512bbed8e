"""A rank's watch over itself, in real processes: what it ends by, with which code and words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from promoe_ds.config import SupervisionConfig
from promoe_ds.distributed.peers import peer_problem
from promoe_ds.launch.heartbeat import read_heartbeat, read_rank_statuses, renew_heartbeat
from promoe_ds.launch.processes import kill_leftover_processes, processes_with
from promoe_ds.launch.shutdown import RANK_SIGNALS, EarlySignals
from promoe_ds.training import watchdog
from promoe_ds.training.health import HealthWatch, agree
from promoe_ds.training.supervisor import Supervisor, supervised

REPOSITORY = Path(__file__).parents[3]
#: A rank that is set up, makes one step and then does what `body` says.
RANK = """
import os, sys, time, threading
from pathlib import Path
from promoe_ds.config import SupervisionConfig
from promoe_ds.training.supervisor import supervised
from promoe_ds.cli.entry import run_entry
from promoe_ds.launch.shutdown import EarlySignals
def main(arguments):
    early = EarlySignals()
    seconds = lambda name: float(os.environ.get(name, "100"))
    settings = SupervisionConfig(
        step_timeout_seconds=seconds("STEP_SECONDS"), setup_timeout_seconds=100,
        launcher_timeout_seconds=seconds("LAUNCHER_SECONDS"))
    with supervised(settings, Path(sys.argv[1]), early) as supervisor:
        supervisor.begin_step(0); supervisor.end_step(); supervisor.begin_step(7)
        print("ready", flush=True)
        {body}
run_entry(main)
"""


UNTIL_ASKED = "[time.sleep(0.05) for _ in iter(supervisor.shutdown_requested, True)]"


def _rank(folder: Path, body: str, **environment: str) -> subprocess.Popen:
    env = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "RANK": "3",
        "LOCAL_RANK": "0",
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-c", RANK.format(body=body), str(folder)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_watchdog_stalled_step_dumps_stacks_and_ends_with_8(tmp_path) -> None:
    rank = _rank(
        tmp_path, "lock = threading.Lock(); lock.acquire(); lock.acquire()", STEP_SECONDS="1.5"
    )
    _, errors = rank.communicate(timeout=200)
    assert rank.returncode == 8
    (dump,) = (tmp_path / "supervision").iterdir()
    assert dump.name == "stalled_rank_00003_step_0000007.txt"
    assert dump.read_text().startswith(
        f"rank 3 on {os.uname().nodename}, process {rank.pid}, step 7\n"
    )
    assert "in main" in dump.read_text()
    assert (
        "step 7 took longer than 1.5 s (supervision.step_timeout_seconds): all stacks are in"
        f" {dump}" in errors
    )


def test_watchdog_heartbeat_not_renewed_ends_with_9_and_a_status(tmp_path) -> None:
    attempt = tmp_path / "attempt"
    attempt.mkdir()
    renew_heartbeat(attempt, 1)
    rank = _rank(
        tmp_path,
        "time.sleep(1); supervisor.begin_step(8); time.sleep(1); supervisor.begin_step(9);"
        " time.sleep(60)",
        LAUNCHER_SECONDS="2",
        PROMOE_LAUNCH_DIR=str(attempt),
    )
    _, errors = rank.communicate(timeout=200)
    assert rank.returncode == 9, errors
    assert "no heartbeat of the launcher for 2 s" in errors
    (status,) = read_rank_statuses(attempt)
    assert (status.rank, status.code, status.pid) == (3, 9, rank.pid)


def test_heartbeat_shutdown_request_reaches_the_rank(tmp_path) -> None:
    renew_heartbeat(tmp_path, 5, "SIGTERM")
    assert read_heartbeat(tmp_path) == (5, "SIGTERM")
    rank = _rank(
        tmp_path,
        f"{UNTIL_ASKED}; print(supervisor.shutdown_requested(), supervisor.stop_reason)",
        PROMOE_LAUNCH_DIR=str(tmp_path),
    )
    output, errors = rank.communicate(timeout=200)
    assert output.splitlines()[-1] == "True SIGTERM", errors
    assert [status.code for status in read_rank_statuses(tmp_path)] == [0]
    (tmp_path / "heartbeat.json").write_text("{half")
    assert read_heartbeat(tmp_path) is None


def test_second_interrupt_ends_a_rank_at_once(tmp_path) -> None:
    rank = _rank(tmp_path, "time.sleep(200)")
    assert rank.stdout.readline() == "ready\n"
    for _ in range(2):
        rank.send_signal(signal.SIGINT)
        time.sleep(0.8)
    _, errors = rank.communicate(timeout=100)
    assert (rank.returncode, "interrupted: rank 3 on " in errors) == (130, True), errors


def test_signal_during_the_imports_is_handed_over(tmp_path) -> None:
    before = {number: signal.getsignal(number) for number in RANK_SIGNALS}
    try:
        early = EarlySignals()
        os.kill(os.getpid(), signal.SIGUSR1)
        with supervised(SupervisionConfig(), tmp_path, early) as supervisor:
            assert (supervisor.shutdown_requested(), supervisor.stop_reason) == (True, "SIGUSR1")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_signal_after_the_agreed_stop_keeps_the_exit_code(tmp_path) -> None:
    """Another rank's signal came first: this one is about to end when its own arrives."""
    rank = _rank(tmp_path, "from promoe_ds.errors import Preempted; raise Preempted('saved')")
    assert rank.stdout.readline() == "ready\n"
    time.sleep(0.5)  # it waits now, so that rank 0 may speak first
    rank.send_signal(signal.SIGTERM)
    _, errors = rank.communicate(timeout=200)
    assert (rank.returncode, errors) == (75, "stopped: rank 3: saved\n")


def test_rank_whose_deepspeed_launcher_is_killed_ends_with_9(tmp_path) -> None:
    """A stand-in for DeepSpeed's launcher, known by its name on the command line, starts the rank
    and is killed.
    """
    attempt, launch = tmp_path / "attempt", tmp_path / "deepspeed.launcher.launch"
    attempt.mkdir()
    launch.write_text("import subprocess, sys\nsubprocess.run(sys.argv[1:])\n")
    body = "[(supervisor.begin_step(n), time.sleep(0.5)) for n in range(100)]"
    command = [
        sys.executable,
        str(launch),
        sys.executable,
        "-c",
        RANK.format(body=body),
        str(tmp_path),
    ]
    code = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    env = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "RANK": "0",
        "LOCAL_RANK": "1",
        "PROMOE_LAUNCH_DIR": str(attempt),
    }
    starter = subprocess.Popen(
        [sys.executable, "-c", code, *command], env=env, text=True, stdout=subprocess.PIPE
    )
    assert starter.stdout.readline() == "ready\n"
    launcher = int(Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text())
    os.kill(launcher, signal.SIGKILL)
    deadline = time.monotonic() + 1000
    while (
        not [status for status in read_rank_statuses(attempt) if status.code is not None]
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    (status,) = read_rank_statuses(attempt)
    starter.wait(100)
    assert status.code == 9
    assert f"launcher process {launcher} is gone" in status.message


def test_leftovers_of_an_attempt_are_killed_and_nothing_else(tmp_path) -> None:
    mine, other = (
        subprocess.Popen(
            ["sleep", "60"],
            env={"PATH": os.environ["PATH"], "PROMOE_LAUNCH_DIR": str(tmp_path / name)},
        )
        for name in ("attempt_001", "attempt_0010")
    )
    try:
        deadline = time.monotonic() + 100
        while [
            p.pid for p in processes_with("PROMOE_LAUNCH_DIR", str(tmp_path / "attempt_001"))
        ] != [mine.pid]:
            assert (
                time.monotonic() < deadline
            )  # a process has its environment a moment after it has begun
        assert kill_leftover_processes(str(tmp_path / "attempt_001"), patience=0.1) == [mine.pid]
        assert mine.wait(100) == -9
        assert other.poll() is None
    finally:
        mine.kill()
        other.kill()
        other.wait()


def test_peer_problem_names_the_rank_at_the_address() -> None:
    places = {"10.0.0.1": "rank 0 on a", "10.0.0.2": "ranks 1, 2 on b"}
    closed = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"
        " [10.0.0.2]:21503"
    )
    assert peer_problem(closed, places).startswith("lost ranks 1, 2 on b (")
    late = RuntimeError(
        "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation to"
        " complete"
    )
    assert peer_problem(late, places).startswith("a collective with other ranks ")
    assert peer_problem(dist.DistBackendError("NCCL error"), places)
    assert peer_problem(RuntimeError("shape '[2]' is invalid"), places) == ""
    assert peer_problem(ValueError("Connection closed by peer"), places) == ""


def test_shutdown_request_of_another_rank_is_agreed_with_the_health_of_a_step(monkeypatch) -> None:
    reduced = []

    def all_reduce(tensor, **options):
        reduced.append(tensor.clone())
        tensor[1] = 1  # another rank requests a shutdown

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    watch = HealthWatch(nn.Linear(2, 1))
    watch.see_loss(torch.ones(()))
    is_bad = watch.end_step().is_bad()
    assert agree(is_bad, False).tolist() == [0, 1]
    assert agree(is_bad, True).tolist() == [0, 1]
    assert [values.tolist() for values in reduced] == [
        [0.0, 0.0],
        [0.0, 1.0],
    ], "one collective for both"


def test_rank_among_others_ends_at_once_by_any_error_and_says_which(tmp_path) -> None:
    """No interpreter shutdown: it would wait for a GPU's kernels, and those for the others."""
    rank = _rank(
        tmp_path,
        "import atexit, torch.distributed as dist;"
        " atexit.register(lambda: time.sleep(600));"
        " dist.is_initialized = lambda: True; dist.get_world_size = lambda: 8;"
        " raise MemoryError('of the device')",
        PROMOE_STATUS_DIR=str(tmp_path),
    )
    _, errors = rank.communicate(timeout=200)
    assert rank.returncode == 1
    assert errors.endswith("MemoryError: of the device\n")
    (status,) = read_rank_statuses(tmp_path)
    assert (status.code, status.message) == (1, "MemoryError: of the device")


def test_sign_of_life_says_where_a_rank_was_last(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PROMOE_STATUS_DIR", str(tmp_path))
    monkeypatch.setattr(watchdog, "SIGN_OF_LIFE_SECONDS", 0.0)
    early = EarlySignals.__new__(EarlySignals)
    early.chain, early.at_once = (), False
    watch = watchdog.Watchdog(tmp_path, 60.0, early)
    watch.start()
    try:
        watch.expect("step", 41, 100.0)
        deadline = time.monotonic() + 60
        while not any(s.message == "step 41" for s in read_rank_statuses(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        watch.close()
    assert read_rank_statuses(tmp_path)[0].code is None


def test_saving_may_take_longer_than_a_step_s_collectives() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        settings = SupervisionConfig(checkpoint_timeout_seconds=1800)
        supervisor = Supervisor(settings, collective_seconds=600)
        with supervisor.saving():
            assert backend.options._timeout.total_seconds() == 1800
        assert backend.options._timeout.total_seconds() == 600
    finally:
        dist.destroy_process_group()
