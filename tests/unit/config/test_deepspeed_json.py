"""The DeepSpeed JSON: strictness, "auto", contradictions, and what is refused before any process starts."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from promoe_ds.config import DeepSpeedPlan, plan_batches, read_deepspeed_json, resolve_deepspeed
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


# Reading.


def test_json_plain_object_is_read(tmp_path: Path) -> None:
    values = {"bf16": {"enabled": True}, "x": [1, 2.5, None]}
    assert read(tmp_path, '{"bf16": {"enabled": true}, "x": [1, 2.5, null]}') == values


@pytest.mark.parametrize(("text", "message"), [
    ('{"a": 1 // why\n}', "is not strict JSON: .*line 1"),
    ('{\n"a": 1,\n/* why */ "b": 2}', "is not strict JSON: .*line 3"),
    ('{"a": 1, "a": 2}', "is not strict JSON: the key 'a' stands twice"),
    ('{"zero": {"stage": 1, "stage": 2}}', "is not strict JSON: the key 'stage' stands twice"),
    ('{"a": NaN}', "is not strict JSON: NaN is no JSON value"),
    ('{"a": Infinity}', "is not strict JSON: Infinity is no JSON value"),
    ('{"a": -Infinity}', "is not strict JSON: -Infinity is no JSON value"),
    ('{"a": 1,}', "is not strict JSON: .*line 1"),
    ("{'a': 1}", "is not strict JSON: .*line 1"),
    ("", "is not strict JSON: .*line 1"),
    ("[1]", "must hold one JSON object"),
    ("3", "must hold one JSON object"),
])
def test_json_not_strict_is_refused_with_file_and_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--deepspeed_config {re.escape(str(tmp_path / 'ds.json'))}.*{message}"):
        read(tmp_path, text)


def test_json_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--deepspeed_config {re.escape(str(tmp_path / 'no.json'))}: cannot be read"):
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


@pytest.mark.parametrize("values", [
    ZERO2,
    {**ZERO2, "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
     "gradient_clipping": "auto"},
    {**ZERO2, "train_batch_size": 12, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2,
     "gradient_clipping": 0.25},
])
def test_auto_missing_or_equal_values_give_the_same_plan(values: dict[str, Any]) -> None:
    filled = resolve(values, optimizer={"clip_norm": 0.25}).json
    assert (filled["train_batch_size"], filled["train_micro_batch_size_per_gpu"], filled["gradient_accumulation_steps"],
            filled["gradient_clipping"]) == (12, 3, 2, 0.25)


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
    assert resolve({"gradient_clipping": 0.5}, optimizer={"clip_norm": 0.5}).json["gradient_clipping"] == 0.0


@pytest.mark.parametrize(("bf16", "precision"), [({"enabled": True}, "bf16"), ({"enabled": False}, "fp32"), ({}, "fp32")])
def test_precision_follows_bf16(bf16: dict[str, bool], precision: str) -> None:
    assert resolve({**ZERO2, "bf16": bf16}).precision == precision


# Refusing.


@pytest.mark.parametrize(("key", "stated", "name", "value"), [
    ("train_batch_size", 13, "train.global_batch_size", 12),
    ("train_micro_batch_size_per_gpu", 4, "train.micro_batch_size", 3),
    ("gradient_accumulation_steps", 3, "train.global_batch_size / (train.micro_batch_size * ranks)", 2),
    ("gradient_clipping", 1.0, "optimizer.clip_norm", 0.5),
])
def test_contradiction_names_both_places(key: str, stated: float, name: str, value: float) -> None:
    with raises_saying(f"ds.json: {key}={stated} contradicts {name}={value} of the recipe"):
        resolve({**ZERO2, key: stated})


@pytest.mark.parametrize(("values", "message"), [
    ({"zero_optimizaton": {"stage": 2}}, "zero_optimizaton is no setting that this trainer knows; did you mean zero_optimization?"),
    ({"zero_optimization": {"stge": 2}}, "zero_optimization.stge is no setting that this trainer knows; did you mean "
                                         "zero_optimization.stage?"),
    ({**ZERO2, "bf16": {"enable": True}}, "did you mean bf16.enabled?"),
    ({**ZERO2, "torch_autocast": {"enabled": True}}, "torch_autocast is no setting that this trainer knows; known are"),
])
def test_unknown_key_is_refused_with_the_nearest_name(values: dict[str, Any], message: str) -> None:
    with raises_saying(message):
        resolve(values)


@pytest.mark.parametrize(("values", "where"), [
    ({**ZERO2, "comms_logger": {"verbose": "auto"}}, "comms_logger.verbose"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size"),
    ({**ZERO2, "steps_per_print": "auto"}, "steps_per_print"),
])
def test_auto_elsewhere_is_refused(values: dict[str, Any], where: str) -> None:
    with raises_saying(f'ds.json: "auto" has no meaning for {where}; only for train_batch_size'):
        resolve(values)


@pytest.mark.parametrize("stage", [3, -1, "auto", None, [2]])
def test_zero_stage_three_or_nonsense_is_refused(stage: Any) -> None:
    with raises_saying(f"ds.json: zero_optimization.stage={stage} is not supported: DeepSpeed refuses expert parallelism under "
                 "ZeRO 3; use 0, 1 or 2"):
        resolve({"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize(("key", "value"), [
    ("round_robin_gradients", True), ("offload_param", {"device": "cpu"}), ("offload_optimizer", {"device": "nvme"}),
    ("offload_optimizer", {"device": "cpu", "ratio": 0.5}), ("offload_optimizer", True),
])
def test_zero_option_that_scatters_shards_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"ds.json: zero_optimization.{key}.* is not supported"):
        resolve({"zero_optimization": {"stage": 2, key: value}})


def test_zero_offloaded_optimizer_is_taken_with_shards_only() -> None:
    section = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    plan = resolve({"zero_optimization": {"stage": 1, **section}})
    assert plan.json["zero_force_ds_cpu_optimizer"] is False
    with raises_saying("ds.json: zero_optimization.offload_optimizer needs stage 1 or 2"):
        resolve({"zero_optimization": {"stage": 0, **section}})


@pytest.mark.parametrize(("compute", "stated", "precision"), [
    ("bf16", {}, "bf16"), ("bf16", {"enabled": "auto"}, "bf16"), ("fp8", {"enabled": True}, "bf16"), ("fp32", {}, "fp32"),
    ("fp32", {"enabled": "auto"}, "fp32"), ("fp32", {"enabled": False}, "fp32"),
])
def test_precision_recipe_fills_the_file(compute: str, stated: dict[str, Any], precision: str) -> None:
    plan = resolve({**ZERO2, "bf16": stated}, precision={"compute": compute})
    assert plan.precision == precision
    assert plan.json["bf16"]["enabled"] == (precision == "bf16") if plan.json.get("bf16") else precision == "fp32"


@pytest.mark.parametrize(("compute", "enabled"), [("fp32", True), ("bf16", False), ("fp8", False)])
def test_precision_stated_twice_and_differently_is_refused(compute: str, enabled: bool) -> None:
    with raises_saying(f"ds.json: bf16.enabled={str(enabled).lower()} contradicts precision.compute={compute} of the recipe"):
        resolve({**ZERO2, "bf16": {"enabled": enabled}}, precision={"compute": compute})


def test_precision_left_open_by_both_is_refused() -> None:
    with raises_saying('ds.json: bf16.enabled is "auto" and so is the recipe\'s precision.compute: state one of them'):
        resolve({**ZERO2, "bf16": {"enabled": "auto"}})


def test_zero_round_robin_switched_off_is_taken() -> None:
    assert resolve({"zero_optimization": {"stage": 2, "round_robin_gradients": False}}).zero_stage == 2


@pytest.mark.parametrize(("key", "section", "owner"), [
    ("fp16", {"enabled": True}, "bf16 in this file: fp16 loss scaling is not supported"),
    ("fp16", {"loss_scale": 0}, "bf16 in this file: fp16 loss scaling is not supported"),
    ("optimizer", {"type": "AdamW"}, "the optimizer section of the recipe"),
    ("scheduler", {"type": "WarmupLR"}, "optimizer.schedule of the recipe"),
    ("activation_checkpointing", {"partition_activations": True}, "parallel.activation_checkpointing of the recipe"),
    ("tensorboard", {"enabled": True}, "logging.tensorboard of the recipe"),
    ("elasticity", {"enabled": True}, "train.global_batch_size of the recipe"),
])
def test_section_that_the_recipe_owns_is_refused(key: str, section: dict[str, Any], owner: str) -> None:
    with raises_saying(f"ds.json: {key} does not belong here; use {owner}"):
        resolve({**ZERO2, key: section})


def test_fp16_switched_off_is_taken() -> None:
    assert resolve({**ZERO2, "fp16": {"enabled": False}}).precision == "fp32"


def test_bf16_under_zero_stage_zero_is_refused() -> None:
    with raises_saying("ds.json: bf16.enabled with zero_optimization.stage=0 leaves experts out of the gradient norm"):
        resolve({"bf16": {"enabled": True}})


def test_bf16_under_its_old_name_is_not_taken_for_fp32() -> None:
    # DeepSpeed still reads `bfloat16` (runtime/precision_config.py, BFLOAT16_OLD): the engine would train in bf16.
    try:
        plan = resolve({**ZERO2, "bfloat16": {"enabled": True}})
    except ConfigError:
        return
    assert plan.precision == "bf16"


def test_amp_switched_on_is_refused() -> None:
    # DeepSpeed would hand model and optimizer to apex.amp.
    with pytest.raises(ConfigError, match="amp"):
        resolve({**ZERO2, "amp": {"enabled": True}})


@pytest.mark.parametrize("key", ["zero_optimization", "bf16"])
@pytest.mark.parametrize("value", [5, None, [1]])
def test_section_that_is_no_object_is_refused(key: str, value: Any) -> None:
    with raises_saying(f"ds.json: {key} must be an object, found {value!r}"):
        resolve({key: value})
