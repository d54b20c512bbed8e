"""The DeepSpeed JSON: ZeRO, precision and communication only; the rest is "auto", filled from the
recipe.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    create_model,
)

from promoe_ds.config.batching import BatchPlan
from promoe_ds.config.loader import dotted_names
from promoe_ds.config.schema import RunConfig
from promoe_ds.config.section import explain, require, suggest
from promoe_ds.errors import ConfigError

#: Files of `ds_configs/` that commands take when none is named, in an installed package too.
DS_CONFIGS_DIR = Path(__file__).parent.parent / "ds_configs"
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


#: Elements of a bucket, which DeepSpeed allocates at once: 40 GB of fp32.
_LARGEST_BUCKET = 10**10
_SCATTERED = (
    "the shards of the weights and of their moving average could not be separated in a checkpoint;"
    " leave it out"
)
_NO_TIMERS = (
    "DeepSpeed's timers need a model that returns bare tensors; metrics.jsonl and train.log have"
    " the times of a step"
)
_NO_STAGE_3 = "DeepSpeed refuses expert parallelism under ZeRO 3; use 0, 1 or 2"
_NO_SCALING = "it is for fp16, whose sums overflow; leave it out"


def _only(reason: str, *allowed: Any) -> AfterValidator:
    """Return a check for what this trainer does not support in every way."""

    def check(value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"this is not supported: {reason}")
        return value

    return AfterValidator(check)


class _Keys(BaseModel):
    """Base of the file's sections: JSON's own types, no unknown keys."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _section(name: str, **types: Any) -> type[_Keys]:
    """Return the model of a section whose keys have these types and may all be left out."""
    fields: dict[str, Any] = {key: (each, None) for key, each in types.items()}
    return create_model(name, __base__=_Keys, **fields)


_AUTO = WrapValidator(lambda value, read: value if value == "auto" else read(value))
#: People write 5e8 for 500000000, which JSON makes a float.
_WHOLE = BeforeValidator(
    lambda value: int(value) if isinstance(value, float) and value.is_integer() else value
)
_Count = Annotated[int, Field(gt=0), _WHOLE]
_Bucket = Annotated[_Count, Field(le=_LARGEST_BUCKET)]
_CommDtype = Literal["fp32", "bf16", "fp16"] | None

#: What the file may say: batch sizes as "auto", ZeRO, precision, communication, DeepSpeed's own
# logging.
_File = _section(
    "File",
    train_batch_size=Annotated[_Count, _AUTO],
    train_micro_batch_size_per_gpu=Annotated[_Count, _AUTO],
    gradient_accumulation_steps=Annotated[_Count, _AUTO],
    gradient_clipping=Annotated[float, Field(ge=0), _AUTO],
    zero_optimization=_section(
        "Zero",
        stage=Annotated[int, _only(_NO_STAGE_3, 0, 1, 2), _WHOLE],
        contiguous_gradients=bool,
        overlap_comm=bool | None,
        reduce_scatter=bool,
        reduce_bucket_size=_Bucket,
        allgather_partitions=bool,
        allgather_bucket_size=Annotated[_Bucket, Field(multiple_of=2)],
        parameter_alignment=bool,
        round_robin_gradients=Annotated[bool, _only(_SCATTERED, False)],
        offload_optimizer=_section(
            "OffloadOptimizer", device=Literal["cpu", "none"], pin_memory=bool
        )
        | None,
        offload_param=_section("OffloadParam", device=Annotated[str, _only(_SCATTERED, "none")])
        | None,
        use_multi_rank_bucket_allreduce=bool,
    ),
    bf16=_section("Bf16", enabled=Annotated[bool, _AUTO]),
    communication_data_type=_CommDtype,
    seq_parallel_communication_data_type=_CommDtype,
    prescale_gradients=Annotated[bool, _only(_NO_SCALING, False)],
    gradient_predivide_factor=Annotated[float, _only(_NO_SCALING, 1.0)],
    use_data_before_expert_parallelism=bool,
    comms_logger=_section(
        "CommsLogger", enabled=bool, prof_all=bool, prof_ops=list[str], verbose=bool, debug=bool
    ),
    wall_clock_breakdown=Annotated[bool, _only(_NO_TIMERS, False)],
    memory_breakdown=bool,
    flops_profiler=_section(
        "FlopsProfiler",
        enabled=Annotated[bool, _only(_NO_TIMERS, False)],
        recompute_fwd_factor=Annotated[float, Field(ge=0)],
        profile_step=_Count,
        module_depth=Annotated[int, Field(ge=-1), _WHOLE],
        top_modules=_Count,
        detailed=bool,
        output_file=str | None,
    ),
    steps_per_print=_Count | None,
    dump_state=bool,
    zero_allow_untested_optimizer=bool,
)


@dataclass(frozen=True, kw_only=True)
class DeepSpeedPlan:
    """A resolved DeepSpeed config and what the package itself needs to know of it."""

    json: dict[str, Any]
    zero_stage: int
    precision: Literal["fp32", "bf16"]

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's state is in the host's memory."""
        return bool(self.json.get("zero_optimization", {}).get("offload_optimizer"))


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed config as strict JSON: no comments, no duplicate keys.

    Raises: ConfigError naming the file and, where JSON itself is broken, the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = json.loads(text, object_pairs_hook=_unique_keys)
    except OSError as error:
        raise ConfigError(f"--deepspeed_config {path}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--deepspeed_config {path} is not strict JSON: {error}. JSON has no comments, no comma"
            " before a closing bracket, and strings in double quotes alone"
        ) from None
    require(
        isinstance(values, dict), f"--deepspeed_config {path} must hold a JSON object", ConfigError
    )
    return values


def resolve_deepspeed(
    values: dict[str, Any], config: RunConfig, batches: BatchPlan, *, source: str
) -> DeepSpeedPlan:
    """Fill every "auto", refuse wrong types, contradictions and what cannot work with this trainer.

    Args:
        values: as `read_deepspeed_json` returns them; not changed.
        source: the file's name, for messages.
    Raises: ConfigError naming the key and its value, and both places for a value stated twice and
    differently.
    """
    stated = dict(values)
    for key, owner in _OWNED_BY_RECIPE.items():
        section = stated.pop(key, None)  # one that is switched off is as one that is left out
        if section and (not isinstance(section, dict) or section.get("enabled", True) is not False):
            raise ConfigError(f"{source}: {key} does not belong here; use {owner}")
    try:
        resolved = _File.model_validate(stated).model_dump(exclude_unset=True, warnings=False)
    except ValidationError as error:
        raise explain(error, source, _unknown, json.dumps) from None
    zero = resolved.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") == "none":
            zero.pop(key, None)
    bf16 = _resolve_bf16(resolved, config, source)
    require(
        stage > 0 or not bf16,
        f"{source}: bf16.enabled with zero_optimization.stage=0 leaves experts out of the gradient"
        " norm in DeepSpeed: use stage 1 or 2, or fp32",
        ConfigError,
    )
    require(
        stage > 0 or "offload_optimizer" not in zero,
        f"{source}: zero_optimization.offload_optimizer needs stage 1 or 2, which cut the"
        " optimizer's state into shards; this is stage 0",
        ConfigError,
    )
    for key in ("reduce_scatter", "contiguous_gradients")[:stage]:
        require(
            zero.get(key, True) or config.parallel.resolved_dispatch == "local",
            f"{source}: zero_optimization.{key}=false: DeepSpeed refuses it for experts that are"
            f" shared out (parallel.ep_size={config.parallel.ep_size}) under ZeRO {stage}; leave it"
            " out",
            ConfigError,
        )
    _fill_auto(resolved, config, batches, source)
    if stage == 0:
        # DeepSpeed averages per-rank norms here, which is wrong under expert parallelism: the
        # trainer clips.
        resolved["gradient_clipping"] = 0.0
    # AdamW with the moving average in its state, on the host, too, where that is offloaded
    resolved |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    resolved.setdefault("steps_per_print", 10**9)
    return DeepSpeedPlan(json=resolved, zero_stage=stage, precision="bf16" if bf16 else "fp32")


def _resolve_bf16(resolved: dict[str, Any], config: RunConfig, source: str) -> bool:
    """Let recipe and file agree on bf16 weights, which FP8 has, too; write the answer into the
    file's section.
    """
    compute = config.precision.compute
    stated = resolved.get("bf16", {}).get("enabled", "auto" if compute != "auto" else False)
    require(
        not stated == compute == "auto",
        f'{source}: bf16.enabled is "auto" and so is the recipe\'s precision.compute: state one of'
        " them",
        ConfigError,
    )
    require(
        compute == "auto" or stated in ("auto", config.precision.has_bf16_weights),
        f"{source}: bf16.enabled={json.dumps(stated)} contradicts precision.compute={compute} of"
        ' the recipe: say "auto" there, or make them agree',
        ConfigError,
    )
    enabled = config.precision.has_bf16_weights if stated == "auto" else stated
    if enabled or resolved.get("bf16"):
        resolved["bf16"] = {"enabled": enabled}
    return enabled


def _fill_auto(
    resolved: dict[str, Any], config: RunConfig, batches: BatchPlan, source: str
) -> None:
    owned = {
        "train_batch_size": ("train.global_batch_size", batches.global_batch),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", batches.micro_batch),
        "gradient_accumulation_steps": (
            "train.global_batch_size / (train.micro_batch_size * ranks)",
            batches.accumulation,
        ),
        "gradient_clipping": ("optimizer.max_grad_norm", config.optimizer.max_grad_norm),
    }
    for key, (name, value) in owned.items():
        stated = resolved.get(key, "auto")
        require(
            stated in ("auto", value),
            f'{source}: {key}={stated} contradicts {name}={value} of the recipe: say "auto" there,'
            " or make them equal",
            ConfigError,
        )
        resolved[key] = value


def _unknown(name: str) -> str:
    names = {*dotted_names(_File), *_File.model_fields, *_OWNED_BY_RECIPE}
    beside = sorted(n for n in names if n.rpartition(".")[0] == name.rpartition(".")[0])
    hint = suggest(name, beside, f"known are {', '.join(beside)}")
    return f"{name} is no setting that this trainer knows; {hint}"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, count in Counter(key for key, _ in pairs).items():
        require(count == 1, f"the key {key!r} is given twice")
    return dict(pairs)
