"""What a recipe's fields refuse: each rule, broken, names the fields and their values."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from promoe_ds.config import RunConfig, config_from_dict, load_config
from promoe_ds.config.routing import METHODS as TRAITS
from promoe_ds.config.routing import RoutingConfig

from ..builders import METHODS, TEXT, small_config, small_values
from .said import refuses

DDPM = {"objective": "ddpm"}
FP8 = {"compute": "fp8"}
CLASSIFICATION = {"method": "classification"}
#: Sections of a small run, and what the refusal must say.
REFUSED: list[tuple[dict[str, dict[str, Any]], tuple[str, ...]]] = [
    # Values of one field.
    ({"model": {"depth": 0}}, ("model.depth=0: ", "greater than 0")),
    ({"model": {"preset": ["s"]}}, ("model.preset",)),
    ({"routing": {"rcl_scope": "nonsense"}}, ("routing.rcl_scope=nonsense", "'rank' or 'global'")),
    ({"routing": {"threshold_decay": 1}}, ("routing.threshold_decay=1: ", "less than 1")),
    ({"diffusion": {"label_dropout": 1.1}}, ("diffusion.label_dropout=1.1", "equal to 1")),
    ({"train": {"max_steps": "two"}}, ("train.max_steps=two", "valid integer")),
    ({"train": {"seed": 2**63}}, (f"train.seed={2**63}", f"less than {2**63}")),
    ({"train": {"seed": True}}, ("train.seed=True",)),
    ({"evaluation": {"samples": 1}}, ("evaluation.samples=1: ", "greater than 1")),
    ({"optimizer": {"lr": True}}, ("optimizer.lr=True",)),
    ({"optimizer": {"lr": float("inf")}}, ("optimizer.lr=inf",)),
    ({"optimizer": {"betas": [True, 0.5]}}, ("optimizer.betas",)),
    ({"optimizer": {"betas": (1.0, 0.999)}}, ("optimizer.betas.0=1.0",)),
    ({"optimizer": {"ema_decays": []}}, ("optimizer.ema_decays", "at least 1 item")),
    ({"optimizer": {"ema_decays": [0.9, 1.0]}}, ("ema_decays.1=1.0", "less than 1")),
    ({"optimizer": {"ema_sigma_rels": [0.3]}}, ("ema_sigma_rels.0=0.3", "less than 0.288")),
    # Two of one section.
    ({"model": {"num_heads": 3}}, ("model: num_heads=3", "hidden_size=16")),
    ({"model": {"hidden_size": 18}}, ("model: hidden_size=18", "multiple of 4")),
    ({"model": {"input_size": 5}}, ("model: patch_size=2", "input_size=5")),
    ({"model": {"input_size": [4, 7]}}, ("model: patch_size=2", "input_size=4x7")),
    ({"model": {"input_size": [4]}}, ("model.input_size=[4]: ", "[height, width]")),
    ({"model": {"input_size": [4, 4, 4]}}, ("model.input_size=[4, 4, 4]: ", "[height, width]")),
    ({"model": {"input_size": [0, 4]}}, ("model.input_size=[0, 4]: ", "above 0")),
    ({"model": {"input_size": "four"}}, ("model.input_size=four: ", "whole number")),
    ({"model": {"input_size": "4x6"}}, ("model.input_size=4x6: ", "[height, width]")),
    ({"model": {"input_size": True}}, ("model.input_size=True",)),
    ({"model": {"buckets": [4, [2, 5]]}}, ("model: patch_size=2", "buckets=2x5")),
    ({"model": {"buckets": [4, [4, 4]]}}, ("model: buckets=4x4, 4x4", "twice")),
    ({"model": {"buckets": [[2, 4]]}}, ("model: input_size=4x4", "buckets=2x4")),
    ({"model": {"buckets": [4, [2, 6], [6, 4]]}}, ("model: input_size=4x4", "largest", "6x4")),
    ({"model": {"buckets": [[2, "x"], 4]}}, ("model.buckets.0=[2, 'x']: ", "whole number")),
    ({"model": {"buckets": 4}}, ("model.buckets=4: ",)),
    ({"optimizer": {"lr": 1e-4, "min_lr": 1e-3}}, ("min_lr=0.001", "lr=0.0001")),
    ({"optimizer": {"ema_decays": [0.9, 0.9]}}, ("ema_decays=[0.9, 0.9]",)),
    (
        {"optimizer": {"ema_decays": [0.9999, 0.9999999, 0.99999991]}},
        ("ema_decays=[0.9999, 0.9999999, 0.99999991]", "(ema, ema_1)"),
    ),
    (
        {"routing": {"method": "ec_dit", "capacity_schedule": [5, 2]}},
        ("routing: capacity_schedule=[5, 2]",),
    ),
    (
        {"routing": {"method": "ec_dit", "capacity_schedule": [-1, 2]}},
        ("routing.capacity_schedule.0=-1",),
    ),
    (
        {"model": {"null_row": False}},
        ("diffusion.label_dropout=0.1", "model.null_row=false", "set diffusion.label_dropout=0"),
    ),
    (
        {"model": {"null_row": False}, "diffusion": {"label_dropout": 0}},
        ("routing.num_unconditional_experts=1", "set routing.num_unconditional_experts=0"),
    ),
    (
        {"model": {**TEXT["model"], "null_row": False}, "data": TEXT["data"]},
        ("model: null_row=False", "condition=text"),
    ),
    (
        {"model": {"time": "data"}, "diffusion": DDPM},
        ("model.time=data", "objective=ddpm"),
    ),
    ({"data": {"path": "/x"}}, ("data: path=/x", "dataset=synthetic")),
    ({"data": {"dataset": "digits", "path": "/x"}}, ("data: path=/x", "dataset=digits")),
    ({"data": {"dataset": "digits", "flip": True}}, ("data: flip=true", "dataset=digits")),
    ({"data": {"dataset": "images"}}, ("data: dataset=images", "set vae")),
    ({"evaluation": {"every": 50}}, ("evaluation: every=50", "reference")),
    ({"diffusion": {**DDPM, "shift": 3.0}}, ("diffusion: shift=3.0", "objective=ddpm")),
    ({"diffusion": {**DDPM, "sigma_mean": -0.5}}, ("sigma_mean=-0.5", "objective=ddpm")),
    ({"diffusion": {**DDPM, "sigma_std": 2.0}}, ("sigma_std=2.0", "objective=ddpm")),
    ({"diffusion": {**DDPM, "train_shift": 2.0}}, ("train_shift=2.0", "objective=ddpm")),
    ({"diffusion": {**DDPM, "noise_levels": "mode"}}, ("noise_levels=mode", "objective=ddpm")),
    ({"diffusion": {"mode_scale": 1.0}}, ("mode_scale=1.0", "noise_levels=logit_normal")),
    (
        {"diffusion": {"noise_levels": "mode", "sigma_std": 2.0}},
        ("sigma_std=2.0", "noise_levels=mode"),
    ),
    ({"diffusion": {"noise_levels": "mode", "mode_scale": 2.0}}, ("mode_scale=2.0", "1.75")),
    ({"diffusion": {**DDPM, "num_train_timesteps": 20}}, ("num_train_timesteps=20", "than 20")),
    (
        {"model": {"block": "modern", "head_dim": 6}},
        ("model: block=modern", "width 6 must be a multiple of 4"),
    ),
    ({"routing": {"top_k": 5}}, ("routing: top_k=5", "num_experts=4")),
    ({"routing": CLASSIFICATION}, ("routing: method=classification", "superclass_map")),
    (
        {"routing": {"num_shared_experts": 0, "shared_expert_width": 8}},
        ("shared_expert_width=8", "num_shared_experts=0"),
    ),
    (
        {"routing": {"num_shared_experts": 0, "shared_expert_type": "swiglu"}},
        ("shared_expert_type=swiglu", "num_shared_experts=0"),
    ),
    ({"parallel": {"dispatch": "local", "ep_size": 2}}, ("dispatch=local", "ep_size=2")),
    ({"parallel": {"capacity_factor": 2.0}}, ("capacity_factor=2.0", "read by deepspeed_moe")),
    (
        {"parallel": {"megatron_dispatcher": "flex", "ep_size": 2}},
        ("megatron_dispatcher=flex", "dispatch=alltoall"),
    ),
    ({"parallel": {"comm_dtype": "bf16"}}, ("comm_dtype=bf16", "read by alltoall")),
    (
        {"parallel": {"dispatch": "megatron", "expert_backend": "loop"}},
        ("expert_backend=loop", "dispatch=megatron"),
    ),
    (
        {"parallel": {"dispatch": "megatron", "activation_checkpointing": "selective"}},
        ("activation_checkpointing=selective", "dispatch=megatron"),
    ),
    (
        {"parallel": {"dispatch": "megatron", "megatron_dispatcher": "flex"}},
        ("megatron_dispatcher=flex", "ep_size above 1"),
    ),
    ({"precision": {"fp8_recipe": "block"}}, ("fp8_recipe=block", "compute=auto")),
    ({"precision": {**FP8, "kernels": "torch"}}, ("kernels=torch", "compute=fp8")),
    # Two sections.
    (
        {"evaluation": {"every": 5, "reference": "r.npz"}, "train": {"log_every": 2}},
        ("evaluation.every=5", "train.log_every=2"),
    ),
    ({"parallel": {"ep_size": 3}}, ("parallel.ep_size=3", "routing.num_experts=4")),
    (
        {"routing": {"method": "dense"}, "parallel": {"ep_size": 2}},
        ("parallel.ep_size", "routing.method=dense"),
    ),
    (
        {"routing": {"method": "dense"}, "parallel": {"dispatch": "alltoall"}},
        ("parallel.dispatch", "routing.method=dense"),
    ),
    (
        {"routing": {"method": "ec_dit", "num_experts": 6}},
        ("routing.top_k=1 of 4 tokens", "routing.num_experts=6", "method=ec_dit"),
    ),
    (
        {"parallel": {"expert_backend": "grouped_mm"}, "routing": {"expert_width": 12}},
        ("parallel.expert_backend=grouped_mm", "width 12"),
    ),
    (
        {"routing": {"method": "ec_dit"}, "model": {"buckets": [4, [2, 2]]}},
        ("routing.top_k=1 of 1 tokens", "method=ec_dit"),
    ),
    ({"data": {"dataset": "digits"}}, ("data.dataset=digits", "model.input_size=4")),
    (
        {"data": {"dataset": "digits"}, "model": {"input_size": 8, "buckets": [8, 4]}},
        ("data.dataset=digits", "model.buckets=[8, 4]"),
    ),
    (
        {
            "data": {"dataset": "images", "path": "/x", "vae": "x"},
            "model": {"buckets": [4, [2, 6]]},
        },
        ("model.buckets", "data.dataset=images"),
    ),
    (
        {"data": {"dataset": "digits"}, "model": {"input_size": 8, "in_channels": 3}},
        ("data.dataset=digits", "model.in_channels=3"),
    ),
    (
        {"data": {"dataset": "digits"}, "model": {"input_size": 8, "num_classes": 9}},
        ("data.dataset=digits", "model.num_classes=9"),
    ),
    (
        {"diffusion": DDPM, "model": {"learn_sigma": False}},
        ("diffusion.objective=ddpm", "model.learn_sigma=false"),
    ),
    (
        {"diffusion": DDPM, "sampling": {"solver": "euler"}},
        ("sampling.solver=euler", "objective=ddpm", "ddpm, ddim or auto"),
    ),
    (
        {"sampling": {"solver": "ddim"}},
        ("sampling.solver=ddim", "objective=rectified_flow", "euler, heun, unipc, dpmpp or auto"),
    ),
    ({"diffusion": DDPM, "sampling": {"steps": 1001}}, ("sampling.steps=1001", "=1000")),
    ({"diffusion": DDPM, "sampling": {"steps": 1}}, ("sampling.steps=1:", "2 ...")),
    (
        {"diffusion": {**DDPM, "num_train_timesteps": 100}},
        ("sampling.steps=250", "num_train_timesteps=100"),
    ),
    (
        {"diffusion": DDPM, "evaluation": {"every": 50, "reference": "r.npz", "steps": 1}},
        ("evaluation.steps=1:", "2 ..."),
    ),
    (
        {"precision": FP8, "routing": {"expert_width": 24}},
        ("precision.compute=fp8", "multiple of 16", "routing.expert_width is 24"),
    ),
    (
        {
            "precision": {**FP8, "fp8_recipe": "mxfp8"},
            "model": {"hidden_size": 32},
            "routing": {"expert_width": 48},
        },
        ("fp8_recipe=mxfp8", "multiple of 32", "routing.expert_width is 48"),
    ),
    (
        {"precision": FP8, "model": {"head_dim": 12}},
        ("precision.compute=fp8", "multiple of 16", "model.num_heads * model.head_dim is 24"),
    ),
    ({"precision": FP8, "parallel": {"compile": True}}, ("parallel.compile=true",)),
    *(
        (
            {"parallel": {"dispatch": dispatch}, "routing": {"method": method}},
            (f"parallel.dispatch={dispatch}", f"routing.method={method}", "token_choice"),
        )
        for dispatch in ("deepspeed_moe", "megatron")
        for method in ("expert_choice", "ec_dit", "diff_moe", "expert_race")
    ),
]


@pytest.mark.parametrize(("sections", "said"), REFUSED, ids=lambda each: str(each)[:60])
def test_rule_broken_is_refused_by_field_and_value(
    sections: dict[str, dict[str, Any]], said: tuple[str, ...]
) -> None:
    with refuses(*said):
        small_config(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        # At their defaults, as a saved config states them, fields are taken that nothing reads.
        {"diffusion": {**DDPM, "shift": 1.0, "sigma_mean": 0.0, "sigma_std": 1.0}},
        {"sampling": {"steps": 2000}},
        {"sampling": {"steps": 1}},
        {"routing": {"method": "dense", "top_k": 9}},
        {"routing": {"method": "ec_dit", "num_experts": 6, "top_k": 2}},
        # Each expert takes at least one token there.
        {"routing": {"method": "expert_choice", "num_experts": 6}},
        {"parallel": {"dispatch": "megatron"}, "routing": {"method": "kmeans"}},
        # No block is dense.
        {
            "precision": {"compute": "fp8"},
            "model": {"mlp_ratio": 3.9},
            "routing": {"moe_blocks": "all", "expert_width": 32},
        },
    ],
)
def test_rule_is_no_stricter_than_it_must_be(sections: dict[str, dict[str, Any]]) -> None:
    config = small_config(**sections)
    for section, fields in sections.items():
        assert fields.items() <= getattr(config, section).model_dump().items()


def test_every_number_has_a_bound_below() -> None:
    kinds = {
        f"{section}.{name}": kind
        for section, part in RunConfig.model_fields.items()
        if isinstance(part.annotation, type) and issubclass(part.annotation, BaseModel)
        for name, values in part.annotation.model_json_schema()["properties"].items()
        for kind in [values, *values.get("anyOf", [])]
        if kind.get("type") in ("integer", "number")
    }
    assert len(kinds) > 50
    unbound = [name for name, kind in kinds.items() if not any("inimum" in key for key in kind)]
    assert unbound == ["diffusion.sigma_mean"]


@pytest.mark.parametrize("name", ["", "a b", "../up", ".hidden", "a/b", "-dash"])
def test_run_name_that_is_no_file_name_is_refused(name: str) -> None:
    with refuses(f"name={name}: "):
        config_from_dict({**small_values(), "name": name}, source="recipe")


# What a routing method reads.

#: A value other than the default for every field that only some methods read.
OTHER: dict[str, Any] = {
    "activation": "sigmoid",
    "score_scale": 2.0,
    "rcl_weight": 0.5,
    "rcl_temperature": 0.1,
    "rcl_scope": "rank",
    "rcl_assignments": "first",
    "balance_weight": 0.01,
    "balance_level": "sample",
    "capacity_schedule": (2, 5),
    "capacity_weight": 0.1,
    "threshold_decay": 0.9,
    "similarity_weight": 0.0,
    "per_layer_weight": 0.0,
    "classification_weight": 2.0,
    "superclass_map": "digits",
    "superclasses": (0, 1),
}


def routing(method: str, **fields: Any) -> RoutingConfig:
    needed = {"superclass_map": "digits"} if method == "classification" else {}
    return small_config(routing={"method": method, **needed, **fields}).routing


def test_methods_and_the_fields_that_some_read_are_all_tested() -> None:
    assert set(METHODS) == {*TRAITS} - {"dense"}
    assert set(OTHER) == {field for method in TRAITS.values() for field in method.reads}


@pytest.mark.parametrize("field", OTHER)
@pytest.mark.parametrize("method", METHODS)
def test_field_is_taken_by_the_methods_that_read_it_and_refused_by_the_others(
    method: str, field: str
) -> None:
    value = OTHER[field]
    if field in TRAITS[method].reads:
        assert getattr(routing(method, **{field: value}), field) == value
        return
    readers = ", ".join(reader for reader in TRAITS if field in TRAITS[reader].reads)
    with refuses(f"routing: {field}={value}", f"method={method}", f"read by {readers}"):
        routing(method, **{field: value})


@pytest.mark.parametrize("method", METHODS)
def test_fields_stated_at_their_defaults_are_taken_by_every_method(method: str) -> None:
    """A saved config states every field and must be read again."""
    defaults = {
        field: RoutingConfig.model_fields[field].default
        for field in OTHER
        if field != "superclass_map"
    }
    assert defaults.items() <= dict(routing(method, **defaults)).items()


@pytest.mark.parametrize("method", METHODS)
def test_several_choices_are_refused_where_a_token_has_one_expert(method: str) -> None:
    if not TRAITS[method].single_choice:
        assert routing(method, top_k=4).top_k == 4
        return
    with refuses("routing: top_k=2", f"method={method}"):
        routing(method, top_k=2)


def test_dense_takes_inherited_numbers_of_experts_and_refuses_router_settings() -> None:
    dense = ["routing.method=dense", "routing.top_k=2", "parallel.ep_size=1"]
    assert load_config("digits_promoe", dense).moe_block_indices == ()
    with refuses("superclass_map=digits", "method=dense", "read by classification"):
        load_config("digits_classification", dense)
