"""Training and judging in child processes, some at a time, with one progress bar over all."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from promoe_ds.config import RunConfig
from promoe_ds.errors import PromoeError
from promoe_ds.logs import get_logger
from promoe_ds.reports.comparison.candidates import Candidate, ComparisonRequest
from promoe_ds.reports.comparison.results import SCHEMA_VERSION, collect_result, write_json

_LOG = get_logger("compare")
_POLL_SECONDS = 0.5
#: torchrun's agent ends its workers itself when it is terminated; killing it sooner would leave
# them behind.
_GRACE_SECONDS = 40.0
_TAIL_BYTES = 4096
#: Variables of a launcher or a batch job around the comparison: they do not describe the runs
# inside it.
_LAUNCH_VARIABLES = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|(SLURM|TORCHELASTIC)_.*"
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
        config = self.candidate.config
        return config.model_copy(
            update={"train": config.train.model_copy(update={"seed": self.seed})}
        )


class RunFailure(Exception):  # noqa: N818 - it is reported and counted, the other runs continue
    """Why one run has no result, on one line."""


class Children:
    """The processes under way; after `stop` no other starts."""

    def __init__(self, inherited: Sequence[int] = ()) -> None:
        """Prepare.

        Args:
            inherited: file descriptors that every child keeps open.
        """
        self._inherited = tuple(inherited)
        self._lock, self._stopped = threading.Lock(), False
        self._processes: list[subprocess.Popen] = []
        self._environment = {
            k: v for k, v in os.environ.items() if not _LAUNCH_VARIABLES.fullmatch(k)
        } | {"OMP_NUM_THREADS": "1"}

    def run(self, command: Sequence[str], log_file: Path) -> int:
        """Run a command to its end, its output appended to `log_file`; return its exit code,
        negative for a signal.
        """
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as log, self._lock:
            if self._stopped:
                raise RunFailure("interrupted")
            # A session of its own: ctrl-C reaches us alone, and we end the child with all that it
            # started.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                pass_fds=self._inherited,
            )
            self._processes.append(process)
        return process.wait()

    def stop(self) -> None:
        """End all processes, politely first, and let no other start."""
        with self._lock:
            self._stopped = True
        running = [process for process in self._processes if process.poll() is None]
        for process in running:
            _signal(process, signal.SIGTERM)
        for process in running:
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass  # it ended by itself


def train_command(run: PlannedRun, request: ComparisonRequest) -> list[str]:
    """Return the command that trains a run, or resumes it from its newest checkpoint."""
    launcher = (
        []
        if request.ranks == 1
        else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(request.ranks)]
    )
    return [
        sys.executable,
        *launcher,
        "-m",
        "promoe_ds.cli.train",
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
    return [
        sys.executable,
        "-m",
        "promoe_ds.reports.comparison.judge",
        str(run.run_dir),
        "--samples",
        str(request.samples),
        "--sample-seed",
        str(request.sample_seed),
    ]


def do_run(
    run: PlannedRun, request: ComparisonRequest, children: Children, environment: dict[str, Any]
) -> None:
    """Train and judge one run and write its result.json.

    Raises: RunFailure.
    """
    for part, command in (
        ("training", train_command(run, request)),
        ("judging", judge_command(run, request)),
    ):
        start = run.log_file.stat().st_size if run.log_file.is_file() else 0
        if code := children.run(command, run.log_file):
            output = (
                run.log_file.read_bytes()[start:].decode("utf-8", errors="replace").splitlines()
            )
            errors = [line.removeprefix("error: ") for line in output if line.startswith("error: ")]
            reason = f" ({errors[-1]})" if errors else ""
            raise RunFailure(f"{part} ended with exit code {code}{reason}; log: {run.log_file}")
    try:
        write_json(
            run.result_file,
            {
                "schema": SCHEMA_VERSION,
                "contender": run.candidate.name,
                "seed": run.seed,
                "config": run.config.model_dump(mode="json"),
                "samples": request.samples,
                "sample_seed": request.sample_seed,
                "environment": environment,
                **collect_result(run.run_dir, run.config),
            },
        )
    except (PromoeError, OSError) as error:
        raise RunFailure(f"{error}; log: {run.log_file}") from None


def do_all(
    runs: Sequence[PlannedRun],
    request: ComparisonRequest,
    children: Children,
    environment: dict[str, Any],
    after_each: Callable[[dict[PlannedRun, str]], None],
) -> dict[PlannedRun, str]:
    """Do the runs that have no result yet, `request.jobs` at a time; return why those that failed
    did.

    Args:
        after_each: called with the failures so far whenever a run ended.
    """
    missing = [run for run in runs if not run.result_file.is_file()]
    failures: dict[PlannedRun, str] = {}
    _LOG.info("runs: %d, of which %d to do, %d at a time", len(runs), len(missing), request.jobs)
    with (
        ThreadPoolExecutor(max_workers=request.jobs) as pool,
        tqdm(
            total=len(runs) * request.steps,
            initial=(len(runs) - len(missing)) * request.steps,
            unit="step",
            disable=None,
            dynamic_ncols=True,
        ) as bar,
    ):
        futures = {pool.submit(do_run, run, request, children, environment): run for run in missing}
        pending: set[Future] = set(futures)
        try:
            while pending:
                finished, pending = wait(
                    pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED
                )
                for future in finished:
                    _report(futures[future], future, failures)
                    after_each(failures)
                if not bar.disable:
                    _show_progress(
                        bar,
                        runs,
                        {futures[future] for future in pending if future.running()},
                        request.steps,
                    )
        except BaseException:
            for future in pending:
                future.cancel()
            children.stop()
            raise
    return failures


def _report(run: PlannedRun, future: Future, failures: dict[PlannedRun, str]) -> None:
    error = future.exception()
    if error is not None and not isinstance(error, RunFailure):
        raise error
    with tqdm.external_write_mode():
        if error is None:
            _LOG.info("%s: trained and judged", run.label)
        else:
            failures[run] = str(error)
            _LOG.error("%s: %s", run.label, error)


def _show_progress(
    bar: tqdm, runs: Sequence[PlannedRun], running: set[PlannedRun], steps: int
) -> None:
    lines = {run: newest_line(run.run_dir / "metrics.jsonl") or {"step": 0} for run in runs}
    bar.n = sum(min(steps, line["step"]) for line in lines.values())
    stages = {
        run: (
            "starting"
            if not line["step"]
            else (
                "judging"
                if line["step"] >= steps
                else f"{line['loss_diffusion']:.3f}"
                if line.get("loss_diffusion")
                else "not finite"
            )
        )
        for run, line in lines.items()
    }
    bar.set_postfix_str(
        "  ".join(
            f"{run.candidate.name}/{run.seed} {stages[run]}" for run in runs if run in running
        )
    )


def newest_line(path: Path) -> dict[str, Any] | None:
    """Return the last whole line of a growing JSON-lines file, None if there is none yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            complete = file.read().rpartition(b"\n")[0]
        return json.loads(complete.rpartition(b"\n")[2])
    except (OSError, ValueError):
        return None
