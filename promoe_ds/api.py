"""What a notebook needs without a command line; `promoe_ds` has these names,
docs/reference/python.md lists them.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from promoe_ds.config import (
    DS_CONFIGS_DIR,
    DeepSpeedPlan,
    RunConfig,
    load_config,
    plan_batches,
    read_deepspeed_json,
    resolve_deepspeed,
)
from promoe_ds.config.parallel import ParallelConfig
from promoe_ds.distributed.launchers import read_place
from promoe_ds.errors import ConfigError
from promoe_ds.logs import configure_logging
from promoe_ds.reports.log import read_columns

if TYPE_CHECKING:
    from promoe_ds.distributed.context import DistributedContext
    from promoe_ds.training.supervisor import Supervisor


def train(
    recipe: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    run_dir: str | Path | None = None,
    deepspeed_config: str | Path = DS_CONFIGS_DIR / "zero0_fp32.json",
    resume: str = "auto",
) -> Path:
    """Train on this process, as `promoe-train` does; more processes need a launcher.

    Called again with the same run directory it resumes, and returns at once where nothing is left.
    An interrupt (Ctrl-C, the notebook's stop button) loses the steps since the last checkpoint.
    Args:
        recipe: name of a packaged recipe, or path of a .yaml file.
        overrides: values by dotted name, e.g. {"train.max_steps": 100}; one process has
            {"parallel.ep_size": 1}.
        run_dir: `runs/<recipe's name>` if left out.
        deepspeed_config: DeepSpeed JSON; ZeRO 0 in fp32 if left out, for one CPU process.
        resume: "auto", "none", or the path of a checkpoint, run, export or published .pth.
    Returns: the run directory.
    Raises: PromoeError of the kind that fits, e.g. ConfigError naming a field, value and remedy.
    """
    if (place := read_place(os.environ)).world_size > 1:
        raise ConfigError(
            f"promoe_ds.train trains on one process, a launcher started {place.world_size}: use"
            " --module promoe_ds.cli.train there"
        )
    from promoe_ds.versions import check_deepspeed

    check_deepspeed()
    given = (overrides or {}).items()
    settings = [f"{name}={json.dumps(value, default=str)}" for name, value in given]
    config = load_config(recipe, settings)
    values = read_deepspeed_json(deepspeed_config)
    plan = resolve_deepspeed(values, config, plan_batches(config, 1), source=str(deepspeed_config))
    folder = Path(run_dir or Path("runs") / config.name)

    from promoe_ds.distributed.process_group import complete_environment

    with _own_environment():
        complete_environment()
        try:
            run_training(config, plan, folder, _single_process(), resume=resume)
        finally:
            configure_logging(0)  # closes the run's train.log
    return folder


def run_training(
    config: RunConfig,
    plan: DeepSpeedPlan,
    run_dir: Path,
    context: DistributedContext,
    supervisor: Supervisor | None = None,
    *,
    resume: str,
    label_map: Path | None = None,
) -> None:
    """Train to the end; every rank of the process group calls this together.

    Args:
        supervisor: watches this rank, where something does.
        label_map: of a branch with other classes.
    Raises: PromoeError of the kind that fits.
    """
    from promoe_ds.training.run import Run, train

    evaluate = None
    if config.evaluation.every:
        from promoe_ds.evaluation.online import OnlineEvaluation

        evaluate = OnlineEvaluation(config, context)
    run = Run(
        config=config,
        deepspeed_plan=plan,
        run_dir=run_dir,
        resume=resume,
        label_map=label_map,
        evaluate=evaluate,
    )
    train(run, context, supervisor)


def read_routing(run_dir: str | Path) -> dict[str, np.ndarray]:
    """Read which experts a run's tokens went to, as columns; `pandas.DataFrame(columns)` works.

    A row is one expert of one layer at one noise level in one log interval. Repeated steps of a
    resumed run count once; experts keep the numbers that they had at the start of the run.
    Args:
        run_dir: directory of a run, or its routing.jsonl.
    Returns: arrays of one length: `step` (last of the interval), `steps` (that it covers), `layer`,
        `timestep_bin` of `timestep_bins`, `expert`, `tokens` (assignments), `gate_sum` (NaN if not
        logged), and of the whole layer and bin `conditional_tokens`, `unconditional_tokens`.
    Raises: DataError if there is no such file, or nothing in it.
    """
    return read_columns(Path(run_dir))


@functools.cache
def _single_process() -> DistributedContext:
    """Join a process group of one, for good: DeepSpeed keeps what it made of the first one."""
    from promoe_ds.backends.process_group import start_distributed
    from promoe_ds.distributed.process_group import stop_distributed

    atexit.register(stop_distributed)
    return start_distributed(ParallelConfig().timeout_seconds)


@contextmanager
def _own_environment() -> Iterator[None]:
    """Put the environment back: what a notebook starts next must not take itself for a rank."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
