"""What follows from a recipe's fields: sizes, blocks, widths, backends, the solver."""

from __future__ import annotations

from typing import Any

import pytest

from promoe_ds.config import RunConfig, config_from_dict
from promoe_ds.config.model import PRESETS

from ..builders import MODERN, small_config, small_values

#: Sections of a small run, a property, its value.
DERIVED: list[tuple[dict[str, dict[str, Any]], str, Any]] = [
    ({}, "model.null_label", 10),
    ({"model": {"preset": "s", "depth": 3}}, "model.depth", 3),
    ({"model": {"input_size": 12, "patch_size": 3}}, "model.tokens_per_image", 16),
    ({"model": {"input_size": [8, 12]}}, "model.tokens_per_image", 24),
    ({"model": {"input_size": [8, 12]}}, "model.latent_size", (8, 12)),
    ({"model": {"input_size": [8, 12]}}, "model.patch_grid", (4, 6)),
    ({"model": {"input_size": [8, 8]}}, "model.input_size", 8),
    ({"model": {"input_size": ["8", "12"]}}, "model.input_size", (8, 12)),
    ({}, "model.sizes", ((4, 4),)),
    ({"model": {"buckets": [[2, 6], 4]}}, "model.sizes", ((2, 6), (4, 4))),
    ({"model": {"buckets": [[2, 6], 4]}}, "model.tokens_per_image", 4),
    ({"model": {"buckets": [[2, 6], 4]}}, "model.fewest_tokens", 3),
    ({"model": {"in_channels": 4}}, "model.out_channels", 8),
    ({"model": {"in_channels": 4, "learn_sigma": False}}, "model.out_channels", 4),
    ({"model": {"depth": 5}}, "moe_block_indices", (1, 3)),
    (
        {"model": {"depth": 5}, "routing": {"moe_blocks": "all"}},
        "moe_block_indices",
        (0, 1, 2, 3, 4),
    ),
    ({"routing": {"method": "dense", "moe_blocks": "all"}}, "moe_block_indices", ()),
    ({}, "parallel.resolved_dispatch", "local"),
    ({"parallel": {"ep_size": 2}}, "parallel.resolved_dispatch", "alltoall"),
    ({"parallel": {"dispatch": "alltoall"}}, "parallel.resolved_dispatch", "alltoall"),
    ({"precision": {"compute": "bf16"}}, "precision.uses_transformer_engine", False),
    ({"precision": {"compute": "fp8"}}, "precision.uses_transformer_engine", True),
    ({"precision": {"kernels": "transformer_engine"}}, "precision.uses_transformer_engine", True),
    ({}, "expert_backend", "auto"),
    ({"routing": {"expert_width": 12}}, "expert_backend", "loop"),
    ({"routing": {"shared_expert_width": 12}}, "expert_backend", "auto"),
    ({"parallel": {"expert_backend": "loop"}}, "expert_backend", "loop"),
    ({"routing": {"expert_type": "swiglu"}}, "shared_expert_type", "swiglu"),
    ({"routing": {"shared_expert_type": "swiglu"}}, "shared_expert_type", "swiglu"),
    (
        {"routing": {"expert_type": "swiglu", "shared_expert_type": "gelu"}},
        "shared_expert_type",
        "gelu",
    ),
    (MODERN, "model.qk_norm", True),
    (MODERN, "model.mlp_type", "swiglu"),
    (MODERN, "routing.expert_type", "swiglu"),
    ({"model": {"block": "modern", "qk_norm": False}}, "model.qk_norm", False),
    ({**MODERN, "routing": {"expert_type": "gelu"}}, "shared_expert_type", "gelu"),
    ({"model": {"block": "modern", "hidden_size": 192}}, "dense_width", 512),
    ({"model": {"block": "modern", "hidden_size": 192}}, "expert_width", 256),
    ({"model": {"block": "modern", "hidden_size": 128}}, "dense_width", 352),
    ({"model": {"block": "modern", "mlp_type": "gelu"}}, "dense_width", 64),
    ({**MODERN, "routing": {"expert_width": 24}}, "expert_width", 24),
    ({"model": {"mlp_type": "swiglu"}}, "dense_width", 64),
    ({"routing": {"method": "expert_race"}}, "target_patch_values", 4),
    ({"routing": {"method": "expert_race", "per_layer_weight": 0.0}}, "target_patch_values", 0),
    ({}, "target_patch_values", 0),
    ({}, "resolved_solver", "euler"),
    ({"diffusion": {"objective": "ddpm"}}, "resolved_solver", "ddpm"),
    (
        {"diffusion": {"objective": "ddpm"}, "sampling": {"solver": "ddim"}},
        "resolved_solver",
        "ddim",
    ),
]


def value_of(config: RunConfig, name: str) -> Any:
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("sections", "name", "expected"), DERIVED, ids=str)
def test_derived(sections: dict[str, dict[str, Any]], name: str, expected: Any) -> None:
    assert value_of(small_config(**sections), name) == expected


@pytest.mark.parametrize("sections", [MODERN, {**MODERN, "routing": {"method": "dense"}}])
def test_modern_block_read_from_its_own_saved_values_is_the_same(sections: dict) -> None:
    config = small_config(**sections)
    assert config_from_dict(config.model_dump(mode="json"), source="saved") == config


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_fills_the_sizes_left_out(preset: str) -> None:
    values = small_values()
    values["model"] = {"preset": preset, "num_classes": 7}
    model = config_from_dict(values, source="recipe").model
    assert PRESETS[preset].items() <= dict(model).items()


@pytest.mark.parametrize(
    ("ratio", "routing", "expected"),
    [
        (4.0, {"num_shared_experts": 0}, (64, 64)),
        (4.0, {}, (32, 32)),
        (4.0, {"num_shared_experts": 2}, (21, 21)),
        (2.5, {}, (20, 20)),
        (4.0, {"num_shared_experts": 200}, (1, 1)),
        (4.0, {"expert_width": 24}, (24, 24)),
        (4.0, {"shared_expert_width": 8}, (32, 8)),
        (4.0, {"expert_width": 24, "shared_expert_width": 8}, (24, 8)),
    ],
)
def test_expert_width_shares_a_dense_width_with_the_shared_experts(
    ratio: float, routing: dict[str, int], expected: tuple[int, int]
) -> None:
    config = small_config(model={"mlp_ratio": ratio}, routing=routing)
    assert (config.expert_width, config.shared_expert_width) == expected
