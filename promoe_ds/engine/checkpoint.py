"""Saving and resuming: a checkpoint is complete or ignored, a resume exact or an error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from promoe_ds.config import DeepSpeedPlan, RunConfig
from promoe_ds.engine.distributed import Ranks, from_main, gather_objects, on_all_ranks
from promoe_ds.engine.elastic import load_resharded
from promoe_ds.engine.manifest import (
    MANIFEST,
    UNFINISHED,
    Layout,
    Manifest,
    find_checkpoint,
    find_problems,
    list_checkpoints,
    list_unfinished,
    read_manifest,
    step_folder,
)
from promoe_ds.engine.session import Session
from promoe_ds.engine.storage import RecordingStorage
from promoe_ds.engine.versions import package_versions
from promoe_ds.errors import CheckpointError
from promoe_ds.logs import get_logger

_LOG = get_logger("checkpoint")

#: Longer values are cut in messages.
_LONGEST_VALUE = 60

#: What a resumed run may change: nothing that would make it another run.
FREE_FIELDS = {
    "data": {"path", "vae", "workers", "max_corrupt"},
    "train": {"max_steps", "stop_after_steps", "log_every", "checkpoint_every", "keep_last", "max_nonfinite_steps",
              "micro_batch_size"},
    "parallel": {"activation_checkpointing", "timeout_seconds", "expert_backend", "ep_size", "dispatch"},
    "logging": {"tensorboard", "timestep_bins"},
    "sampling": {"steps", "cfg_scale", "solver"},
    "evaluation": {"every", "reference", "extractor", "samples", "batch_size", "steps", "cfg_scale", "seed"},
}


def layout_of(config: RunConfig, plan: DeepSpeedPlan, world_size: int) -> Layout:
    """Return the layout that a run's checkpoints have."""
    return Layout(world_size=world_size, ep_size=config.parallel.ep_size, dispatch=config.parallel.resolved_dispatch,
                  zero_stage=plan.zero_stage, precision=plan.precision,
                  data_before_expert=bool(plan.json.get("use_data_before_expert_parallelism", False)))


def save_checkpoint(session: Session, root: Path) -> Path:
    """Write the session's state; all ranks call this together.

    Order: shards into `step_N.tmp`, manifest, rename to `step_N`, `latest`, then old checkpoints beyond keep_last go.
    Raises: CheckpointError on every rank if any rank could not write; what was complete before stays so.
    """
    final = root / step_folder(session.step)
    unfinished = root / f"{final.name}{UNFINISHED}"
    ranks, engine = session.ranks, session.engine
    failure = _clear(unfinished) if ranks.is_main else None
    storage = engine.checkpoint_engine
    if not isinstance(storage, RecordingStorage):
        storage = engine.checkpoint_engine = RecordingStorage()
    if (failure := from_main(failure)) is None:
        engine.save_checkpoint(str(root), tag=unfinished.name, save_latest=False)
    records, failures = {}, [failure] if failure else []
    for rank, (files, problem) in enumerate(gather_objects((storage.records, storage.failure))):
        records.update(files)
        failures += [f"rank {rank}: {problem}"] if problem else []
    if not failures:
        failure = _finish(session, root, unfinished, final, records) if ranks.is_main else None
        failures = [failure] if (failure := from_main(failure)) else []
    if failures:
        if ranks.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        sound = list_checkpoints(root)
        remains = f"the newest complete checkpoint is {sound[0]}" if sound else "there is no complete checkpoint yet"
        raise CheckpointError(f"step {session.step}: the checkpoint could not be written: {'; '.join(failures)}. "
                              f"Free or enlarge the disk and resume; {remains}")
    return final


def _clear(folder: Path) -> str | None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    except OSError as error:
        return f"{folder}: {error}"
    return None


def _finish(session: Session, root: Path, unfinished: Path, final: Path, records: dict) -> str | None:
    """Make the written shards a checkpoint; rank 0 only. Return what went wrong."""
    try:
        manifest = Manifest(
            step=session.step, samples_seen=session.samples_seen, config=session.config.model_dump(mode="json"),
            layout=layout_of(session.config, session.deepspeed_plan, session.ranks.world_size), files=records,
            versions=package_versions())
        manifest.write(unfinished)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        pointer = root / "latest.tmp"
        pointer.write_text(final.name)
        pointer.rename(root / "latest")
        for old in list_checkpoints(root)[session.config.train.keep_last:]:
            (old / MANIFEST).unlink(missing_ok=True)  # first: half a deletion must not look complete
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        return f"rank 0: {error}"
    return None


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
    Another layout (ranks, expert parallelism, ZeRO stage, precision) is resharded; the same is loaded by DeepSpeed itself.
    Raises: CheckpointError naming the fields that do not fit.
    """
    manifest = read_manifest(folder)
    differing = differing_fields(manifest.config, session.config, architecture_only=not same_run)
    if differing:
        kind = "another run" if same_run else "another architecture"
        raise CheckpointError(f"{folder} belongs to {kind}: {'; '.join(differing)}")
    before = manifest.config["train"]["micro_batch_size"]
    if session.ranks.is_main and same_run and before != session.config.train.micro_batch_size:
        _LOG.warning("resume: train.micro_batch_size was %s and is %s: losses and choices taken over a pass change with it "
                     "(docs/methods.md)", before, session.config.train.micro_batch_size)
    layout = layout_of(session.config, session.deepspeed_plan, session.ranks.world_size)
    if layout == manifest.layout:
        on_all_ranks(lambda: _load_as_it_is(session, folder))
    else:
        _LOG.info("resume: resharding, from %s to %s", manifest.layout, layout)
        load_resharded(session, folder, manifest)
        session.engine.global_steps, session.engine.global_samples = manifest.step, manifest.samples_seen
    session.step, session.samples_seen = manifest.step, manifest.samples_seen


def _load_as_it_is(session: Session, folder: Path) -> None:
    session.engine.checkpoint_engine = RecordingStorage()
    loaded, _ = session.engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise CheckpointError(f"{folder}: DeepSpeed found nothing to load there")


def set_later_aside(root: Path, step: int) -> None:
    """Rename a run's checkpoints of steps after `step`: the run goes on from there, they are another branch's. Rank 0 only."""
    for folder in list_checkpoints(root):
        if folder.name > step_folder(step):
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
            before = saved.get(section, {}).get(name, defaults[name].default)
            if architecture_only and name == "per_layer_weight":
                before, value = bool(before), bool(value)  # whether there is a head, not its weight
            if must_agree and name != "preset" and before != value:
                lines.append(f"{section}.{name} is {_shown(before)} there and {_shown(value)} here")
    return lines


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
