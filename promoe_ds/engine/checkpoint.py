"""Resuming: from the newest complete checkpoint, exactly, or an error that says why not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from promoe_ds.config import RunConfig
from promoe_ds.engine.distributed import Ranks, from_main, gather_objects, on_all_ranks
from promoe_ds.engine.elastic import load_resharded, saved_averages
from promoe_ds.engine.expert_order import moves_experts
from promoe_ds.engine.manifest import (
    find_checkpoint,
    find_problems,
    list_checkpoints,
    list_unfinished,
    read_manifest,
    step_of,
)
from promoe_ds.engine.saving import layout_of
from promoe_ds.engine.session import Session
from promoe_ds.errors import CheckpointError
from promoe_ds.logs import get_logger

_LOG = get_logger("checkpoint")

#: Longer values are cut in messages.
_LONGEST_VALUE = 60

#: What a resumed run may change: nothing that would make it another run.
FREE_FIELDS = {
    "data": {"path", "vae", "workers", "max_corrupt"},
    "train": {"max_steps", "stop_after_steps", "log_every", "checkpoint_every", "keep_last", "keep_every",
              "async_checkpoint", "max_nonfinite_steps", "micro_batch_size"},
    "parallel": {"activation_checkpointing", "timeout_seconds", "expert_backend", "ep_size", "dispatch", "megatron_dispatcher",
                 "exchange_dtype", "expert_groups", "compile", "expert_placement", "expert_order"},
    "precision": {"compute", "fp8_recipe", "kernels"},
    "supervision": {"setup_timeout_seconds", "step_timeout_seconds", "checkpoint_timeout_seconds", "evaluation_timeout_seconds",
                    "launcher_timeout_seconds"},
    "logging": {"tensorboard", "wandb", "wandb_project", "timestep_bins", "class_counts", "position_counts", "counts_every"},
    "sampling": {"steps", "cfg_scale", "solver"},
    "evaluation": {"every", "reference", "extractor", "samples", "batch_size", "steps", "cfg_scale", "seed"},
}


def choose_checkpoint(request: str, run_dir: Path, ranks: Ranks) -> Path | None:
    """Resolve `--resume`: return the checkpoint to load, None to start from step 0; all ranks call this together.

    Args:
        request: "none", "auto" (newest complete one of this run) or the path of a checkpoint or of a run directory.
    Raises: CheckpointError if an explicit path has no sound checkpoint, or if this run has checkpoints of which none is
        sound: nobody wants a fresh start then.
    """
    if request == "none":
        return None
    if request != "auto":
        return _choose_explicit(Path(request), ranks)
    root = run_dir / "checkpoints"
    skipped = [f"{path} (the save never ended)" for path in from_main(list_unfinished(root))]
    candidates = from_main(list_checkpoints(root))
    chosen, problems = _newest_sound(candidates, ranks)
    skipped += problems
    for line in skipped if ranks.is_main else ():
        _LOG.warning("resume: skipped %s", line)
    if chosen is None and candidates:
        raise CheckpointError(f"--resume auto: none of the checkpoints under {root} is sound: {'; '.join(problems)}. Restore "
                              "one, name another with --resume DIR, or start anew in another --run-dir")
    _LOG.info("resume: %s", f"taking {chosen}" if chosen else f"no checkpoint under {root}, starting from step 0")
    return chosen


def _choose_explicit(path: Path, ranks: Ranks) -> Path:
    found = from_main(_try_find(path))
    if isinstance(found, str):
        raise CheckpointError(f"--resume {found}")
    if problems := _problems(found, ranks):
        raise CheckpointError(f"--resume {path}: {'; '.join(problems)}")
    _LOG.info("resume: taking %s", found)
    return found


def _try_find(path: Path) -> Path | str:
    try:
        return find_checkpoint(path)
    except CheckpointError as error:
        return str(error)


def _newest_sound(candidates: list[Path], ranks: Ranks) -> tuple[Path | None, list[str]]:
    skipped: list[str] = []
    for candidate in candidates:
        problems = _problems(candidate, ranks)
        if not problems:
            return candidate, skipped
        skipped.append("; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else ""))
    return None, skipped


def _problems(folder: Path, ranks: Ranks) -> list[str]:
    """Verify a checkpoint, each rank a share of its files; return the same list on all ranks."""
    try:
        files = read_manifest(folder).files
        mine = dict(sorted(files.items())[ranks.rank::ranks.world_size])
        problems = find_problems(folder, mine)
    except CheckpointError as error:
        problems = [str(error)]
    gathered = [line for lines in gather_objects(problems) for line in lines]
    return list(dict.fromkeys(gathered))


def load_checkpoint(session: Session, folder: Path, *, same_run: bool) -> None:
    """Load a sound checkpoint into the session; all ranks call this together.

    Args:
        same_run: whether it must be this very run's (`--resume auto`): then only FREE_FIELDS may differ. Otherwise only the
            architecture must agree.
    Another layout (ranks, expert parallelism, ZeRO stage, precision, order) is resharded; the same is loaded by DeepSpeed itself.
    Raises: CheckpointError naming the fields that do not fit.
    """
    manifest = read_manifest(folder)
    differing = differing_fields(manifest.config, session.config, architecture_only=not same_run)
    if differing:
        kind = "another run" if same_run else "another architecture"
        raise CheckpointError(f"{folder} belongs to {kind}: {'; '.join(differing)}")
    train = manifest.config["train"]
    before = train["micro_batch_size"] or train["global_batch_size"] // manifest.layout.world_size
    if session.ranks.is_main and before != session.batches.micro_batch:
        _LOG.warning("resume: the micro-batch was %d and is %d: losses and choices taken over a pass change with it "
                     "(docs/methods.md)", before, session.batches.micro_batch)
    layout = layout_of(session)
    same_averages = saved_averages(manifest) == list(session.optimizer.averages)
    if layout == manifest.layout and same_averages and not moves_experts(manifest, session.config):
        on_all_ranks(lambda: _load_as_it_is(session, folder))
    else:
        _LOG.info("resume: resharding, from %s to %s", manifest.layout, layout)
        load_resharded(session, folder, manifest)
        session.engine.global_steps, session.engine.global_samples = manifest.step, manifest.samples_seen
    session.step, session.samples_seen = manifest.step, manifest.samples_seen
    kept = {name: step for name, step in manifest.averages_since.items() if name in session.optimizer.averages}
    session.optimizer.averages_since |= kept


def _load_as_it_is(session: Session, folder: Path) -> None:
    loaded, _ = session.engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise CheckpointError(f"{folder}: DeepSpeed found nothing to load there")


def set_later_aside(root: Path, step: int) -> None:
    """Rename a run's checkpoints of steps after `step`: the run goes on from there, they are another branch's. Rank 0 only."""
    for folder in list_checkpoints(root):
        if step_of(folder) > step:
            aside = folder.with_name(f"{folder.name}.abandoned")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            _LOG.warning("resume: the run goes on from step %d; %s is set aside as %s", step, folder, aside.name)


def differing_fields(saved: dict[str, Any], config: RunConfig, *, architecture_only: bool) -> list[str]:
    """Return `field=saved here=current` for every field that must agree and does not."""
    current = config.model_dump(mode="json")
    architecture = {"model": current["model"].keys(), "routing": (
        "method", "moe_blocks", "num_experts", "num_shared_experts", "num_unconditional_experts", "expert_width",
        "shared_expert_width", "expert_type", "shared_expert_type", "per_layer_weight")}
    lines = []
    for section, fields in current.items():
        if not isinstance(fields, dict) or (architecture_only and section not in architecture):
            continue
        defaults = type(getattr(config, section)).model_fields
        for name, value in fields.items():
            must_agree = name in architecture[section] if architecture_only else name not in FREE_FIELDS.get(section, ())
            # A field younger than the checkpoint: what was then done is the default now.
            before = saved.get(section, {}).get(name, _as_json(defaults[name].default))
            if architecture_only and name == "per_layer_weight":
                before, value = bool(before), bool(value)  # whether there is a head, not its weight
            if must_agree and name != "preset" and before != value:
                lines.append(f"{section}.{name} is {_shown(before)} there and {_shown(value)} here")
    return lines


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
