"""The DeepSpeed JSON: strictness, "auto", contradictions, and what is refused before any process
starts.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promoe_ds.config import (
    DeepSpeedPlan,
    deepspeed_json,
    plan_batches,
    read_deepspeed_json,
    resolve_deepspeed,
)
from promoe_ds.config.loader import dotted_names
from promoe_ds.errors import ConfigError

from ..builders import small_config

DS_CONFIGS = Path(__file__).parents[3] / "ds_configs"
ZERO2 = {"zero_optimization": {"stage": 2}}


def resolve(values: dict[str, Any], ranks: int = 2, **sections: dict[str, Any]) -> DeepSpeedPlan:
    config = small_config(train={"global_batch_size": 12, "micro_batch_size": 3}, **sections)
    return resolve_deepspeed(values, config, plan_batches(config, ranks), source="ds.json")


def raises_saying(message: str) -> Any:
    return pytest.raises(ConfigError, match=re.escape(message))


def read(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(text, encoding="utf-8")
    return read_deepspeed_json(path)


def test_packaged_files_equal_those_of_the_checkout() -> None:
    packaged = {
        file.name: file.read_text(encoding="utf-8")
        for file in deepspeed_json.DS_CONFIGS_DIR.iterdir()
    }
    assert set(packaged) == {"zero2_fp32.json", "zero2_bf16.json"}
    assert packaged == {name: (DS_CONFIGS / name).read_text(encoding="utf-8") for name in packaged}


# Reading.


def test_json_plain_object_is_read(tmp_path: Path) -> None:
    values = {"bf16": {"enabled": True}, "x": [1, 2.5, None]}
    assert read(tmp_path, '{"bf16": {"enabled": true}, "x": [1, 2.5, null]}') == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1 // why\n}', "is not strict JSON: .*line 1"),
        ('{\n"a": 1,\n/* why */ "b": 2}', "is not strict JSON: .*line 3"),
        ('{"a": 1, "a": 2}', "is not strict JSON: the key 'a' is given twice"),
        (
            '{"zero": {"stage": 1, "stage": 2}}',
            "is not strict JSON: the key 'stage' is given twice",
        ),
        ('{"a": NaN}', "is not strict JSON: NaN is no JSON value"),
        ('{"a": Infinity}', "is not strict JSON: Infinity is no JSON value"),
        ('{"a": -Infinity}', "is not strict JSON: -Infinity is no JSON value"),
        ('{"a": 1,}', "is not strict JSON: .*line 1"),
        ("{'a': 1}", "is not strict JSON: .*line 1"),
        ("", "is not strict JSON: .*line 1"),
        ("[1]", "must hold one JSON object"),
        ("3", "must hold one JSON object"),
    ],
)
def test_json_not_strict_is_refused_with_file_and_place(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"^--deepspeed_config {re.escape(str(tmp_path / 'ds.json'))}.*{message}"
    ):
        read(tmp_path, text)


def test_json_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"--deepspeed_config {re.escape(str(tmp_path / 'no.json'))}: cannot be read",
    ):
        read_deepspeed_json(tmp_path / "no.json")


def test_json_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match="cannot be read"):
        read_deepspeed_json(tmp_path / "ds.json")


# Filling.


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda p: p.name)
def test_shipped_json_resolves(path: Path) -> None:
    plan = resolve(read_deepspeed_json(path))
    assert plan.zero_stage == 2
    assert plan.precision == ("bf16" if "bf16" in path.name else "fp32")
    assert "auto" not in json.dumps(plan.json)


@pytest.mark.parametrize(
    "values",
    [
        ZERO2,
        {
            **ZERO2,
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        },
        {
            **ZERO2,
            "train_batch_size": 12,
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.25,
        },
    ],
)
def test_auto_missing_or_equal_values_give_the_same_plan(values: dict[str, Any]) -> None:
    filled = resolve(values, optimizer={"max_grad_norm": 0.25}).json
    assert (
        filled["train_batch_size"],
        filled["train_micro_batch_size_per_gpu"],
        filled["gradient_accumulation_steps"],
        filled["gradient_clipping"],
    ) == (12, 3, 2, 0.25)


def test_resolve_leaves_its_argument_alone() -> None:
    values = {"train_batch_size": "auto", "zero_optimization": {"stage": 0}}
    before = copy.deepcopy(values)
    resolve(values)
    assert values == before


def test_resolve_keeps_what_it_does_not_own() -> None:
    filled = resolve({**ZERO2, "communication_data_type": "fp32", "steps_per_print": 5}).json
    assert (filled["communication_data_type"], filled["steps_per_print"]) == ("fp32", 5)
    assert filled["zero_optimization"] == {"stage": 2}


def test_resolve_admits_the_optimizer_with_the_moving_average() -> None:
    assert resolve(ZERO2).json["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_stages_up_to_two_are_taken(stage: int) -> None:
    assert resolve({"zero_optimization": {"stage": stage}}).zero_stage == stage


def test_zero_section_missing_is_stage_zero_in_fp32() -> None:
    plan = resolve({})
    assert (plan.zero_stage, plan.precision) == (0, "fp32")


def test_zero_stage_zero_leaves_clipping_to_the_trainer() -> None:
    # DeepSpeed averages the norms of ranks that hold different experts.
    assert (
        resolve({"gradient_clipping": 0.5}, optimizer={"max_grad_norm": 0.5}).json[
            "gradient_clipping"
        ]
        == 0.0
    )


@pytest.mark.parametrize(
    ("bf16", "precision"), [({"enabled": True}, "bf16"), ({"enabled": False}, "fp32"), ({}, "fp32")]
)
def test_precision_follows_bf16(bf16: dict[str, bool], precision: str) -> None:
    assert resolve({**ZERO2, "bf16": bf16}).precision == precision


# Refusing.


@pytest.mark.parametrize(
    ("key", "stated", "name", "value"),
    [
        ("train_batch_size", 13, "train.global_batch_size", 12),
        ("train_micro_batch_size_per_gpu", 4, "train.micro_batch_size", 3),
        (
            "gradient_accumulation_steps",
            3,
            "train.global_batch_size / (train.micro_batch_size * ranks)",
            2,
        ),
        ("gradient_clipping", 1.0, "optimizer.max_grad_norm", 0.5),
    ],
)
def test_contradiction_names_both_places(key: str, stated: float, name: str, value: float) -> None:
    with raises_saying(f"ds.json: {key}={stated} contradicts {name}={value} of the recipe"):
        resolve({**ZERO2, key: stated})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"zero_optimizaton": {"stage": 2}},
            (
                "zero_optimizaton is no setting that this trainer knows; did you mean"
                " zero_optimization?"
            ),
        ),
        (
            {"zero_optimization": {"stge": 2}},
            (
                "zero_optimization.stge is no setting that this trainer knows; did you mean "
                "zero_optimization.stage?"
            ),
        ),
        ({**ZERO2, "bf16": {"enable": True}}, "did you mean bf16.enabled?"),
        (
            {**ZERO2, "torch_autocast": {"enabled": True}},
            "torch_autocast is no setting that this trainer knows; known are",
        ),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_name(values: dict[str, Any], message: str) -> None:
    with raises_saying(message):
        resolve(values)


def test_zero_offloaded_optimizer_is_taken_with_shards_only() -> None:
    section = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    plan = resolve({"zero_optimization": {"stage": 1, **section}})
    assert plan.json["zero_force_ds_cpu_optimizer"] is False
    with raises_saying("ds.json: zero_optimization.offload_optimizer needs stage 1 or 2"):
        resolve({"zero_optimization": {"stage": 0, **section}})


@pytest.mark.parametrize(
    ("compute", "stated", "precision"),
    [
        ("bf16", {}, "bf16"),
        ("bf16", {"enabled": "auto"}, "bf16"),
        ("fp8", {"enabled": True}, "bf16"),
        ("fp32", {}, "fp32"),
        ("fp32", {"enabled": "auto"}, "fp32"),
        ("fp32", {"enabled": False}, "fp32"),
    ],
)
def test_precision_recipe_fills_the_file(
    compute: str, stated: dict[str, Any], precision: str
) -> None:
    plan = resolve({**ZERO2, "bf16": stated}, precision={"compute": compute})
    assert plan.precision == precision
    assert (
        plan.json["bf16"]["enabled"] == (precision == "bf16")
        if plan.json.get("bf16")
        else precision == "fp32"
    )


@pytest.mark.parametrize(("compute", "enabled"), [("fp32", True), ("bf16", False), ("fp8", False)])
def test_precision_stated_twice_and_differently_is_refused(compute: str, enabled: bool) -> None:
    with raises_saying(
        f"ds.json: bf16.enabled={str(enabled).lower()} contradicts precision.compute={compute} of"
        " the recipe"
    ):
        resolve({**ZERO2, "bf16": {"enabled": enabled}}, precision={"compute": compute})


def test_precision_left_open_by_both_is_refused() -> None:
    with raises_saying(
        'ds.json: bf16.enabled is "auto" and so is the recipe\'s precision.compute: state one of'
        " them"
    ):
        resolve({**ZERO2, "bf16": {"enabled": "auto"}})


@pytest.mark.parametrize(
    ("key", "section", "owner"),
    [
        ("fp16", {"enabled": True}, "bf16 in this file: fp16 loss scaling is not supported"),
        ("fp16", {"loss_scale": 0}, "bf16 in this file: fp16 loss scaling is not supported"),
        ("optimizer", {"type": "AdamW"}, "the optimizer section of the recipe"),
        ("scheduler", {"type": "WarmupLR"}, "optimizer.schedule of the recipe"),
        (
            "activation_checkpointing",
            {"partition_activations": True},
            "parallel.activation_checkpointing of the recipe",
        ),
        ("tensorboard", {"enabled": True}, "logging.tensorboard of the recipe"),
        ("elasticity", {"enabled": True}, "train.global_batch_size of the recipe"),
    ],
)
def test_section_that_the_recipe_owns_is_refused(
    key: str, section: dict[str, Any], owner: str
) -> None:
    with raises_saying(f"ds.json: {key} does not belong here; use {owner}"):
        resolve({**ZERO2, key: section})


def test_fp16_switched_off_is_taken() -> None:
    assert resolve({**ZERO2, "fp16": {"enabled": False}}).precision == "fp32"


def test_bf16_under_zero_stage_zero_is_refused() -> None:
    with raises_saying(
        "ds.json: bf16.enabled with zero_optimization.stage=0 leaves experts out of the gradient"
        " norm"
    ):
        resolve({"bf16": {"enabled": True}})


@pytest.mark.parametrize("key", ["amp", "bfloat16"])
def test_precision_by_another_name_is_refused(key: str) -> None:
    with raises_saying(f"ds.json: {key} does not belong here"):
        resolve({**ZERO2, key: {"enabled": True}})


# Types and ranges.

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
        target = target.get(part, "left out")
        if target == "left out":
            return None
    return target


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
    with pytest.raises(ConfigError, match=re.escape(f"ds.json: {key}")):
        resolve(stated(key, value))


@pytest.mark.parametrize(
    ("stage", "key", "ep_size", "fits"),
    [
        (2, "contiguous_gradients", 2, False),
        (1, "contiguous_gradients", 2, True),
        (2, "contiguous_gradients", 1, True),
        (1, "reduce_scatter", 2, False),
        (2, "reduce_scatter", 2, False),
        (2, "reduce_scatter", 1, True),
        (0, "reduce_scatter", 2, True),
    ],
)
def test_zero_what_deepspeed_refuses_for_sharded_experts_is_refused_before(
    stage: int, key: str, ep_size: int, fits: bool
) -> None:
    values = {"zero_optimization": {"stage": stage, key: False}}
    if fits:
        assert (
            resolve(values, parallel={"ep_size": ep_size}).json["zero_optimization"][key] is False
        )
        return
    with raises_saying(f"ds.json: zero_optimization.{key}=false"):
        resolve(values, parallel={"ep_size": ep_size})


def test_zero_offload_to_none_is_no_offload() -> None:
    section = {"device": "none"}
    plan = resolve(
        {"zero_optimization": {"stage": 0, "offload_optimizer": section, "offload_param": section}}
    )
    assert (plan.offloads, plan.json["zero_optimization"]) == (False, {"stage": 0})


@pytest.mark.parametrize(
    ("text", "line"), [('{"a": 1,\n}', 1), ('{"a": 1,\n// b\n"c": 2}', 2), ('{\n"a": [1,\n],}', 2)]
)
def test_json_comment_or_trailing_comma_is_explained_with_its_line(
    tmp_path: Path, text: str, line: int
) -> None:
    with pytest.raises(ConfigError, match=rf"line [{line}{line + 1}].*comment"):
        read(tmp_path, text)


def test_json_byte_order_mark_is_no_matter_and_depth_no_traceback(tmp_path: Path) -> None:
    assert read(tmp_path, '\ufeff{"a": 1}') == {"a": 1}
    with raises_saying("is not strict JSON"):
        read(tmp_path, "[" * 100_000)
