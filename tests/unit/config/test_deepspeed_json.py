"""The DeepSpeed JSON: strictness, "auto", contradictions, and what is refused before any process
starts.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from promoe_ds.config import (
    DS_CONFIGS_DIR,
    DeepSpeedPlan,
    plan_batches,
    read_deepspeed_json,
    resolve_deepspeed,
)

from ..builders import small_config
from .said import refuses

DS_CONFIGS = Path(__file__).parents[3] / "ds_configs"
ZERO2 = {"zero_optimization": {"stage": 2}}


def resolve(values: dict[str, Any], ranks: int = 2, **sections: dict[str, Any]) -> DeepSpeedPlan:
    config = small_config(train={"global_batch_size": 12, "micro_batch_size": 3}, **sections)
    return resolve_deepspeed(values, config, plan_batches(config, ranks), source="ds.json")


def test_packaged_files_equal_those_of_the_checkout_and_resolve() -> None:
    packaged = {file.name: file.read_text(encoding="utf-8") for file in DS_CONFIGS_DIR.iterdir()}
    assert set(packaged) == {"zero0_fp32.json", "zero2_fp32.json", "zero2_bf16.json"}
    for name, text in packaged.items():
        assert text == (DS_CONFIGS / name).read_text(encoding="utf-8")
        plan = resolve(read_deepspeed_json(DS_CONFIGS / name))
        assert (plan.zero_stage, plan.precision) == (int(name[4]), name[6:10])
        assert "auto" not in json.dumps(plan.json)


# Reading.


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_plain_object_is_read(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(mark + '{"bf16": {"enabled": true}, "x": [1, 2.5, null]}', encoding="utf-8")
    assert read_deepspeed_json(path) == {"bf16": {"enabled": True}, "x": [1, 2.5, None]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1 // why\n}', ("line 1", "comment")),
        (b'{\n"a": 1,\n/* why */ "b": 2}', ("line 3", "comment")),
        (b'{\n"a": [1,\n],}', ("line ", "comma")),
        (b'{"a": 1, "a": 2}', ("the key 'a' is given twice",)),
        (b'{"zero": {"stage": 1, "stage": 2}}', ("the key 'stage' is given twice",)),
        (b"{'a': 1}", ("line 1", "double quotes")),
        (b"", ("line 1",)),
        (b'{"a": "\xff"}', ("not strict JSON",)),
        (b"[" * 100_000, ("not strict JSON",)),
        (b"[1]", ("must hold a JSON object",)),
        (b"3", ("must hold a JSON object",)),
        (None, ("cannot be read",)),
    ],
    ids=range(12),
)
def test_json_not_strict_is_refused_with_file_and_place(
    tmp_path: Path, content: bytes | None, said: tuple[str, ...]
) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content)
    with refuses(f"--deepspeed_config {path}", *said):
        read_deepspeed_json(path)


# Filling.


@pytest.mark.parametrize(
    ("whole", "micro", "accumulation", "clipping"),
    [(None, None, None, None), ("auto", "auto", "auto", "auto"), (12, 3, 2, 0.25)],
)
def test_auto_missing_or_equal_values_give_the_same_plan(
    whole: Any, micro: Any, accumulation: Any, clipping: Any
) -> None:
    stated = {
        "train_batch_size": whole,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clipping,
    }
    values = {**ZERO2, **{key: value for key, value in stated.items() if value is not None}}
    before = copy.deepcopy(values)
    filled = resolve(values, optimizer={"max_grad_norm": 0.25}).json
    assert [filled[key] for key in stated] == [12, 3, 2, 0.25]
    assert values == before


def test_resolve_keeps_what_it_does_not_own_and_admits_our_optimizer() -> None:
    values = {**ZERO2, "communication_data_type": "fp32", "steps_per_print": 5}
    filled = resolve(values).json
    assert values.items() <= filled.items()
    assert filled["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("section", [None, {}, {"stage": 0}, {"stage": 1}, {"stage": 2}])
def test_zero_stages_up_to_two_are_taken(section: dict[str, int] | None) -> None:
    plan = resolve({} if section is None else {"zero_optimization": section})
    assert (plan.zero_stage, plan.precision) == ((section or {}).get("stage", 0), "fp32")
    # At stage 0 DeepSpeed averages the norms of ranks that hold different experts: the trainer
    # clips.
    assert plan.json["gradient_clipping"] == (0.5 if plan.zero_stage else 0.0)


def test_zero_offloaded_optimizer_is_taken_with_shards_only_and_none_is_no_offload() -> None:
    section = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    plan = resolve({"zero_optimization": {"stage": 1, **section}})
    assert plan.offloads and plan.json["zero_force_ds_cpu_optimizer"] is False
    with refuses("ds.json: zero_optimization.offload_optimizer", "stage 1 or 2"):
        resolve({"zero_optimization": {"stage": 0, **section}})
    none = {"offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}
    plan = resolve({"zero_optimization": {"stage": 0, **none}})
    assert (plan.offloads, plan.json["zero_optimization"]) == (False, {"stage": 0})


@pytest.mark.parametrize(
    ("compute", "bf16", "precision"),
    [
        ("auto", {"enabled": True}, "bf16"),
        ("auto", {"enabled": False}, "fp32"),
        ("auto", {}, "fp32"),
        ("bf16", {}, "bf16"),
        ("bf16", {"enabled": "auto"}, "bf16"),
        ("fp8", {"enabled": True}, "bf16"),
        ("fp32", {}, "fp32"),
        ("fp32", {"enabled": "auto"}, "fp32"),
        ("fp32", {"enabled": False}, "fp32"),
    ],
)
def test_precision_is_of_recipe_and_file_together(
    compute: str, bf16: dict[str, Any], precision: str
) -> None:
    plan = resolve({**ZERO2, "bf16": bf16}, precision={"compute": compute})
    assert plan.precision == precision
    assert plan.json["bf16"].get("enabled", False) == (precision == "bf16")


# Refusing.


@pytest.mark.parametrize(
    ("compute", "values", "said"),
    [
        ("auto", {"train_batch_size": 13}, "train_batch_size=13|train.global_batch_size=12"),
        (
            "auto",
            {"train_micro_batch_size_per_gpu": 4},
            "train_micro_batch_size_per_gpu=4|train.micro_batch_size=3",
        ),
        ("auto", {"gradient_accumulation_steps": 3}, "gradient_accumulation_steps=3|=2 of the"),
        ("auto", {"gradient_clipping": 1.0}, "gradient_clipping=1.0|optimizer.max_grad_norm=0.5"),
        ("fp32", {"bf16": {"enabled": True}}, "bf16.enabled=true|precision.compute=fp32"),
        ("bf16", {"bf16": {"enabled": False}}, "bf16.enabled=false|precision.compute=bf16"),
        ("fp8", {"bf16": {"enabled": False}}, "bf16.enabled=false|precision.compute=fp8"),
        ("auto", {"bf16": {"enabled": "auto"}}, "bf16.enabled|precision.compute"),
        (
            "auto",
            {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}},
            "bf16.enabled|zero_optimization.stage=0",
        ),
        ("auto", {"zero_optimizaton": {}}, "zero_optimizaton|did you mean zero_optimization?"),
        (
            "auto",
            {"zero_optimization": {"stge": 2}},
            "zero_optimization.stge|did you mean zero_optimization.stage?",
        ),
        ("auto", {"bf16": {"enable": True}}, "bf16.enable |did you mean bf16.enabled?"),
        ("auto", {"torch_autocast": {"enabled": True}}, "torch_autocast|known are"),
        ("auto", {"fp16": {"enabled": True}}, "fp16|bf16 in this file"),
        ("auto", {"fp16": {"loss_scale": 0}}, "fp16|bf16 in this file"),
        ("auto", {"amp": {"enabled": True}}, "amp|bf16 in this file"),
        ("auto", {"bfloat16": {"enabled": True}}, "bfloat16|bf16"),
        ("auto", {"optimizer": {"type": "AdamW"}}, "optimizer|the optimizer section"),
        ("auto", {"scheduler": {"type": "WarmupLR"}}, "scheduler|optimizer.schedule"),
        (
            "auto",
            {"activation_checkpointing": {"partition_activations": True}},
            "activation_checkpointing|parallel.activation_checkpointing",
        ),
        ("auto", {"tensorboard": {"enabled": True}}, "tensorboard|logging.tensorboard"),
        ("auto", {"elasticity": {"enabled": True}}, "elasticity|train.global_batch_size"),
    ],
)
def test_contradiction_or_foreign_setting_names_the_key_and_where_else_to_look(
    compute: str, values: dict[str, Any], said: str
) -> None:
    with refuses("ds.json: ", *said.split("|")):
        resolve({**ZERO2, **values}, precision={"compute": compute})


def test_fp16_switched_off_is_taken() -> None:
    assert resolve({**ZERO2, "fp16": {"enabled": False}}).precision == "fp32"


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
    with refuses(f"ds.json: zero_optimization.{key}=false"):
        resolve(values, parallel={"ep_size": ep_size})
