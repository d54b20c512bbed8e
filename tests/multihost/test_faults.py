"""What breaks on a cluster: each fault is survived or ends the job in time, says which host, leaves
nobody behind.
"""

from __future__ import annotations

import os
import re
import time

import pytest

from promoe_ds.checkpoint.manifest import list_checkpoints, read_manifest

from .launched import FREEZE, KILL, TERM, TIMEOUT, launch, launcher_process, ranks, wait_until

pytestmark = pytest.mark.multihost
TWO = {"host1": 1, "host2": 1}
LONG = ("parallel.ep_size=2", "train.max_steps=100000", "train.checkpoint_every=10")
#: What processes need to end beyond a time-out, on two busy cores with other work beside.
MARGIN = 60


def test_rank_killed_restart_repeats_the_losses(two_hosts, tmp_path, single_host_losses) -> None:
    job = launch(
        two_hosts,
        tmp_path,
        TWO,
        "parallel.ep_size=2",
        "train.max_steps=40",
        "train.checkpoint_every=5",
        options=("--max-restarts", "1"),
    )
    job.wait_for_step(12)
    os.kill(ranks(two_hosts, "host2")[0], KILL)
    wait_until(lambda: "restart 1 of 1" in job.launcher_log(), TIMEOUT + MARGIN, job.log())
    assert job.end() == 0, job.log()
    assert "host2: rank 1 (process " in job.launcher_log()
    assert job.losses() == pytest.approx(single_host_losses["four_experts"], rel=1e-5)
    assert "resume: taking" in job.log()
    assert job.left() == {}


def test_link_down_for_seconds_is_survived_and_for_good_ends_in_time(two_hosts, tmp_path) -> None:
    job = launch(two_hosts, tmp_path, TWO, *LONG)
    job.wait_for_step(5)
    with two_hosts.unplugged("host2"):
        time.sleep(3)
    job.wait_for_step(job.last_step() + 20)
    with two_hosts.unplugged("host2"):
        took = wait_until(
            lambda: not ranks(two_hosts, "host1") and not ranks(two_hosts, "host2"),
            TIMEOUT + MARGIN,
            job.log(),
        )
        assert took > TIMEOUT / 2, "the ranks should have held out for the time-out"
        assert job.end() == 7, job.log()
        assert "host2: does not answer any more" in job.log()
        assert job.left() == {}
    newest = list_checkpoints(job.run_dir / "checkpoints")[0]
    assert read_manifest(newest).step > job.last_step() - 11, (
        "nothing beyond the last checkpoint may be lost"
    )


def test_rank_frozen_peer_dumps_its_stacks_and_all_end(two_hosts, tmp_path) -> None:
    job = launch(
        two_hosts,
        tmp_path,
        TWO,
        *LONG,
        "supervision.step_timeout_seconds=8",
        "parallel.timeout_seconds=10",
        "supervision.launcher_timeout_seconds=8",
        "train.checkpoint_every=100000",
    )
    job.wait_for_step(3)
    os.kill(ranks(two_hosts, "host2")[0], FREEZE)
    wait_until(lambda: not ranks(two_hosts, "host1"), 10 + MARGIN, job.log())
    (dump,) = (job.run_dir / "supervision").glob("stalled_rank_00000_step_*.txt")
    text = dump.read_text()
    assert text.startswith(
        f"rank 0 on host1, process {text.split('process ')[1].split(',')[0]}, step"
        f" {int(dump.stem[-7:])}\n"
    )
    assert "train_step" in text, "the stack of the main thread"
    assert job.end() == 7, "the frozen rank, which cannot report, is the cause of the other's stall"
    assert f"all stacks are in {dump}" in job.log()
    assert "host2: rank 1" in job.launcher_log()
    assert "host2: killed what was left of the job" in job.launcher_log()
    assert job.left() == {}


def test_host_unreachable_at_start_is_named_at_once(three_hosts, tmp_path) -> None:
    with three_hosts.unplugged("host3"):
        job = launch(
            three_hosts,
            tmp_path,
            {"host1": 1, "host2": 1, "host3": 1},
            "parallel.ep_size=1",
            "train.global_batch_size=12",
        )
        # ssh tries twice, for 10 s each where the kernel does not know better (launch/remote.py);
        # then the launcher says so.
        assert job.end(2 * 10 + 2 * MARGIN) == 10, job.log()
    assert job.log().count("  host3: ssh failed: ") == 1
    assert not (job.run_dir / "config.yaml").exists(), "no rank may have been started"
    assert job.left() == {}


def test_sigterm_to_the_launcher_saves_and_ends_with_75(two_hosts, tmp_path) -> None:
    job = launch(two_hosts, tmp_path, TWO, *LONG[:2], "train.checkpoint_every=100000", script=True)
    job.wait_for_step(3)
    second = launch(
        two_hosts,
        tmp_path / "second",
        TWO,
        *LONG[:2],
        run_dir=job.run_dir,
        options=("--master-port", "29555"),
    )
    assert second.end() == 10, second.log()
    assert re.search(r"error: --run-dir .*: process \d+ on host1 uses it already", second.log())
    assert "ended with" not in job.launcher_log(), "the log is the first one's"
    os.kill(launcher_process(job), TERM)
    assert job.end(TIMEOUT + MARGIN) == 75, job.log()
    assert "(SIGTERM): waiting up to" in job.launcher_log()
    # The rank that reports it may have learnt of it from another, which read the heartbeat first.
    assert re.search(r"stopped: .*\(.*\): saved step \d+ of 100000", job.log())
    newest = list_checkpoints(job.run_dir / "checkpoints")[0]
    assert read_manifest(newest).step == job.last_step()
    assert job.left() == {}


def test_host_stays_dead_restart_on_fewer_repeats_the_losses(
    three_hosts, tmp_path, single_host_losses
) -> None:
    job = launch(
        three_hosts,
        tmp_path,
        {"host1": 1, "host2": 1, "host3": 1},
        "parallel.ep_size=3",
        "routing.num_experts=6",
        "train.global_batch_size=12",
        "train.max_steps=40",
        "train.checkpoint_every=5",
        "parallel.timeout_seconds=12",
        options=("--max-restarts", "1", "--host-wait", "2"),
    )
    job.wait_for_step(12)
    with three_hosts.unplugged("host3"):
        assert job.end() == 0, job.log()
        assert job.left() == {}
    log = job.launcher_log()
    assert "host3: does not answer any more" in log
    assert "continuing without host3" in log
    assert "2 ranks on host1 (1), host2 (1), ep_size 2" in log
    assert "resharding, from 3 ranks" in job.log()
    assert job.losses() == pytest.approx(single_host_losses["six_experts"], rel=1e-5)


@pytest.mark.parametrize(
    "victim",
    [
        "launcher",
        "remote launcher",
        pytest.param("pdsh", marks=pytest.mark.combinations),
    ],
)
def test_watcher_killed_ranks_end_on_all_hosts(two_hosts, tmp_path, victim) -> None:
    """Plain DeepSpeed leaves them training, unseen."""
    job = launch(two_hosts, tmp_path, TWO, *LONG, "supervision.launcher_timeout_seconds=8")
    job.wait_for_step(3)
    remote = two_hosts.processes("host2", "deepspeed.launcher.launch").items()
    victims = {
        "launcher": [launcher_process(job)],
        "pdsh": two_hosts.processes("host1", "pdsh"),
        "remote launcher": [pid for pid, command in remote if "bash" not in command.split()[0]],
    }
    for pid in victims[victim]:
        os.kill(pid, KILL)
    wait_until(lambda: not job.left(), 8 + MARGIN, f"{job.left()} {job.log()}")
    code = job.end()
    # By which sign a rank notices it first: its launcher's process, or the other host's ranks.
    assert code in ((-9,) if victim == "launcher" else (7, 9)), job.log()
    assert (f"ended with code {code}: " in job.launcher_log()) == (victim != "launcher")
