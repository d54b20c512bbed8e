"""Launch on several hosts and stay with the job: `python -m promoe_ds.cli.launch --hostfile H -- --recipe NAME ...`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from promoe_ds.cli.entry import run_entry
from promoe_ds.cli.train import parse_arguments as parse_train_arguments
from promoe_ds.config import plan_batches, read_deepspeed_json, resolve_deepspeed
from promoe_ds.errors import ConfigError, LaunchError, Preempted, PromoeError
from promoe_ds.launch.claim import TakenError
from promoe_ds.launch.heartbeat import LAUNCH_FOLDER, make_launch_folder
from promoe_ds.launch.hostfile import read_hostfile
from promoe_ds.launch.job import Job, run_job
from promoe_ds.launch.layout import full_layout
from promoe_ds.logs import configure_logging


def parse_arguments(arguments: Sequence[str], *, prog: str = "promoe_ds.cli.launch",
                    purpose: str = "Train on several hosts: deepspeed --hostfile, watched and, if asked, restarted.") -> Job:
    """Parse the command line for a command called `prog`; what follows `--` belongs to promoe_ds.cli.train.

    Raises: ConfigError or LaunchError for what cannot be a job, what every rank would refuse included.
    """
    parser = argparse.ArgumentParser(prog=prog, description=purpose)
    parser.add_argument("--hostfile", type=Path, required=True, help="one `NAME slots=N` a line")
    parser.add_argument("--max-restarts", type=int, default=0, help="restart so often, on fewer hosts if some stay dead")
    parser.add_argument("--host-wait", type=float, default=30.0, metavar="SECONDS", help="how long a restart waits for a dead host")
    parser.add_argument("--interface", default="", help="network interface that joins the hosts")
    parser.add_argument("--master-port", type=int, default=29500)
    parser.add_argument("training", nargs=argparse.REMAINDER, metavar="-- ...", help="arguments of promoe_ds.cli.train")
    options = parser.parse_args(arguments)
    training = options.training[options.training[:1] == ["--"]:]
    train = parse_train_arguments(training)
    if train.resume == "none" and options.max_restarts:
        raise ConfigError("--resume none would throw away what a restart shall go on from: leave it out or set --max-restarts 0")
    if options.max_restarts < 0:
        raise ConfigError(f"--max-restarts {options.max_restarts}: must be at least 0")
    if not 0 < options.master_port < 65536:
        raise LaunchError(f"--master-port {options.master_port}: must be from 1 to 65535")
    hosts = tuple(read_hostfile(options.hostfile))
    config = full_layout(train.recipe, train.overrides, hosts).config
    batches = plan_batches(config, sum(host.slots for host in hosts))
    resolve_deepspeed(read_deepspeed_json(train.deepspeed_config), config, batches, source=train.deepspeed_config)
    run_dir = train.run_dir or Path("runs") / config.name
    return Job(hosts=hosts, arguments=tuple(training), recipe=train.recipe,
               overrides=tuple(train.overrides), run_dir=run_dir, interface=options.interface, master_port=options.master_port,
               max_restarts=options.max_restarts, host_wait=options.host_wait)


def main(arguments: Sequence[str]) -> None:
    """Arguments to job to verdict."""
    configure_logging(0)
    job = parse_arguments(arguments)
    log_file = job.run_dir / LAUNCH_FOLDER / "launch.log"
    try:
        make_launch_folder(job.run_dir)
        configure_logging(0, log_file=log_file)
    except OSError as error:
        raise LaunchError(f"--run-dir {job.run_dir} cannot be made or written: {error.strerror}: mend its rights, or take another "
                          "directory") from None
    try:
        verdict = run_job(job)
    except TakenError:
        raise  # the log is the other launcher's
    except PromoeError as error:
        _note_end(log_file, error.exit_code, str(error))
        raise
    _note_end(log_file, verdict.code, verdict.message)
    if verdict.code == Preempted.exit_code:
        raise Preempted(verdict.message)
    if verdict.code != 0:
        error = LaunchError(verdict.message)
        error.exit_code = verdict.code
        raise error


def _note_end(log_file: Path, code: int, message: str) -> None:
    with log_file.open("a", encoding="utf-8") as file:
        file.write(f"ended with code {code}: {message}\n")


if __name__ == "__main__":
    run_entry(main)
