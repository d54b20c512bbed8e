"""The pre-flight on real hosts: each problem is one line with host, problem and remedy."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from promoe_ds.launch.remote import ssh_command
from tests.distributed.jobs import TINY
from tests.processes import REPOSITORY

from .cluster import Cluster, replaced
from .launched import launch_command

pytestmark = pytest.mark.multihost


def _preflight(
    cluster: Cluster, folder: Path, hostfile: str, *, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    (folder / "hosts").write_text(hostfile)
    training = ["--set", *TINY, "parallel.ep_size=1"]
    paths = folder / "hosts", folder / "run"
    command = launch_command("preflight", *paths, *options, training=training)
    return cluster.run("host1", *command, cwd=REPOSITORY)


THREE = "host1 slots=1\nhost2 slots=2\nhost3 slots=1\n"


def test_preflight_hosts_without_problem_pass(three_hosts, tmp_path) -> None:
    done = _preflight(three_hosts, tmp_path, THREE)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        0,
        "pre-flight: 3 hosts, 4 ranks: no problem",
    ), done.stderr
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert list((tmp_path / "run/launch").iterdir()) == []


def test_preflight_defects_of_several_hosts_are_all_named(three_hosts, tmp_path) -> None:
    """One host's run directory is its own, another has no package."""
    shared = tmp_path / "run"
    shared.mkdir()
    hidden = {"host2": str(shared), "host3": str(REPOSITORY / "promoe_ds")}
    for host, folder in hidden.items():
        assert three_hosts.run(host, "mount", "-t", "tmpfs", "tmpfs", folder).returncode == 0
    try:
        done = _preflight(three_hosts, tmp_path, THREE)
    finally:
        for host, folder in hidden.items():
            three_hosts.run(host, "umount", folder)
    assert done.returncode == 10, done.stdout
    assert f"  host2: --run-dir {shared} is another folder there than here: " in done.stderr
    assert "  host3: the agent ended with code 1: " in done.stderr
    assert "No module named" in done.stderr
    assert "error: pre-flight: 2 problems" in done.stderr


def test_preflight_unreachable_and_locked_hosts_are_named(three_hosts, tmp_path) -> None:
    config = three_hosts.home("host1") / ".ssh/config"
    locked = (
        "Host host2\n  IdentityFile /nowhere\n  User root\n  UserKnownHostsFile "
        f"{three_hosts.root}/known_hosts\nHost host1 host3\n"
        + config.read_text().partition("\n")[2]
    )
    with replaced(config, locked), three_hosts.unplugged("host3"):
        done = _preflight(three_hosts, tmp_path, THREE)
    assert done.returncode == 10
    assert (
        "  host2: ssh failed: root@host2: Permission denied (publickey).: install your key there"
        " (ssh-copy-id)" in done.stderr
    )
    assert "  host3: ssh failed: " in done.stderr
    assert len(done.stderr.splitlines()) == 3


def test_preflight_port_gpus_and_interface_are_checked(two_hosts, tmp_path) -> None:
    two = "host1 slots=1\nhost2 slots=1\n"
    code = (
        "import socket, sys; s = socket.create_server(('10.87.2.1', 29511)); print('listening',"
        " flush=True); sys.stdin.read()"
    )
    holder = two_hosts.popen(
        "host1",
        sys.executable,
        "-c",
        code,
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == "listening\n"
        done = _preflight(two_hosts, tmp_path, two, options=("--master-port", "29511"))
    finally:
        holder.communicate()  # its input ends, and it with that
    assert (
        "host1: OSError: [Errno 98] Address already in use" in done.stderr
        and "--master-port" in done.stderr
    )
    done = _preflight(two_hosts, tmp_path, two, options=("--interface", "ib0"))
    assert (
        "host1: has no interface ib0 with an address (it has lo 127.0.0.1, eth0 10.87.2.1): "
        in done.stderr
    )
    with replaced(two_hosts.home("host1") / ".deepspeed_env", "OMP_NUM_THREADS=1\n"):
        done = _preflight(two_hosts, tmp_path, two)
    assert "host2: 0 GPUs, but slots=1: " in done.stderr


def test_host_just_back_is_reached(two_hosts) -> None:
    """The kernel looks for a silent neighbour for 3 s and fails whatever waits then, even if the
    cable is back by that time.
    """
    quiet = {"cwd": Path("/"), "stderr": subprocess.DEVNULL}
    with two_hosts.unplugged("host2"):
        two_hosts.run("host1", "ip", "neighbour", "flush", "all")
        probe = two_hosts.popen("host1", "ssh", "-o", "BatchMode=yes", "host2", "true", **quiet)
        time.sleep(2.5)
    done = two_hosts.run("host1", *ssh_command("host2", ["true"]))
    assert probe.wait(120) == 255, "the probe should have failed, or there was nothing to survive"
    assert done.returncode == 0, done.stderr
