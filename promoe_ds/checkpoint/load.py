"""Loading a checkpoint into a trainer, exactly, or an error that says what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from promoe_ds.checkpoint.manifest import CONVERTED, Manifest, read_manifest
from promoe_ds.checkpoint.resharding import load_resharded, moves_experts
from promoe_ds.checkpoint.save import TrainingState, layout_of
from promoe_ds.checkpoint.zero_reader import check_progress
from promoe_ds.config import RunConfig
from promoe_ds.config.optimizer import OptimizerConfig, learning_rate
from promoe_ds.data.normalization.values import LatentNormalization
from promoe_ds.errors import CheckpointError, differences
from promoe_ds.logs import get_logger

_LOG = get_logger("checkpoint")

#: Settings of the optimizer that are read at every step.
_SCHEDULE = ("lr", "schedule", "warmup_steps", "min_lr", "schedule_steps")

#: What a resumed run may change: nothing that would make it another run. `_report_changes` says
#: what leaves a trace.
FREE_FIELDS = {
    "optimizer": {"schedule_steps", "implementation"},
    "data": {"path", "vae", "workers", "max_corrupt", "check_latents"},
    "train": {
        "max_steps",
        "stop_after_steps",
        "log_every",
        "checkpoint_every",
        "keep_last",
        "keep_every",
        "async_checkpoint",
        "max_nonfinite_steps",
        "micro_batch_size",
    },
    "parallel": {
        "activation_checkpointing",
        "timeout_seconds",
        "kernels",
        "expert_backend",
        "ep_size",
        "dispatch",
        "megatron_dispatcher",
        "comm_dtype",
        "expert_groups",
        "compile",
        "expert_placement",
        "expert_order",
    },
    "precision": {"compute", "fp8_recipe", "kernels"},
    "supervision": {
        "setup_timeout_seconds",
        "step_timeout_seconds",
        "checkpoint_timeout_seconds",
        "evaluation_timeout_seconds",
        "launcher_timeout_seconds",
    },
    "logging": {
        "tensorboard",
        "wandb",
        "wandb_project",
        "timestep_bins",
        "class_counts",
        "position_counts",
        "counts_every",
    },
    "sampling": {"steps", "cfg_scale", "solver"},
    "evaluation": {
        "every",
        "reference",
        "extractor",
        "samples",
        "batch_size",
        "steps",
        "cfg_scale",
        "seed",
    },
}


def load_checkpoint(trainer: TrainingState, folder: Path, *, same_run: bool) -> None:
    """Load a sound checkpoint into the trainer; all ranks call this together.

    Args:
        same_run: whether it must be this very run's (`--resume auto`): then only FREE_FIELDS may
            differ. Otherwise only the architecture and the objective must agree.
    Another layout (ranks, expert parallelism, ZeRO stage, precision, order) is resharded, and so
    are other settings of the optimizer, since DeepSpeed puts the saved ones back; the same is
    loaded by DeepSpeed itself.
    Raises: CheckpointError naming the fields that do not fit.
    """
    manifest = read_manifest(folder)
    saved = manifest.run_config(folder)
    differing = differing_fields(manifest.config, trainer.config, architecture_only=not same_run)
    if differing:
        kind = "another run" if same_run else "another architecture or objective"
        raise CheckpointError(f"{folder} belongs to {kind}: {'; '.join(differing)}")
    if trainer.context.is_main:
        _report_changes(trainer, manifest, saved, same_run=same_run)
    layout = layout_of(trainer)
    same_optimizer = _beside_schedule(saved.optimizer) == _beside_schedule(trainer.config.optimizer)
    # DeepSpeed knows groups by their place, and frozen parameters are in none.
    has_all = not saved.train.freeze and not trainer.config.train.freeze
    same_places = has_all and not moves_experts(manifest, trainer.config)
    if layout == manifest.layout and same_optimizer and same_places:
        trainer.context.on_all_ranks(lambda: _load_as_it_is(trainer, folder, manifest))
        trainer.ema.averages_since = dict(manifest.averages_since)
    else:
        _LOG.info(
            "resume: resharding, from %s to %s%s",
            manifest.layout,
            layout,
            "" if same_optimizer else ", with other settings of the optimizer",
        )
        load_resharded(trainer, folder, manifest)
        trainer.engine.global_steps, trainer.engine.global_samples = (
            manifest.step,
            manifest.samples_seen,
        )
    trainer.step, trainer.samples_seen = manifest.step, manifest.samples_seen


def _report_changes(
    trainer: TrainingState, manifest: Manifest, saved: RunConfig, *, same_run: bool
) -> None:
    """Say what may change at a resume, and does not pass without a trace."""
    if not same_run and (
        changed := differing_fields(manifest.config, trainer.config, architecture_only=False)
    ):
        _LOG.warning("resume: settings changed from the checkpoint's: %s", "; ".join(changed))
    if line := _changed_schedule(saved, trainer.config, manifest.step):
        _LOG.warning("resume: %s", line)
    micro_batch = saved.train.micro_batch_size or (
        trainer.batches.micro_batch
        if manifest.layout.dispatch == CONVERTED  # whose ranks nobody knows
        else saved.train.global_batch_size // manifest.layout.world_size
    )
    size = len(trainer.dataset)
    known_size = size if manifest.dataset_size is None or not same_run else manifest.dataset_size
    for what, before, now, consequence in (
        (
            "the micro-batch",
            micro_batch,
            trainer.batches.micro_batch,
            "losses and choices taken over a pass change with it (docs/reference/methods.md)",
        ),
        (
            "the normalisation of latents",
            LatentNormalization.of(saved.data),
            LatentNormalization.of(trainer.config.data),
            "unless the latents are of another autoencoder, the network sees them at a scale that"
            " it was not trained on",
        ),
        (
            "the number of samples in the data set",
            known_size,
            size,
            "their order is another from here on, some come again or never in this epoch",
        ),
    ):
        if before != now:
            _LOG.warning("resume: %s was %s and is %s: %s", what, before, now, consequence)


def _changed_schedule(saved: RunConfig, config: RunConfig, step: int) -> str:
    """Return what becomes of the learning rate from `step` on, and how to keep it; nothing if it is
    as before.
    """

    def rates(run: RunConfig) -> list[float]:
        return [
            learning_rate(each, run.train.max_steps, run.optimizer)
            for each in (step, saved.train.max_steps - 1)
        ]

    (before, _), (now, _) = rates(saved), rates(config)
    if rates(saved) == rates(config):
        return ""
    keep = {
        name: getattr(saved.optimizer, name)
        for name in _SCHEDULE
        if getattr(saved.optimizer, name) != getattr(config.optimizer, name)
    }
    keep["schedule_steps"] = saved.optimizer.schedule_steps or saved.train.max_steps
    return (
        f"the learning rate of step {step} was to be {before:.3g} and is {now:.3g}: the schedule"
        f" has changed (train.max_steps was {saved.train.max_steps} and is"
        f" {config.train.max_steps}). To keep the old one: --set "
        + " ".join(f"optimizer.{name}={value}" for name, value in keep.items())
    )


def _beside_schedule(config: OptimizerConfig) -> OptimizerConfig:
    """Return the optimizer's settings without those that every step sets anew: DeepSpeed brings
    back the others as saved.
    """
    return config.model_copy(
        update={name: OptimizerConfig.model_fields[name].default for name in _SCHEDULE}
    )


def _load_as_it_is(trainer: TrainingState, folder: Path, manifest: Manifest) -> None:
    loaded, _ = trainer.engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise CheckpointError(f"{folder}: DeepSpeed found nothing to load there")
    check_progress(
        {
            "global_steps": trainer.engine.global_steps,
            "global_samples": trainer.engine.global_samples,
        },
        folder,
        manifest,
    )


def differing_fields(
    saved: dict[str, Any], config: RunConfig, *, architecture_only: bool
) -> list[str]:
    """Return `FIELD is SAVED there and CURRENT here` for each that must agree and does not."""
    current = config.model_dump(mode="json")
    architecture = {
        "model": current["model"].keys(),
        "routing": (
            "method",
            "moe_blocks",
            "num_experts",
            "num_shared_experts",
            "num_unconditional_experts",
            "expert_width",
            "shared_expert_width",
            "expert_type",
            "shared_expert_type",
            "per_layer_weight",
        ),
        # What the network is asked and what it answers.
        "diffusion": ("objective", "num_train_timesteps"),
    }
    there, here = {}, {}
    for section, fields in current.items():
        if not isinstance(fields, dict) or (architecture_only and section not in architecture):
            continue
        # A field that is newer than the checkpoint: its default is what was done then.
        defaults = {
            name: list(field.default) if isinstance(field.default, tuple) else field.default
            for name, field in type(getattr(config, section)).model_fields.items()
        }
        before = defaults | saved.get(section, {})
        must_agree = (
            architecture[section]
            if architecture_only
            else fields.keys() - FREE_FIELDS.get(section, set())
        )
        for name in (name for name in fields if name in must_agree and name != "preset"):
            there[f"{section}.{name}"], here[f"{section}.{name}"] = before[name], fields[name]
    for values in (there, here) if architecture_only else ():
        # Of a router's head: whether there is one, not its weight.
        values["routing.per_layer_weight"] = bool(values["routing.per_layer_weight"])
    return differences(there, here)
