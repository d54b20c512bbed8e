"""Check several hosts, train on them by deepspeed --hostfile, watch the job, restart it.

    promoe-launch --hostfile hosts -- --recipe promoe_b \\
        --deepspeed_config ds_configs/zero2_bf16.json
    promoe-launch --hostfile hosts --check-only -- --recipe promoe_b --deepspeed_config ...

promoe-preflight is promoe-launch --check-only. What follows -- goes to promoe-train.
"""

import argparse
import os
import sys
from pathlib import Path

from promoe_ds.cli.entry import command
from promoe_ds.cli.options import Parser, number
from promoe_ds.cli.train import parse_arguments as parse_train_arguments
from promoe_ds.config import load_config, plan_batches, read_deepspeed_json, resolve_deepspeed
from promoe_ds.errors import ConfigError, LaunchError, Preempted, PromoeError
from promoe_ds.launch.environment import job_environment
from promoe_ds.launch.hostfile import read_hostfile
from promoe_ds.launch.job import run_job
from promoe_ds.launch.layout import Job
from promoe_ds.launch.lock import LockedError
from promoe_ds.launch.preflight import check_hosts
from promoe_ds.logs import configure_logging
from promoe_ds.run_files import LAUNCH_FOLDER, make_folder


def parse_arguments(arguments: list[str]) -> tuple[Job, bool]:
    """Parse the command line; return the job, and whether to check its hosts only.

    What follows `--` belongs to promoe_ds.cli.train.
    Raises: ConfigError or LaunchError for what cannot be a job, or what every rank would refuse.
    """
    parser = Parser(__doc__, "promoe-launch")
    add = parser.add_argument
    add("--hostfile", type=Path, required=True, help="one `NAME slots=N` a line")
    add("--check-only", action="store_true", help="check every host, and exit")
    add(
        "--max-restarts",
        type=number(ge=0),
        default=0,
        help="how many times to restart, on fewer hosts if some stay dead",
    )
    add(
        "--host-wait",
        type=number(float, ge=0),
        default=30.0,
        metavar="SECONDS",
        help="how long a restart waits for a dead host",
    )
    add("--interface", default="", help="network interface that joins the hosts")
    add("--master-port", type=number(gt=0, lt=65536), default=29500)
    add(
        "training",
        nargs=argparse.REMAINDER,
        metavar="-- ...",
        help="arguments of promoe-train",
    )
    options = parser.parse_args(arguments)
    training = options.training[options.training[:1] == ["--"] :]
    return _job(options, training, parse_train_arguments(training)), options.check_only


def _job(options: argparse.Namespace, training: list[str], train: argparse.Namespace) -> Job:
    if train.resume == "none" and options.max_restarts:
        raise ConfigError(
            "--resume none discards what a restart resumes from: omit it, or set --max-restarts 0"
        )
    hosts = tuple(read_hostfile(options.hostfile))
    config = load_config(train.recipe, train.overrides)
    batches = plan_batches(config, sum(host.slots for host in hosts))
    deepspeed = read_deepspeed_json(train.deepspeed_config)
    resolve_deepspeed(deepspeed, config, batches, source=train.deepspeed_config)
    return Job(
        hosts=hosts,
        arguments=tuple(training),
        recipe=train.recipe,
        overrides=tuple(train.overrides),
        deepspeed_config=train.deepspeed_config,
        config=config,
        run_dir=train.run_dir or Path("runs") / config.name,
        imports=tuple(train.imports),
        interface=options.interface,
        master_port=options.master_port,
        max_restarts=options.max_restarts,
        host_wait=options.host_wait,
    )


def main(arguments: list[str]) -> None:
    """Check the hosts, run the job; its failure is the error."""
    configure_logging(0)
    job, check_only = parse_arguments(arguments)
    try:
        folder = make_folder(job.run_dir, LAUNCH_FOLDER)
        if check_only:
            check_hosts(job, job_environment(os.environ))
            sys.stdout.write(f"pre-flight: {len(job.hosts)} hosts, {job.ranks} ranks: no problem\n")
        else:
            _run(job, folder / "launch.log")
    except OSError as error:
        raise LaunchError(
            f"--run-dir {job.run_dir} cannot be made or written ({error}): correct its rights, or "
            "use another directory"
        ) from None


def _run(job: Job, log_file: Path) -> None:
    configure_logging(0, log_file=log_file)
    try:
        report = run_job(job)
        code, message = report.code, report.message
    except LockedError:
        raise  # the log is the other launcher's
    except PromoeError as error:
        code, message = error.exit_code, str(error)
    with log_file.open("a", encoding="utf-8") as file:
        file.write(f"ended with code {code}: {message}\n")
    if code:
        failure = (Preempted if code == Preempted.exit_code else LaunchError)(message)
        failure.exit_code = code
        raise failure


run = command(main)

if __name__ == "__main__":
    run()
