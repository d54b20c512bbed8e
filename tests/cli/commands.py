"""Running the project's commands as a user does: in a fork that saves the imports, or in an
interpreter of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .. import processes
from ..processes import REPOSITORY, environment

ZERO2 = str(REPOSITORY / "ds_configs" / "zero2_fp32.json")
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
    *arguments: str,
    cwd: Path,
    env: dict[str, str] | None = None,
    timeout: int = 300,
    fork: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end; `python -m MODULE` and `python SCRIPT` in a fork unless
    fork=False.
    """
    if (
        fork
        and arguments[0] == sys.executable
        and (arguments[1] == "-m" or arguments[1].endswith(".py"))
    ):
        return processes.run_python(
            arguments[1:], cwd=cwd, env=environment(**(env or {})), timeout=timeout
        )
    return processes.run(arguments, cwd=cwd, env=environment(**(env or {})), timeout=timeout)


def train_arguments(
    *overrides: str, run_dir: Path | str = "run", recipe: str = "digits_promoe", config: str = ZERO2
) -> tuple[str, ...]:
    """Return the arguments of the training entry."""
    return (
        "--recipe",
        recipe,
        "--deepspeed_config",
        config,
        "--run-dir",
        str(run_dir),
        "--set",
        *TINY,
        *overrides,
    )


def train(
    *overrides: str, cwd: Path, fork: bool = True, **options: str
) -> subprocess.CompletedProcess[str]:
    """Train in one process."""
    return run(
        sys.executable,
        "-m",
        "promoe_ds.cli.train",
        *train_arguments("parallel.ep_size=1", *overrides, **options),
        cwd=cwd,
        fork=fork,
    )
