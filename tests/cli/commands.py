"""Running the project's commands as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ZERO2 = str(REPOSITORY / "ds_configs" / "zero2_fp32.json")
TINY = ("model.hidden_size=32", "model.depth=2", "model.num_heads=2", "train.global_batch_size=8", "train.log_every=1",
        "train.max_steps=4", "train.checkpoint_every=2", "logging.tensorboard=false")
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def run(*arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: int = 150) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES and not k.startswith("SLURM_")}
    environment.update({"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}", **(env or {})})
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def train_arguments(*overrides: str, run_dir: Path | str = "run", recipe: str = "digits_promoe",
                    config: str = ZERO2) -> tuple[str, ...]:
    """Return the arguments of the training entry."""
    return ("--recipe", recipe, "--deepspeed_config", config, "--run-dir", str(run_dir), "--set", *TINY, *overrides)


def train(*overrides: str, cwd: Path, **options: str) -> subprocess.CompletedProcess[str]:
    """Train in one process."""
    return run(sys.executable, "-m", "promoe_ds.cli.train", *train_arguments("parallel.ep_size=1", *overrides, **options), cwd=cwd)
