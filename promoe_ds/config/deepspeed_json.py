"""The DeepSpeed JSON: ZeRO, precision and communication only; the rest is "auto", filled from the recipe."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from promoe_ds.config.batching import BatchPlan
from promoe_ds.config.schema import RunConfig
from promoe_ds.errors import ConfigError

#: Sections that the recipe owns: stating them in the JSON would be a second way to say a thing.
_OWNED_BY_RECIPE = {
    "optimizer": "the optimizer section of the recipe",
    "scheduler": "optimizer.schedule of the recipe",
    "activation_checkpointing": "parallel.activation_checkpointing of the recipe",
    "tensorboard": "logging.tensorboard of the recipe",
    "fp16": "bf16 in this file: fp16 loss scaling is not supported",
    "amp": "bf16 in this file: apex mixed precision is not supported",
    "bfloat16": "its present name, bf16",
    "elasticity": "train.global_batch_size of the recipe",
}


#: What the file may say: batch sizes as "auto", ZeRO, precision, communication, DeepSpeed's own logging.
_TOP_LEVEL = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization", "bf16", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "use_data_before_expert_parallelism", "comms_logger", "wall_clock_breakdown", "memory_breakdown", "flops_profiler",
    "steps_per_print", "dump_state", "zero_allow_untested_optimizer", "seq_parallel_communication_data_type",
}
_ZERO = {
    "stage", "contiguous_gradients", "overlap_comm", "reduce_scatter", "reduce_bucket_size", "allgather_partitions",
    "allgather_bucket_size", "parameter_alignment", "round_robin_gradients", "offload_optimizer", "offload_param",
    "use_multi_rank_bucket_allreduce",
}
_BF16 = {"enabled"}
#: Of offload_optimizer; others are for NVMe, or for an optimizer of DeepSpeed's own.
_OFFLOAD = {"device", "pin_memory"}


@dataclass(frozen=True, kw_only=True)
class DeepSpeedPlan:
    """A resolved DeepSpeed config and what the package itself needs to know of it."""

    json: dict[str, Any]
    zero_stage: int
    precision: Literal["fp32", "bf16"]

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's state lies in the host's memory."""
        return bool(self.json.get("zero_optimization", {}).get("offload_optimizer"))


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed config as strict JSON: no comments, no duplicate keys, no NaN.

    Raises: ConfigError naming the file and, where JSON itself is broken, the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--deepspeed_config {path}: cannot be read ({error})") from None
    try:
        values = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (json.JSONDecodeError, ValueError) as error:
        raise ConfigError(f"--deepspeed_config {path} is not strict JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--deepspeed_config {path} must hold one JSON object")
    return values


def resolve_deepspeed(values: dict[str, Any], config: RunConfig, batches: BatchPlan, *, source: str) -> DeepSpeedPlan:
    """Fill every "auto", refuse contradictions and what cannot work with this trainer.

    Args:
        values: as `read_deepspeed_json` returns them; not changed.
        source: the file's name, for messages.
    Raises: ConfigError naming both places for a value stated twice and differently.
    """
    resolved = json.loads(json.dumps(values))
    for key, owner in _OWNED_BY_RECIPE.items():
        section = resolved.get(key)
        if section and (not isinstance(section, dict) or section.get("enabled", True)):
            raise ConfigError(f"{source}: {key} does not belong here; use {owner}")
    for prefix, section, valid in (("", resolved, _TOP_LEVEL | _OWNED_BY_RECIPE.keys()),
                                   ("zero_optimization.", _section(resolved, "zero_optimization", source), _ZERO),
                                   ("bf16.", _section(resolved, "bf16", source), _BF16)):
        for key in section.keys() - valid:
            close = difflib.get_close_matches(key, sorted(valid), n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known are {', '.join(sorted(valid))}"
            raise ConfigError(f"{source}: {prefix}{key} is no setting that this trainer knows; {hint}")
    stage = _check_zero(resolved, source)
    bf16 = _resolve_bf16(resolved, config, source)
    if bf16 and stage == 0:
        raise ConfigError(f"{source}: bf16.enabled with zero_optimization.stage=0 leaves experts out of the gradient norm "
                          "in DeepSpeed: use stage 1 or 2, or fp32")
    _fill_auto(resolved, config, batches, source)
    if stage == 0:
        # DeepSpeed averages per-rank norms here, which is wrong under expert parallelism: train/clipping.py clips.
        resolved["gradient_clipping"] = 0.0
    resolved["zero_allow_untested_optimizer"] = True  # AdamW with the moving average in its state
    resolved["zero_force_ds_cpu_optimizer"] = False  # the same AdamW on the host, where its state is offloaded
    resolved.setdefault("steps_per_print", 10**9)
    return DeepSpeedPlan(json=resolved, zero_stage=stage, precision="bf16" if bf16 else "fp32")


def _check_zero(resolved: dict[str, Any], source: str) -> int:
    zero = _section(resolved, "zero_optimization", source)
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2):
        raise ConfigError(f"{source}: zero_optimization.stage={stage} is not supported: DeepSpeed refuses expert "
                          "parallelism under ZeRO 3; use 0, 1 or 2")
    for key in ("round_robin_gradients", "offload_param"):
        if zero.get(key):
            raise ConfigError(f"{source}: zero_optimization.{key} is not supported: the shards of the weights and of their "
                              "moving average could not be told apart in a checkpoint; leave it out")
    offload = zero.get("offload_optimizer")
    if offload is not None:
        if stage == 0:
            raise ConfigError(f"{source}: zero_optimization.offload_optimizer needs stage 1 or 2, which cut the optimizer's state "
                              "into shards; this is stage 0")
        if not isinstance(offload, dict) or offload.get("device") != "cpu" or offload.keys() - _OFFLOAD:
            raise ConfigError(f"{source}: zero_optimization.offload_optimizer={json.dumps(offload)} is not supported: say "
                              "{\"device\": \"cpu\"}, with pin_memory or without, or leave it out")
    return stage


def _resolve_bf16(resolved: dict[str, Any], config: RunConfig, source: str) -> bool:
    """Let recipe and file agree on bf16 weights, which FP8 has, too; write the answer into the file's section."""
    section, compute = _section(resolved, "bf16", source), config.precision.compute
    stated = section.get("enabled", "auto" if compute != "auto" else False)
    if stated == "auto":
        if compute == "auto":
            raise ConfigError(f"{source}: bf16.enabled is \"auto\" and so is the recipe's precision.compute: state one of them")
        stated = compute != "fp32"
    elif compute != "auto" and bool(stated) != (compute != "fp32"):
        raise ConfigError(f"{source}: bf16.enabled={json.dumps(stated)} contradicts precision.compute={compute} of the recipe: say "
                          "\"auto\" there, or make them agree")
    if stated or section:
        resolved["bf16"] = {**section, "enabled": bool(stated)}
    return bool(stated)


def _fill_auto(resolved: dict[str, Any], config: RunConfig, batches: BatchPlan, source: str) -> None:
    owned = {
        "train_batch_size": ("train.global_batch_size", batches.global_batch),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", batches.micro_batch),
        "gradient_accumulation_steps": ("train.global_batch_size / (train.micro_batch_size * ranks)", batches.accumulation),
        "gradient_clipping": ("optimizer.clip_norm", config.optimizer.clip_norm),
    }
    for key, (name, value) in owned.items():
        stated = resolved.get(key, "auto")
        if stated != "auto" and stated != value:
            raise ConfigError(f"{source}: {key}={stated} contradicts {name}={value} of the recipe: say \"auto\" there, or "
                              "make them equal")
        resolved[key] = value
    left = [key for key, value in _flattened(resolved) if value == "auto"]
    if left:
        raise ConfigError(f"{source}: \"auto\" has no meaning for {', '.join(left)}; only for {', '.join(owned)}")


def _section(values: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    section = values.get(key, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{source}: {key} must be an object, found {section!r}")
    return section


def _flattened(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        rows += _flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands twice")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")
