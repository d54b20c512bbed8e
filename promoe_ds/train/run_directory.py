"""The run directory: made for a run, or recognised as this run's."""

from __future__ import annotations

from pathlib import Path

import yaml

from promoe_ds.checkpoint.load import differing_fields
from promoe_ds.checkpoint.manifest import list_checkpoints
from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.distributed.context import Ranks, from_main
from promoe_ds.errors import CheckpointError, PromoeError
from promoe_ds.launch.heartbeat import DUMP_FOLDER, LAUNCH_FOLDER


def open_run_directory(run_dir: Path, config: RunConfig, context: Ranks, *, resume: str) -> None:
    """Create the run directory with `config.yaml`, or check that it is this run's; all ranks call this together.

    Raises: CheckpointError, the same on every rank, if the directory is another run's or cannot be written.
    """
    problem: PromoeError | None = None
    if context.is_main:
        try:
            _open(run_dir, config, resume)
        except PromoeError as error:
            problem = error
        except OSError as error:
            problem = CheckpointError(f"--run-dir {run_dir}: {error}")
    if (problem := from_main(problem)) is not None:
        raise problem


def _open(run_dir: Path, config: RunConfig, resume: str) -> None:
    saved = run_dir / "config.yaml"
    started = (run_dir / "metrics.jsonl").exists() or list_checkpoints(run_dir / "checkpoints")
    if saved.is_file() and started:
        if resume == "none":
            raise CheckpointError(f"--run-dir {run_dir} already holds a run and --resume none would overwrite it: use "
                                  "--resume auto to continue it, or another directory")
        differing = differing_fields(_read_saved(saved).model_dump(mode="json"), config, architecture_only=False)
        if differing:
            raise CheckpointError(f"--run-dir {run_dir} already holds another run: {'; '.join(differing)}. To continue "
                                  f"it with other settings, branch: --resume {run_dir} --run-dir NEW")
    elif not saved.is_file() and run_dir.is_dir() and {p.name for p in run_dir.iterdir()} - {LAUNCH_FOLDER, DUMP_FOLDER}:
        raise CheckpointError(f"--run-dir {run_dir} is not empty and holds no run of this package: use another directory")
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    temporary = saved.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    temporary.replace(saved)


def _read_saved(path: Path) -> RunConfig:
    try:
        return config_from_dict(yaml.safe_load(path.read_text(encoding="utf-8")), source=str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): restore it from a checkpoint's manifest.json") from None
