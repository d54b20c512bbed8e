"""Running the project's commands as a user does: in a fork that saves the imports, or in an
interpreter of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .. import processes
from ..processes import REPOSITORY, environment

ZERO2 = str(REPOSITORY / "ds_configs" / "zero2_fp32.json")
#: Two ranks on this host.
TWO = ("torchrun", "--standalone", "--nproc-per-node=2", "-m")
TINY = (
    "model.hidden_size=32",
    "model.depth=2",
    "model.num_heads=2",
    "train.global_batch_size=8",
    "train.log_every=1",
    "train.max_steps=4",
    "train.checkpoint_every=2",
    "logging.tensorboard=false",
)


def run(
    *arguments: str, cwd: Path, timeout: int = 300, fork: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end; `python -m MODULE` and `python SCRIPT` in a fork unless
    fork=False.
    """
    env = environment(**variables)
    python = arguments[0] == sys.executable and arguments[1].endswith(("-m", ".py"))
    if fork and python:
        return processes.run_python(arguments[1:], cwd=cwd, env=env, timeout=timeout)
    return processes.run(arguments, cwd=cwd, env=env, timeout=timeout)


def tool(name: str, *arguments: str, cwd: Path, **how) -> subprocess.CompletedProcess[str]:
    """Run a script of `tools/`."""
    return run(sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *arguments, cwd=cwd, **how)


def module(name: str, *arguments: str, cwd: Path, **how) -> subprocess.CompletedProcess[str]:
    """Run a module of `promoe_ds.cli`."""
    return run(sys.executable, "-m", f"promoe_ds.cli.{name}", *arguments, cwd=cwd, **how)


def train_arguments(
    *overrides: str, run_dir: Path | str = "run", recipe: str = "digits_promoe", config: str = ZERO2
) -> tuple[str, ...]:
    """Return the arguments of the training entry."""
    files = ("--recipe", recipe, "--deepspeed-config", config, "--run-dir", str(run_dir))
    return (*files, "--set", *TINY, *overrides)


def train(
    *overrides: str, cwd: Path, fork: bool = True, **options: str
) -> subprocess.CompletedProcess[str]:
    """Train in one process."""
    arguments = train_arguments("parallel.ep_size=1", *overrides, **options)
    return module("train", *arguments, cwd=cwd, fork=fork)


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    """Require that a command ended well; return what it printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def check_refused(done: subprocess.CompletedProcess[str], expected: str, code: int) -> None:
    """Require that a command ended with this code and one message that says this."""
    assert done.returncode == code, done.stderr
    assert expected in done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


def losses(run_dir: Path) -> list[float]:
    """Return the loss of every line of a run's log."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
