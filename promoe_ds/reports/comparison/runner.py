"""Training and judging in child processes, some at a time, with one progress line over all."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promoe_ds.config import RunConfig, change_config
from promoe_ds.errors import PromoeError, TrainingError
from promoe_ds.files import write_json
from promoe_ds.logs import Progress, get_logger
from promoe_ds.reports.comparison.candidates import Candidate, ComparisonRequest
from promoe_ds.reports.comparison.results import SCHEMA_VERSION, collect_result
from promoe_ds.reports.records import Metrics, read_lines

_LOG = get_logger("compare")
_POLL_SECONDS = 0.5
#: torchrun's agent ends its workers itself when it is terminated; killing it sooner would leave
#: them behind.
_GRACE_SECONDS = 40.0
_TAIL_BYTES = 4096
#: Variables of a launcher or a batch job around the comparison: they do not describe the runs
#: inside it.
_LAUNCH_VARIABLES = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT"
    r"|(SLURM|TORCHELASTIC|PMIX?|PALS|(OMPI|MV2|MVP)_COMM_WORLD)_.*|MPI_LOCAL.*"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedRun:
    """One candidate with one seed, and where it is. Equal to itself alone, so that it can be a
    key.
    """

    candidate: Candidate
    seed: int
    root: Path

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.candidate.name}, seed {self.seed}"

    @property
    def run_dir(self) -> Path:
        """Its run directory."""
        return self.root / "runs" / f"{self.candidate.name}-seed{self.seed}"

    @property
    def result_file(self) -> Path:
        """What is there once the run is judged."""
        return self.run_dir / "result.json"

    @property
    def log_file(self) -> Path:
        """Its processes' output; not in the run directory, which the training wants to find
        empty.
        """
        return self.root / "logs" / f"{self.run_dir.name}.log"

    @property
    def config(self) -> RunConfig:
        """Its config, with its seed."""
        return change_config(self.candidate.config, train={"seed": self.seed})


def train_command(run: PlannedRun, request: ComparisonRequest) -> list[str]:
    """Return the command that trains a run, or resumes it from its newest checkpoint."""
    ranks = str(request.ranks)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    return [
        sys.executable,
        *(launcher if request.ranks > 1 else []),
        "-m",
        "promoe_ds.cli.train",
        *(part for name in request.imports for part in ("--import", name)),
        "--recipe",
        run.candidate.recipe,
        "--deepspeed_config",
        str(request.deepspeed_config),
        "--run-dir",
        str(run.run_dir),
        "--resume",
        "auto",
        "--set",
        *run.candidate.overrides,
        f"train.seed={run.seed}",
    ]


def judge_command(run: PlannedRun, request: ComparisonRequest) -> list[str]:
    """Return the command that converts, samples and judges a trained run."""
    numbers = str(request.samples), str(request.sample_seed)
    module = "promoe_ds.reports.comparison.judge"
    return [sys.executable, "-m", module, str(run.run_dir), *numbers, *request.imports]


#: What is done of each run, one after the other, each in a process of its own.
PARTS = {"training": train_command, "judging": judge_command}


def do_run(
    run: PlannedRun,
    request: ComparisonRequest,
    environment: dict[str, Any],
    inherited: Sequence[int],
) -> Iterator[subprocess.Popen]:
    """Train and judge one run and write its result.json; yield each process, to be continued when
    it has ended.

    Args:
        environment: what the result is made under; inherited: file descriptors that every process
        keeps open.
    Raises: TrainingError saying on one line why the run has no result.
    """
    for part, command in PARTS.items():
        process, start = _start(command(run, request), run.log_file, inherited)
        yield process
        if process.returncode:
            output = run.log_file.read_bytes()[start:].decode("utf-8", errors="replace")
            errors = re.findall(r"^error: (.*)$", output, re.MULTILINE)
            reason = f" ({errors[-1]})" if errors else ""
            raise TrainingError(
                f"{part} ended with exit code {process.returncode}{reason}; log: {run.log_file}"
            )
    try:
        result = {
            "schema": SCHEMA_VERSION,
            "contender": run.candidate.name,
            "seed": run.seed,
            "config": run.config.model_dump(mode="json"),
            "samples": request.samples,
            "sample_seed": request.sample_seed,
            "environment": environment,
            **collect_result(run.run_dir, run.config),
        }
        write_json(run.result_file, result)
    except (PromoeError, OSError) as error:
        raise TrainingError(f"{error}; log: {run.log_file}") from None


def _start(
    command: Sequence[str], log_file: Path, inherited: Sequence[int]
) -> tuple[subprocess.Popen, int]:
    """Start a process whose output is appended to `log_file`; return it and where that begins."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    ours = {
        name: value for name, value in os.environ.items() if not _LAUNCH_VARIABLES.fullmatch(name)
    }
    with log_file.open("ab") as log:
        start = log.tell()
        # A session of its own: Ctrl-C reaches us alone, and we end the child with all that it
        # started.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=ours | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
            pass_fds=inherited,
        )
        return process, start


def stop(processes: Iterable[subprocess.Popen]) -> None:
    """End processes and all that they started, politely first."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    for process in running:
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def do_all(
    runs: Sequence[PlannedRun],
    request: ComparisonRequest,
    environment: dict[str, Any],
    after_each: Callable[[dict[PlannedRun, str]], None],
    *,
    inherited: Sequence[int] = (),
) -> dict[PlannedRun, str]:
    """Do the runs that have no result yet, `request.jobs` at a time; return why those that failed
    did.

    Args:
        after_each: called with the failures so far whenever a run ended; environment, inherited: as
        of `do_run`.
    """
    left = {
        run: do_run(run, request, environment, inherited)
        for run in runs
        if not run.result_file.is_file()
    }
    failures: dict[PlannedRun, str] = {}
    running: dict[PlannedRun, subprocess.Popen] = {}
    missing, done = list(left), sum(_reached(run, request)[0] for run in left)
    _LOG.info("runs: %d, of which %d to do, %d at a time", len(runs), len(missing), request.jobs)
    progress = Progress(_LOG, len(missing) * request.steps - done, "steps")
    try:
        while left:
            for run in list(left)[: request.jobs]:
                if run in running and running[run].poll() is None:
                    continue
                try:
                    running[run] = next(left[run])
                    continue
                except StopIteration:
                    _LOG.info("%s: trained and judged", run.label)
                except TrainingError as error:
                    failures[run] = str(error)
                    _LOG.error("%s: %s", run.label, error)
                del left[run], running[run]
                after_each(failures)
            before, done = done, sum(_reached(run, request)[0] for run in missing)
            progress.add(done - before, "  ".join(_reached(run, request)[1] for run in running))
            time.sleep(_POLL_SECONDS if left else 0)
    finally:
        stop(running.values())
    return failures


def _reached(run: PlannedRun, request: ComparisonRequest) -> tuple[int, str]:
    """Return the steps that a run has done, and its name with its stage or newest loss."""
    line, name = newest_line(run.run_dir / "metrics.jsonl"), f"{run.candidate.name}/{run.seed}"
    if line is None:
        return 0, f"{name} starting"
    if line.step >= request.steps:
        return request.steps, f"{name} judging"
    loss = "not finite" if line.loss_diffusion is None else f"{line.loss_diffusion:.3f}"
    return line.step, f"{name} {loss}"


def newest_line(path: Path) -> Metrics | None:
    """Return the last whole line of a growing metrics.jsonl, None if there is none yet."""
    if not path.is_file():
        return None
    start = max(0, path.stat().st_size - _TAIL_BYTES)
    return next(reversed([line for *_, line, _ in read_lines(path, start, Metrics) if line]), None)
