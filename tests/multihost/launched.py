"""A job under the project's launcher on a cluster, as a test sees it."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.jobs import TINY, metrics
from tests.processes import REPOSITORY, wait_until

from .cluster import Cluster

#: How long what is sure to come is waited for, on a machine with other work beside.
PATIENCE = 300.0
#: Every time-out of a fault; set-up takes its time on two cores.
TIMEOUT = 20
TIMEOUTS = (
    f"parallel.timeout_seconds={TIMEOUT}",
    f"supervision.step_timeout_seconds={TIMEOUT + 5}",
    f"supervision.checkpoint_timeout_seconds={TIMEOUT}",
    f"supervision.launcher_timeout_seconds={TIMEOUT}",
    "supervision.setup_timeout_seconds=120",
)
RANK, LAUNCHER = "promoe_ds.cli.train --local_rank", "deepspeed.launcher"


@dataclass
class Launched:
    """A running `promoe_ds.cli.launch` on host1."""

    cluster: Cluster
    run_dir: Path
    output: Path
    process: subprocess.Popen

    def wait_for_step(self, step: int, timeout: float = PATIENCE) -> None:
        """Return when step `step` is in metrics.jsonl."""
        wait_until(
            lambda: self.last_step() >= step or self.process.poll() is not None,
            timeout,
            f"step {step}: {self.log()}",
        )
        assert self.last_step() >= step, self.log()

    def last_step(self) -> int:
        """Return the newest step in metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def end(self, timeout: float = PATIENCE) -> int:
        """Wait for the launcher's end; return its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(
                f"the launcher did not end within {timeout} s: {self.log()}"
            ) from None

    def log(self) -> str:
        """Return what the launcher wrote, its ranks' output included."""
        return self.output.read_text()

    def launcher_log(self) -> str:
        """Return launch.log."""
        return (self.run_dir / "launch/launch.log").read_text()

    def losses(self) -> list[float]:
        """Return the losses of all steps, which must be 1, 2, 3, ..."""
        lines = metrics(self.run_dir)
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["loss"] for line in lines]

    def left(self, *names: str) -> dict[int, str]:
        """Return the job's processes that are left on hosts, by default on all."""
        found: dict[int, str] = {}
        for name in names or self.cluster.addresses:
            found |= self.cluster.processes(name, RANK) | self.cluster.processes(name, LAUNCHER)
        return found


def launch_command(
    program: str, hostfile: Path, run_dir: Path, *options: str, training: list[str]
) -> list[str]:
    """Return the command of `promoe_ds.cli.launch` or `preflight`."""
    start = [sys.executable, "-m", f"promoe_ds.cli.{program}", "--hostfile", str(hostfile)]
    recipe = ["--recipe", "digits_promoe", "--deepspeed_config", "ds_configs/zero2_fp32.json"]
    return [*start, *options, "--", *recipe, "--run-dir", str(run_dir), *training]


def launch(
    cluster: Cluster,
    folder: Path,
    slots: dict[str, int],
    *overrides: str,
    options: tuple[str, ...] = (),
    script: bool = False,
    run_dir: Path | None = None,
) -> Launched:
    """Start a job on host1 for the given hosts and slots, by multinode.sh if asked, and return at
    once.
    """
    folder.mkdir(exist_ok=True)
    (folder / "hosts").write_text(
        "".join(f"{name} slots={count}\n" for name, count in slots.items())
    )
    training = ["--set", *TINY, *TIMEOUTS, *overrides]
    run_dir = run_dir or folder / "run"
    if script:
        positional = (folder / "hosts", "digits_promoe", "ds_configs/zero2_fp32.json", run_dir)
        command = ["bash", "launch_scripts/multinode.sh", *map(str, positional)]
        command += [*options, "--", *training]
    else:
        command = launch_command("launch", folder / "hosts", run_dir, *options, training=training)
    with (folder / "output").open("w") as output:
        process = cluster.popen(
            "host1",
            *command,
            cwd=REPOSITORY,
            env={"VIRTUAL_ENV": sys.prefix},
            stdout=output,
            stderr=output,
        )
    return Launched(cluster, run_dir, folder / "output", process)


def launcher_process(job: Launched) -> int:
    """Return the process id of the launcher itself, inside nsenter and sh, on this machine."""
    (pid,) = [
        pid
        for pid, command in job.cluster.processes("host1", "promoe_ds.cli.launch").items()
        if "nsenter" not in command
    ]
    return pid


def ranks(cluster: Cluster, name: str) -> list[int]:
    """Return the rank processes of a host."""
    return [
        pid for pid, command in cluster.processes(name, RANK).items() if LAUNCHER not in command
    ]


KILL, TERM, FREEZE = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP
