"""The DeepSpeed JSON: which types and ranges each key takes."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promoe_ds.config import DeepSpeedPlan, deepspeed_json
from promoe_ds.config.loader import dotted_names
from promoe_ds.errors import ConfigError

from .said import refuses
from .test_deepspeed_json import ZERO2, resolve

#: Every key that is let through, with what its value may become and values that are taken.
KEYS: dict[str, tuple[tuple[type, ...], list[Any]]] = {
    "train_batch_size": ((int,), ["auto", 12, 12.0]),
    "train_micro_batch_size_per_gpu": ((int,), ["auto", 3]),
    "gradient_accumulation_steps": ((int,), ["auto", 2]),
    "gradient_clipping": ((float,), ["auto", 0.5]),
    "zero_optimization.stage": ((int,), [1, 2, 2.0]),
    "zero_optimization.contiguous_gradients": ((bool,), [False]),
    "zero_optimization.overlap_comm": ((bool, type(None)), [True, None]),
    "zero_optimization.reduce_scatter": ((bool,), [False]),
    "zero_optimization.reduce_bucket_size": ((int,), [1, 5e8]),
    "zero_optimization.allgather_partitions": ((bool,), [False]),
    "zero_optimization.allgather_bucket_size": ((int,), [2, 5e8]),
    "zero_optimization.parameter_alignment": ((bool,), [True]),
    "zero_optimization.round_robin_gradients": ((bool,), [False]),
    "zero_optimization.offload_optimizer.device": ((str,), ["cpu", "none"]),
    "zero_optimization.offload_param": ((type(None),), [None]),
    "zero_optimization.use_multi_rank_bucket_allreduce": ((bool,), [False]),
    "bf16.enabled": ((bool,), [True, False]),
    "communication_data_type": ((str, type(None)), ["fp16", "bf16", "fp32", None]),
    "seq_parallel_communication_data_type": ((str, type(None)), ["fp16"]),
    "prescale_gradients": ((bool,), [False]),
    "gradient_predivide_factor": ((float,), [1.0, 1]),
    "use_data_before_expert_parallelism": ((bool,), [True]),
    "comms_logger.enabled": ((bool,), [True]),
    "comms_logger.prof_all": ((bool,), [False]),
    "comms_logger.prof_ops": ((list,), [["all_reduce"]]),
    "comms_logger.verbose": ((bool,), [True]),
    "comms_logger.debug": ((bool,), [True]),
    "wall_clock_breakdown": ((bool,), [False]),
    "memory_breakdown": ((bool,), [True]),
    "flops_profiler.enabled": ((bool,), [False]),
    "flops_profiler.recompute_fwd_factor": ((float,), [0.5, 1]),
    "flops_profiler.profile_step": ((int,), [3]),
    "flops_profiler.module_depth": ((int,), [-1, 2]),
    "flops_profiler.top_modules": ((int,), [4]),
    "flops_profiler.detailed": ((bool,), [False]),
    "flops_profiler.output_file": ((str, type(None)), ["profile.txt"]),
    "steps_per_print": ((int, type(None)), [1, None]),
    "dump_state": ((bool,), [True]),
    "zero_allow_untested_optimizer": ((bool,), [False]),
}
JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.just({"enabled": 1}),
    st.sampled_from(
        [
            "auto",
            "5e8",
            "2",
            "true",
            "inf",
            "float16",
            2.0,
            0,
            -1,
            10**30,
            float("inf"),
            float("nan"),
            [1],
            ["a"],
        ]
    ),
)


def stated(key: str, value: Any) -> dict[str, Any]:
    """Return the smallest file that gives a dotted key this value."""
    *sections, leaf = key.split(".")
    values: dict[str, Any] = copy.deepcopy(ZERO2)
    target = values
    for section in sections:
        target = target.setdefault(
            section, {"device": "cpu"} if section == "offload_optimizer" else {}
        )
    target[leaf] = value
    return values


def found(plan: DeepSpeedPlan, key: str) -> Any:
    target: Any = plan.json
    for part in key.split("."):
        target = target.get(part, {})
    return None if target == {} else target


def test_types_list_holds_every_key() -> None:
    nested = {"zero_optimization.offload_optimizer": "zero_optimization.offload_optimizer.device"}
    assert {nested.get(name, name) for name in dotted_names(deepspeed_json._File)} == set(KEYS)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, (_, values) in KEYS.items() for value in values]
)
def test_types_value_that_fits_is_taken(key: str, value: Any) -> None:
    allowed = (*KEYS[key][0], type(None)) if value == "none" else KEYS[key][0]
    assert type(found(resolve(stated(key, value)), key)) in allowed


@settings(max_examples=400, deadline=None, derandomize=True)
@given(key=st.sampled_from(sorted(KEYS)), value=JSON_VALUES)
def test_types_any_json_value_is_taken_as_its_type_or_refused_by_name(key: str, value: Any) -> None:
    try:
        plan = resolve(stated(key, value))
    except ConfigError as error:
        assert key in str(error)
        return
    # A device of "none" is no offloading: the key is gone.
    assert type(found(plan, key)) in KEYS[key][0] or value == "none" or value in ({}, []), value
    json.dumps(plan.json, allow_nan=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_optimization.stage", "2"),
        ("zero_optimization.stage", True),
        ("zero_optimization.stage", 3),
        ("zero_optimization.reduce_bucket_size", "5e8"),
        ("zero_optimization.reduce_bucket_size", 0),
        ("zero_optimization.reduce_bucket_size", 2**62),
        ("zero_optimization.allgather_bucket_size", 3),
        ("zero_optimization.allgather_bucket_size", 1e999),
        ("zero_optimization.offload_param", {"device": "cpu"}),
        ("zero_optimization.round_robin_gradients", True),
        ("zero_optimization.offload_optimizer.device", "nvme"),
        ("zero_optimization.offload_optimizer.ratio", 0.5),
        ("communication_data_type", "float16"),
        ("comms_logger", "on"),
        ("wall_clock_breakdown", True),
        ("flops_profiler.enabled", True),
        ("steps_per_print", 0),
        ("train_batch_size", "12"),
        ("train_batch_size", True),
        ("gradient_clipping", -1.0),
        ("prescale_gradients", True),
        ("zero_optimization", None),
        ("bf16", [1]),
        ("memory_breakdown", 1),
        ("memory_breakdown", "auto"),
        ("gradient_predivide_factor", 2.0),
    ],
)
def test_types_value_that_cannot_be_is_refused_by_name(key: str, value: Any) -> None:
    with refuses(f"ds.json: {key}"):
        resolve(stated(key, value))
