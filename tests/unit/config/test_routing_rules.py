"""Which fields a routing method reads, what it refuses, and the widths and types that follow from
the section.
"""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest

from promoe_ds.config import load_config
from promoe_ds.config.routing import METHODS as TRAITS
from promoe_ds.config.routing import RoutingConfig, RoutingMethod
from promoe_ds.errors import ConfigError

from ..builders import small_config

METHODS = tuple(method for method in get_args(RoutingMethod) if method != "dense")
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
    "capacity_weight": 0.1,
    "threshold_decay": 0.9,
    "similarity_weight": 0.0,
    "per_layer_weight": 0.0,
    "classification_weight": 2.0,
    "superclass_map": "digits",
    "superclasses": (0, 1),
}
#: What each method reads, written down a second time.
READS = {
    "token_choice": {
        "activation",
        "score_scale",
        "rcl_weight",
        "rcl_temperature",
        "rcl_scope",
        "rcl_assignments",
        "balance_weight",
        "balance_level",
    },
    "expert_choice": {"activation", "score_scale", "rcl_weight", "rcl_temperature", "rcl_scope"},
    "dit_moe": {"balance_weight", "balance_level"},
    "ec_dit": set(),
    "diff_moe": {"capacity_weight", "threshold_decay"},
    "expert_race": {"activation", "threshold_decay", "similarity_weight", "per_layer_weight"},
    "classification": {"classification_weight", "superclass_map", "superclasses"},
    "kmeans": set(),
    "hash": set(),
}


def routing(method: str, **fields: Any) -> RoutingConfig:
    needed = {"superclass_map": "digits"} if method == "classification" else {}
    return small_config(routing={"method": method, **needed, **fields}).routing


def raises_saying(message: str) -> Any:
    return pytest.raises(ConfigError, match=re.escape(message))


def test_rules_cover_every_method_and_field() -> None:
    assert set(READS) == set(METHODS)
    assert get_args(RoutingMethod) == tuple(TRAITS)
    assert set(OTHER) == {field for method in TRAITS.values() for field in method.reads}
    assert all(RoutingConfig.model_fields[field].default != value for field, value in OTHER.items())


@pytest.mark.parametrize("field", OTHER)
@pytest.mark.parametrize("method", METHODS)
def test_field_is_taken_by_the_methods_that_read_it_and_refused_by_the_others(
    method: str, field: str
) -> None:
    value = OTHER[field]
    if field in READS[method]:
        assert getattr(routing(method, **{field: value}), field) == value
        return
    readers = ", ".join(reader for reader in METHODS if field in READS[reader])
    with raises_saying(
        f"routing: {field}={value} has no use for method={method} (it is read by {readers}): leave"
        " it out"
    ):
        routing(method, **{field: value})


@pytest.mark.parametrize("method", METHODS)
def test_fields_stated_at_their_defaults_are_taken_by_every_method(method: str) -> None:
    """A saved config states every field and must be read again."""
    defaults = {
        field: RoutingConfig.model_fields[field].default
        for field in OTHER
        if field != "superclass_map"
    }
    found = routing(method, **defaults)
    assert {field: getattr(found, field) for field in defaults} == defaults


@pytest.mark.parametrize("method", METHODS)
def test_more_choices_than_experts_are_refused(method: str) -> None:
    with raises_saying("routing: top_k=5 exceeds num_experts=4"):
        routing(method, top_k=5)


@pytest.mark.parametrize("method", METHODS)
def test_several_choices_are_refused_where_a_token_has_one_expert(method: str) -> None:
    if not TRAITS[method].single_choice:
        assert routing(method, top_k=4).top_k == 4
        return
    with raises_saying(
        f"routing: top_k=2: method={method} gives every token one expert (Sec. 4.3): set top_k=1"
    ):
        routing(method, top_k=2)


def test_classification_without_map_is_refused() -> None:
    with raises_saying(
        "routing: method=classification needs superclass_map: a packaged map's name or the path of"
        " a YAML file"
    ):
        small_config(routing={"method": "classification"})


def test_ec_dit_with_less_than_a_token_per_expert_and_image_is_refused() -> None:
    with raises_saying(
        "routing.top_k=1 of 4 tokens per image gives each of routing.num_experts=6 experts less"
        " than one token (method=ec_dit): raise top_k or lower num_experts"
    ):
        small_config(routing={"method": "ec_dit", "num_experts": 6})
    assert (
        small_config(routing={"method": "ec_dit", "num_experts": 6, "top_k": 2}).routing.top_k == 2
    )


def test_expert_choice_with_less_than_a_token_per_expert_is_taken() -> None:
    # Each expert takes at least one token there.
    assert routing("expert_choice", num_experts=6).num_experts == 6


@pytest.mark.parametrize("method", METHODS)
def test_unconditional_and_shared_experts_are_for_every_method(method: str) -> None:
    found = routing(
        method,
        num_unconditional_experts=2,
        num_shared_experts=3,
        expert_type="swiglu",
        shared_expert_type="gelu",
    )
    assert (found.num_unconditional_experts, found.num_shared_experts) == (2, 3)


# What is derived.


@pytest.mark.parametrize(
    ("shared", "ratio", "expected"),
    [(0, 4.0, 64), (1, 4.0, 32), (2, 4.0, 21), (3, 4.0, 16), (1, 2.5, 20), (200, 4.0, 1)],
)
def test_expert_width_shares_a_dense_width_with_the_shared_experts(
    shared: int, ratio: float, expected: int
) -> None:
    config = small_config(model={"mlp_ratio": ratio}, routing={"num_shared_experts": shared})
    assert (config.expert_width, config.shared_expert_width) == (expected, expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "gelu"),
        ({"expert_type": "swiglu"}, "swiglu"),
        ({"shared_expert_type": "swiglu"}, "swiglu"),
        ({"expert_type": "swiglu", "shared_expert_type": "gelu"}, "gelu"),
    ],
)
def test_shared_expert_type_is_the_experts_unless_stated(
    fields: dict[str, str], expected: str
) -> None:
    assert small_config(routing=fields).shared_expert_type == expected


@pytest.mark.parametrize(
    ("method", "fields", "expected"),
    [
        ("expert_race", {}, 12),
        ("expert_race", {"per_layer_weight": 0.0}, 0),
        ("token_choice", {}, 0),
        ("kmeans", {}, 0),
    ],
)
def test_target_patch_values_are_those_of_a_patch_of_the_target(
    method: str, fields: dict[str, Any], expected: int
) -> None:
    config = small_config(model={"in_channels": 3}, routing={"method": method, **fields})
    assert config.target_patch_values == expected


@pytest.mark.parametrize("width", [12, 16])
def test_expert_backend_auto_follows_the_routed_experts_width(width: int) -> None:
    config = small_config(
        routing={"expert_width": width, "shared_expert_width": 12, "expert_type": "swiglu"}
    )
    assert config.expert_backend == ("grouped_mm" if width == 16 else "loop")


def test_dense_takes_inherited_numbers_of_experts_and_refuses_router_settings() -> None:
    dense = [
        "routing.method=dense",
        "routing.num_experts=12",
        "routing.top_k=2",
        "parallel.ep_size=1",
    ]
    assert load_config("digits_promoe", dense).moe_block_indices == ()
    with raises_saying(
        "superclass_map=digits has no use for method=dense (it is read by classification): leave"
        " it out"
    ):
        load_config("digits_classification", dense)


@pytest.mark.parametrize("setting", [{"shared_expert_width": 8}, {"shared_expert_type": "swiglu"}])
def test_shared_settings_without_shared_experts_are_refused(setting: dict[str, Any]) -> None:
    with raises_saying("has no use for num_shared_experts=0: leave it out"):
        small_config(routing={"num_shared_experts": 0, **setting})
