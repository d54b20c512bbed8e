"""slurm.sbatch with stand-ins for Slurm's commands: `srun` starts the real task on each real host,
over ssh.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from promoe_ds.checkpoint.manifest import list_checkpoints, read_manifest
from tests.distributed.jobs import TINY
from tests.processes import REPOSITORY

from .cluster import Cluster
from .launched import PATIENCE, RANK, ranks, wait_until

pytestmark = pytest.mark.multihost

#: One task a node, its number in SLURM_NODEID; signals are passed on to the tasks; the highest
# exit code counts: as srun does.
_SRUN = """#!{python}
import os, shlex, signal, subprocess, sys
arguments = sys.argv[1:]
while arguments[0].startswith("--"):
    arguments.pop(0)
nodes = os.environ["SLURM_JOB_NODELIST"].split(",")
kept = ("SLURM", "PROMOE", "DS_", "OMP", "GLOO", "PATH")
passed = [f"{{k}}={{v}}" for k, v in os.environ.items() if k.startswith(kept)]
def task(number, node):
    script = f"echo $$ > {folder}/task{{number}}; cd {repository}; exec \\"$@\\""
    start = ["env", *passed, f"SLURM_NODEID={{number}}", "sh", "-c", script, "sh"]
    return subprocess.Popen(["ssh", node, shlex.join([*start, *arguments])])
tasks = [task(number, node) for number, node in enumerate(nodes)]
def forward(*unused):
    for number, node in enumerate(nodes):
        subprocess.run(["ssh", node, f"kill -USR1 $(cat {folder}/task{{number}})"], check=True)
signal.signal(signal.SIGUSR1, forward)
sys.exit(max(process.wait() for process in tasks))
"""
_SCONTROL = """#!/bin/sh
case "$1" in
    show) echo "$3" | tr , '\\n' ;;
    *) echo "$@" >> {folder}/requeued ;;
esac
"""


def _submit(cluster: Cluster, folder: Path, *overrides: str) -> subprocess.Popen:
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        (commands / name).write_text(
            text.format(python=sys.executable, folder=folder, repository=REPOSITORY)
        )
        (commands / name).chmod(0o755)
    environment = {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "host1,host2",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "PROMOE_RANKS": "1",
        "VIRTUAL_ENV": sys.prefix,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    with (folder / "output").open("a") as output:
        return cluster.popen(
            "host1",
            "bash",
            "launch_scripts/slurm.sbatch",
            "digits_promoe",
            "ds_configs/zero2_fp32.json",
            str(folder / "run"),
            "--set",
            *TINY,
            "parallel.ep_size=2",
            *overrides,
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=output,
        )


def test_slurm_preempted_job_saves_is_requeued_and_resumes(two_hosts, tmp_path) -> None:
    job = _submit(two_hosts, tmp_path, "train.max_steps=100000", "train.checkpoint_every=100000")
    lines = tmp_path / "run/metrics.jsonl"
    wait_until(lambda: lines.is_file() and lines.read_text().count("\n") > 3, PATIENCE, "step 4")
    (script,) = [
        pid
        for pid, command in two_hosts.processes("host1", "launch_scripts/slurm.sbatch").items()
        if command.startswith("bash")
    ]
    os.kill(script, signal.SIGUSR1)
    assert job.wait(PATIENCE) == 75, (tmp_path / "output").read_text()
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    saved = read_manifest(list_checkpoints(tmp_path / "run/checkpoints")[0]).step
    assert saved > 3
    assert saved == len(lines.read_text().splitlines())
    assert [ranks(two_hosts, name) for name in two_hosts.addresses] == [[], []]

    # What the queue does then: the same script again; it ends by itself this time.
    job = _submit(
        two_hosts, tmp_path, f"train.max_steps={saved + 3}", "train.checkpoint_every=100000"
    )
    assert job.wait(PATIENCE) == 0, (tmp_path / "output").read_text()
    assert read_manifest(list_checkpoints(tmp_path / "run/checkpoints")[0]).step == saved + 3
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n", "a job that ended goes nowhere"
    assert two_hosts.processes("host2", RANK) == {}
