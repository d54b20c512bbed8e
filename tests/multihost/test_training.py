"""Training across hosts: the losses of a single host, whatever the layout; values arrive as they
are; nobody listens too wide.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from .cluster import Cluster, replaced
from .launched import PATIENCE, TERM, Launched, launch, launcher_process, ranks, wait_until

pytestmark = pytest.mark.multihost

#: Alive in any shell that sees it unquoted.
NASTY = r"""a  "b" 'c' $HOME `touch oops` $(touch oops) \ ; & | > oops * 50% %h %n %%"""


def _listening(pid: int) -> set[str]:
    """Return the addresses that the network of a process listens on."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A":
                packed = bytes.fromhex(local.partition(":")[0])
                found.add(
                    ".".join(map(str, reversed(packed)))
                    if len(packed) == 4
                    else f"IPv6 {packed.hex()}"
                )
    return found


def test_one_rank_a_host_equals_single_host_and_values_arrive(
    two_hosts, tmp_path, single_host_losses
) -> None:
    environment = two_hosts.home("host1") / ".deepspeed_env"
    with replaced(environment, f"{environment.read_text()}NASTY={NASTY}\n"):
        job = launch(
            two_hosts,
            tmp_path,
            {"host1": 1, "host2": 1},
            "parallel.ep_size=2",
            "train.max_steps=40",
            "optimizer.betas=[0.9,  0.999]",
        )
        job.wait_for_step(1)
        for name, address in two_hosts.addresses.items():
            (rank,) = ranks(two_hosts, name)
            values = Path(f"/proc/{rank}/environ").read_bytes().decode().split("\0")
            assert f"NASTY={NASTY}" in values
            assert "optimizer.betas=[0.9,  0.999]" in Path(
                f"/proc/{rank}/cmdline"
            ).read_text().split("\0")
            assert _listening(rank) == {address}
    assert job.end() == 0, job.log()
    assert job.losses() == pytest.approx(single_host_losses["four_experts"], rel=1e-5)
    assert (
        not list(Path.cwd().glob("oops"))
        + list(tmp_path.glob("oops"))
        + list(two_hosts.home("host2").glob("oops"))
    )
    assert job.run_dir.stat().st_mode & 0o777 == 0o700
    assert job.left() == {}


@pytest.mark.combinations
def test_two_ranks_a_host_equal_single_host(two_hosts, tmp_path, single_host_losses) -> None:
    """Two sets of experts (ep 2 x dp 2), each spread over the ranks of one host; gradients
    cross.
    """
    job = launch(
        two_hosts, tmp_path, {"host1": 2, "host2": 2}, "parallel.ep_size=2", "train.max_steps=40"
    )
    assert job.end() == 0, job.log()
    assert job.losses() == pytest.approx(single_host_losses["four_experts"], rel=1e-5)


def _measure(cluster: Cluster, job: Launched, steps: int) -> tuple[float, float]:
    """Return seconds and bytes that host2 sends a step, over some steps of a running job."""
    (rank,) = ranks(cluster, "host2")

    def snapshot() -> tuple[int, float, int]:
        line = next(
            line
            for line in Path(f"/proc/{rank}/net/dev").read_text().splitlines()
            if "eth0:" in line
        )
        return job.last_step(), time.perf_counter(), int(line.split()[9])

    job.wait_for_step(job.last_step() + 2)
    step, started, sent = snapshot()
    wait_until(lambda: job.last_step() >= step + steps, PATIENCE, job.log())
    last, ended, sent_later = snapshot()
    return (ended - started) / (last - step), (sent_later - sent) / (last - step)


def test_step_time_of_limited_and_delayed_links_is_what_bytes_and_exchanges_ask_for(
    two_hosts, tmp_path, record_property
) -> None:
    job = launch(
        two_hosts,
        tmp_path,
        {"host1": 1, "host2": 1},
        "parallel.ep_size=2",
        "train.max_steps=100000",
    )
    job.wait_for_step(5)
    free, sent = _measure(two_hosts, job, 25)
    lines = [f"no limit: {free * 1e3:.0f} ms a step, {sent / 1e6:.2f} MB sent by a host"]
    for megabits in (100, 30):
        with two_hosts.limited("host2", f"{megabits}mbit"):
            limited, sent = _measure(two_hosts, job, 12)
        # Both directions run at once and are equally full: a step cannot be shorter than one takes.
        wire = 8 * sent / (megabits * 1e6)
        lines.append(
            f"{megabits} Mbit/s: {limited * 1e3:.0f} ms a step, {sent / 1e6:.2f} MB,"
            f" {wire * 1e3:.0f} ms on the wire"
        )
        assert limited > 0.8 * wire, lines
    late_steps = []
    for milliseconds in (1, 21):
        with two_hosts.delayed("host2", milliseconds / 1e3):
            late, sent = _measure(two_hosts, job, 12)
        more = (late - free) / (milliseconds / 1e3)
        lines.append(
            f"{milliseconds} ms more each way: {late * 1e3:.0f} ms a step, {more:.0f} times the"
            " delay more"
        )
        # Rows go out and come back, forward and backward, in two layers, one after the other: no
        # step can be shorter than that.
        assert late > 8 * milliseconds / 1e3, lines
        late_steps.append(late)
    # Few more exchanges wait for nothing: what 20 ms more bring a step is the delay of at most 80
    # of them, or other work beside.
    assert late_steps[1] - late_steps[0] < 80 * 20e-3, lines
    record_property("step_times", "; ".join(lines))
    (job.run_dir.parent / "step_times").write_text("\n".join(lines) + "\n")
    os.kill(launcher_process(job), TERM)
    assert job.end() == 75
