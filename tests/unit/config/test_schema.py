"""Every rule of the schema, and what it says when it is broken."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import BaseModel

from promoe_ds.config import RunConfig, config_from_dict, load_config
from promoe_ds.config.presets import PRESETS
from promoe_ds.errors import ConfigError

from ..builders import small_config, small_values


def build(name: str, value: Any) -> Any:
    section, _, field = name.partition(".")
    return small_config(**{section: {field: value}})


def raises_saying(message: str) -> Any:
    return pytest.raises(ConfigError, match=re.escape(message))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer.ema_decays", [], "at least 1 item"),
        ("optimizer.ema_decays", [0.9, 1.0], "less than 1"),
        ("optimizer.ema_decays", [0.9, 0.9], "ema_decays=[0.9, 0.9] holds one average twice"),
        (
            "optimizer.ema_decays",
            [0.9999, 0.9999999, 0.99999991],
            "the names ema, ema_1 keep six digits, and two are the same",
        ),
        ("optimizer.ema_sigma_rels", [0.3], "less than 0.288"),
        ("optimizer.ema_sigma_rels", [0.0], "greater than 0"),
    ],
)
def test_schema_averages_that_cannot_be_kept_are_refused(
    name: str, value: list, message: str
) -> None:
    with raises_saying(message):
        build(name, value)


def test_schema_every_number_has_a_bound_below() -> None:
    fields = {
        f"{section}.{name}": values
        for section, part in RunConfig.model_fields.items()
        if isinstance(part.annotation, type) and issubclass(part.annotation, BaseModel)
        for name, values in part.annotation.model_json_schema()["properties"].items()
    }
    numbers = {
        name: kind
        for name, values in fields.items()
        for kind in [values, *values.get("anyOf", [])]
        if kind.get("type") in ("integer", "number")
    }
    assert len(numbers) > 50
    assert [
        name for name, kind in numbers.items() if not {"minimum", "exclusiveMinimum"} & set(kind)
    ] == ["diffusion.sigma_mean"]


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("model.depth", 0, "greater than 0"),
        ("optimizer.lr", -1, "greater than 0"),
        ("train.seed", -1, "greater than or equal to 0"),
        ("routing.rcl_scope", "nonsense", ""),
        ("train.max_steps", "two", "a valid integer"),
    ],
)
def test_schema_value_that_is_none_is_refused_with_its_name_and_rule(
    name: str, value: Any, rule: str
) -> None:
    with raises_saying(f"{name}={value!r}: input should be {rule}"):
        build(name, value)


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("diffusion.label_dropout", 1.1, "less than or equal to 1"),
        ("data.heldout_fraction", 1, "less than 1"),
        ("routing.threshold_decay", 1, "less than 1"),
        ("train.seed", 2**63, f"less than {2**63}"),
    ],
)
def test_schema_field_above_its_bound_is_refused(name: str, value: float, bound: str) -> None:
    with raises_saying(f"{name}={value}: input should be {bound}"):
        build(name, value)


@pytest.mark.parametrize("name", ["", "a b", "../up", ".hidden", "a/b", "-dash"])
def test_schema_run_name_no_file_name_is_refused(name: str) -> None:
    with raises_saying(f"name={name!r}: string should"):
        config_from_dict({**small_values(), "name": name}, source="recipe")


# Rules over two fields.


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"num_heads": 3}}, "model: num_heads=3 does not divide hidden_size=16"),
        (
            {"model": {"hidden_size": 18}},
            "model: hidden_size=18 must be a multiple of 4 (sin-cos positions)",
        ),
        ({"model": {"input_size": 5}}, "model: patch_size=2 does not divide input_size=5"),
        ({"routing": {"top_k": 5}}, "routing: top_k=5 exceeds num_experts=4"),
        (
            {"parallel": {"dispatch": "local", "ep_size": 2}},
            (
                "parallel: dispatch=local keeps all experts on one rank, ep_size=2 shards them: use"
                " dispatch=alltoall (or auto), or ep_size=1"
            ),
        ),
        (
            {"data": {"dataset": "synthetic", "path": "/x"}},
            "data: path='/x' has no use for dataset=synthetic: leave it out",
        ),
        (
            {"data": {"dataset": "digits", "flip": True}},
            "data: flip=true has no use for dataset=digits: leave it out",
        ),
        (
            {"data": {"dataset": "images"}},
            "data: dataset=images encodes on the fly: set vae to the folder or hub id of an ",
        ),
        (
            {"evaluation": {"every": 50}},
            "evaluation: every=50 needs a reference: the path of an npz or of a folder of images",
        ),
        ({"evaluation": {"samples": 1}}, "evaluation: samples=1: a covariance needs at least 2"),
        (
            {"evaluation": {"every": 5, "reference": "r.npz"}, "train": {"log_every": 2}},
            (
                "evaluation.every=5 must be a multiple of train.log_every=2: its figures are part"
                " of a log line"
            ),
        ),
        (
            {"data": {"dataset": "digits", "path": "/x"}},
            "data: path='/x' has no use for dataset=digits: leave it out",
        ),
        ({"optimizer": {"lr": 1e-4, "min_lr": 1e-3}}, "optimizer: min_lr=0.001 exceeds lr=0.0001"),
        (
            {"parallel": {"ep_size": 3}},
            (
                "parallel.ep_size=3 does not divide routing.num_experts=4: every rank holds equally"
                " many"
            ),
        ),
        (
            {"routing": {"method": "dense"}, "parallel": {"ep_size": 2}},
            "routing.method=dense has none: set parallel.ep_size=1",
        ),
        (
            {"routing": {"method": "dense"}, "parallel": {"dispatch": "alltoall"}},
            "routing.method=dense has none",
        ),
        (
            {"data": {"dataset": "digits"}},
            (
                "data.dataset=digits has 8x8 images of one channel, but model.input_size=4 and "
                "model.in_channels=1"
            ),
        ),
        (
            {"data": {"dataset": "digits"}, "model": {"input_size": 8, "in_channels": 3}},
            (
                "data.dataset=digits has 8x8 images of one channel, but model.input_size=8 and"
                " model.in_channels=3"
            ),
        ),
        (
            {"data": {"dataset": "digits"}, "model": {"input_size": 8, "num_classes": 9}},
            (
                "data.dataset=digits has the labels 0..9, but model.num_classes=9: set"
                " model.num_classes=10"
            ),
        ),
    ],
)
def test_schema_fields_that_contradict_are_refused(
    sections: dict[str, dict[str, Any]], message: str
) -> None:
    with raises_saying(message):
        small_config(**sections)


@pytest.mark.parametrize("betas", [(1.0, 0.999), (-0.1, 0.9)])
def test_schema_betas_outside_zero_to_one_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="betas"):
        small_config(optimizer={"betas": betas})


@pytest.mark.parametrize(
    "name", ["optimizer.lr", "routing.rcl_weight", "diffusion.sigma_mean", "data.latent_scale"]
)
def test_schema_infinite_number_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(name)):
        build(name, float("inf"))


def test_schema_preset_of_another_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.preset"):
        small_config(model={"preset": ["s"]})


# What is derived.


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_fills_the_sizes_left_out(preset: str) -> None:
    model = small_config(model={"preset": preset, **PRESETS[preset]}).model
    values = small_values()
    for field in PRESETS[preset]:
        del values["model"][field]
    values["model"]["preset"] = preset
    assert config_from_dict(values, source="recipe").model == model


def test_preset_stated_size_wins() -> None:
    assert small_config(model={"preset": "s", "depth": 3}).model.depth == 3


def test_null_label_ten_classes_is_ten() -> None:
    assert small_config().model.null_label == 10
    assert load_config("promoe_b").model.null_label == 1000


def test_model_derived_sizes() -> None:
    model = small_config(model={"input_size": 12, "patch_size": 3, "in_channels": 4}).model
    assert (model.tokens_per_image, model.out_channels) == (16, 8)
    assert small_config(model={"in_channels": 4, "learn_sigma": False}).model.out_channels == 4


@pytest.mark.parametrize(
    ("routing", "expected"),
    [
        ({}, (32, 32)),
        ({"expert_width": 24}, (24, 24)),
        ({"shared_expert_width": 8}, (32, 8)),
        ({"expert_width": 24, "shared_expert_width": 8}, (24, 8)),
    ],
)
def test_expert_widths_follow_mlp_ratio_unless_stated(
    routing: dict[str, int], expected: tuple[int, int]
) -> None:
    config = small_config(routing=routing)
    assert (config.expert_width, config.shared_expert_width) == expected


@pytest.mark.parametrize(
    ("routing", "expected"),
    [
        ({}, (1, 3)),
        ({"moe_blocks": "all"}, (0, 1, 2, 3, 4)),
        ({"method": "dense"}, ()),
        ({"method": "dense", "moe_blocks": "all"}, ()),
    ],
)
def test_moe_blocks_are_the_odd_ones_or_all_or_none(
    routing: dict[str, str], expected: tuple[int, ...]
) -> None:
    assert small_config(model={"depth": 5}, routing=routing).moe_block_indices == expected


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({}, "local"),
        ({"ep_size": 2}, "alltoall"),
        ({"dispatch": "alltoall"}, "alltoall"),
        ({"dispatch": "local"}, "local"),
    ],
)
def test_dispatch_auto_follows_ep_size(parallel: dict[str, Any], expected: str) -> None:
    assert small_config(parallel=parallel).parallel.resolved_dispatch == expected


def test_dense_ignores_top_k_beyond_num_experts() -> None:
    assert small_config(routing={"method": "dense", "top_k": 9}).moe_block_indices == ()


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            {"capacity_factor": 2.0},
            "capacity_factor=2.0 has no use for dispatch=local (it is read by deepspeed_moe)",
        ),
        (
            {"megatron_dispatcher": "flex", "ep_size": 2},
            "megatron_dispatcher=flex has no use for dispatch=alltoall",
        ),
        (
            {"comm_dtype": "bf16"},
            "comm_dtype=bf16 has no use for dispatch=local (it is read by alltoall)",
        ),
        (
            {"dispatch": "megatron", "expert_backend": "loop"},
            "expert_backend=loop has no use for dispatch=megatron",
        ),
        (
            {"dispatch": "megatron", "activation_checkpointing": "selective"},
            "selective cannot reach inside Megatron's layer",
        ),
        (
            {"dispatch": "megatron", "megatron_dispatcher": "flex"},
            "flex needs several ranks that share experts: set ep_size above 1",
        ),
    ],
)
def test_dispatch_option_of_another_is_refused(parallel: dict[str, Any], message: str) -> None:
    with raises_saying(message):
        small_config(parallel=parallel)


@pytest.mark.parametrize("dispatch", ["deepspeed_moe", "megatron"])
@pytest.mark.parametrize("method", ["expert_choice", "ec_dit", "diff_moe", "expert_race"])
def test_dispatch_foreign_is_refused_where_experts_choose(dispatch: str, method: str) -> None:
    with raises_saying(
        f"parallel.dispatch={dispatch} asks every token for routing.top_k experts, but with"
        f" routing.method={method} experts choose: use parallel.dispatch=alltoall, or one of the"
        " methods token_choice"
    ):
        small_config(parallel={"dispatch": dispatch}, routing={"method": method})
    small_config(parallel={"dispatch": dispatch}, routing={"method": "kmeans"})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"precision": {"fp8_recipe": "block"}},
            "fp8_recipe=block has no use for compute=auto: set compute=fp8",
        ),
        (
            {"precision": {"compute": "fp8", "kernels": "torch"}},
            "kernels=torch has no FP8 path (compute=fp8)",
        ),
        (
            {"precision": {"compute": "fp8"}, "routing": {"expert_width": 24}},
            (
                "precision.compute=fp8 needs widths of a multiple of 16, but routing.expert_width"
                " is 24: change it, or use bf16"
            ),
        ),
        (
            {
                "precision": {"compute": "fp8", "fp8_recipe": "mxfp8"},
                "model": {"hidden_size": 32},
                "routing": {"expert_width": 48},
            },
            (
                "precision.fp8_recipe=mxfp8 needs widths of a multiple of 32, but"
                " routing.expert_width is 48: change it, or use bf16"
            ),
        ),
        (
            {"precision": {"compute": "fp8"}, "parallel": {"compile": True}},
            "cannot look into Transformer Engine's layers",
        ),
    ],
)
def test_precision_that_cannot_run_is_refused(
    sections: dict[str, dict[str, Any]], message: str
) -> None:
    with raises_saying(message):
        small_config(**sections)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ({}, False),
        ({"compute": "bf16"}, False),
        ({"compute": "fp8"}, True),
        ({"kernels": "transformer_engine"}, True),
    ],
)
def test_precision_takes_transformer_engine_for_fp8_or_where_asked(
    precision: dict[str, str], expected: bool
) -> None:
    assert small_config(precision=precision).precision.uses_transformer_engine is expected


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, "grouped_mm"),
        ({"parallel": {"expert_backend": "loop"}}, "loop"),
        ({"parallel": {"dispatch": "megatron"}}, "megatron"),
        ({"precision": {"compute": "fp8"}}, "transformer_engine"),
    ],
)
def test_experts_are_computed_by_who_was_chosen(
    sections: dict[str, dict[str, Any]], expected: str
) -> None:
    assert small_config(**sections).experts_by == expected
