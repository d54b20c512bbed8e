"""Sizes computed from the config against the models that are built from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from promoe_ds.config import (
    RunConfig,
    count_parameters,
    list_recipes,
    load_config,
)
from promoe_ds.config.accounting import forward_flops_per_image
from promoe_ds.model import DiT, build_model

from ..builders import (
    METHODS,
    MODERN,
    NO_NULL,
    TEXT,
    condition_of,
    of_method,
    packaged_config,
    random_network,
    random_tensor,
    small_config,
)

#: Total and activated parameters of the published models (ProMoE, Table 2).
PUBLISHED = {
    "promoe_s": (75_543_584, 32_993_312),
    "promoe_b": (300_607_520, 130_572_320),
    "promoe_l": (1_062_684_704, 458_262_560),
    "promoe_xl": (1_567_733_792, 675_339_296),
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "dense": {"routing": {"method": "dense"}},
    "dense with all moe_blocks": {"routing": {"method": "dense", "moe_blocks": "all"}},
    "qk_norm": {"model": {"qk_norm": True}},
    "all blocks": {"routing": {"moe_blocks": "all"}},
    "odd depth": {"model": {"depth": 5}},
    "text": TEXT,
    "no null label": NO_NULL,
    "wide heads": {"model": {"head_dim": 12}},
    "text, wide heads": {"model": {**TEXT["model"], "head_dim": 12, "mlp_type": "swiglu"}},
    "dense swiglu": {"model": {"mlp_type": "swiglu"}, "routing": {"method": "dense"}},
    "modern": MODERN,
    "modern, dense": {**MODERN, "routing": {"method": "dense"}},
    "text, modern": {"model": {**TEXT["model"], **MODERN["model"]}},
    "modern without qk_norm": {"model": {**MODERN["model"], "qk_norm": False}},
    "text, pooled as wide": {"model": {**TEXT["model"], "text_pooled_width": None}},
    "no shared": {"routing": {"num_shared_experts": 0}},
    "two shared": {"routing": {"num_shared_experts": 2}},
    "no unconditional": {"routing": {"num_unconditional_experts": 0}},
    "two unconditional": {"routing": {"num_unconditional_experts": 2}},
    "neither": {"routing": {"num_shared_experts": 0, "num_unconditional_experts": 0}},
    "no learned sigma": {"model": {"learn_sigma": False}},
    "widths": {
        "routing": {
            "expert_width": 24,
            "shared_expert_width": 40,
            "num_shared_experts": 2,
            "top_k": 3,
        }
    },
    "shapes": {
        "model": {
            "input_size": 6,
            "patch_size": 3,
            "in_channels": 3,
            "mlp_ratio": 2.5,
            "num_classes": 7,
        }
    },
}
#: Experts of every kind: types, shared and unconditional ones.
EXPERTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "swiglu": {"expert_type": "swiglu"},
    "swiglu, two shared gelu": {
        "expert_type": "swiglu",
        "shared_expert_type": "gelu",
        "num_shared_experts": 2,
    },
    "two shared swiglu of their own width": {
        "shared_expert_type": "swiglu",
        "num_shared_experts": 2,
        "shared_expert_width": 40,
    },
    "swiglu, three unconditional": {"expert_type": "swiglu", "num_unconditional_experts": 3},
    "swiglu alone": {
        "expert_type": "swiglu",
        "num_shared_experts": 0,
        "num_unconditional_experts": 0,
    },
}


def on_meta(config: RunConfig) -> DiT:
    with torch.device("meta"):
        return build_model(config)


def check_against_model(config: RunConfig) -> None:
    network, count = on_meta(config), count_parameters(config)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".moe.routed." in name)
    unconditional = sum(size for name, size in sizes.items() if ".moe.unconditional." in name)
    assert count.trainable == sum(sizes.values())
    assert (count.routed, count.unconditional) == (routed, unconditional)
    assert count.position_embedding == network.positions.numel()
    active = routed * config.routing.top_k // config.routing.num_experts
    assert count.activated == count.total - unconditional - routed + active


@pytest.mark.parametrize("name", list_recipes())
def test_parameters_of_recipe_equal_those_of_the_built_model(name: str, tmp_path: Path) -> None:
    check_against_model(packaged_config(name, tmp_path))


@pytest.mark.parametrize("experts", EXPERTS.values(), ids=EXPERTS.keys())
@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_every_method_equal_those_of_the_built_model(
    method: str, experts: dict[str, Any]
) -> None:
    check_against_model(small_config(**of_method(method, **experts)))


def test_parameters_of_expert_race_without_per_layer_loss_lack_its_head() -> None:
    check_against_model(small_config(**of_method("expert_race", per_layer_weight=0.0)))


@pytest.mark.parametrize("setting", SETTINGS)
def test_parameters_of_odd_setting_equal_those_of_the_built_model(setting: str) -> None:
    check_against_model(small_config(**SETTINGS[setting]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_recipe_equal_the_published_ones(name: str) -> None:
    count = count_parameters(load_config(name))
    assert (count.total, count.activated) == PUBLISHED[name]


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
def test_parameters_activated_of_promoe_are_nearly_those_of_dit(size: str) -> None:
    moe, dense = (
        count_parameters(load_config(f"promoe_{size}")),
        count_parameters(load_config(f"dit_{size}")),
    )
    assert dense.activated == dense.total
    # The routed half and the shared half make up one dense feed-forward; 12 prototypes and the
    # second bias come on top.
    assert (
        moe.activated - dense.activated
        == moe.moe_layers * 13 * load_config(f"promoe_{size}").model.hidden_size
    )


@pytest.mark.parametrize("recipe", ["promoe_b", "digits_promoe", "emoji_promoe"])
def test_parameters_and_flops_of_a_modern_recipe_are_nearly_those_of_its_base(recipe: str) -> None:
    base, modern = load_config(recipe), load_config(f"{recipe}_modern")
    before, after = count_parameters(base), count_parameters(modern)
    assert after.activated == pytest.approx(before.activated, rel=0.01)
    assert after.total == pytest.approx(before.total, rel=0.03)
    assert forward_flops_per_image(modern) == pytest.approx(forward_flops_per_image(base), rel=0.01)


@pytest.mark.parametrize(
    "setting",
    [
        "plain",
        "dense",
        "all blocks",
        "odd depth",
        "no shared",
        "two shared",
        "two unconditional",
        "no learned sigma",
        "widths",
        "shapes",
        "text",
        "wide heads",
        "text, wide heads",
        "dense swiglu",
        "modern",
        "text, modern",
    ],
)
def test_forward_flops_equal_those_counted_by_torch(setting: str) -> None:
    # The loop backend and plain attention run as products that torch's counter knows.
    network = random_network(**SETTINGS[setting], parallel={"expert_backend": "loop"}).eval()
    model, images = network.config.model, 3
    latents = random_tensor(images, model.in_channels, model.input_size, model.input_size)
    counter = FlopCounterMode(display=False)
    condition = condition_of(network.config, torch.arange(images))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(latents, torch.full((images,), 500.0), condition)
    length = condition.mask_BL.shape[1] if setting.startswith("text") else 0
    assert counter.get_total_flops() == images * forward_flops_per_image(network.config, length)


@pytest.mark.parametrize("experts", EXPERTS.values(), ids=EXPERTS.keys())
@pytest.mark.parametrize("method", METHODS)
def test_forward_flops_of_every_method_equal_those_counted_by_torch(
    method: str, experts: dict[str, Any]
) -> None:
    # Two methods take as many experts as they state in training only; losses are not counted.
    silent = {"similarity_weight": 0.0} if method == "expert_race" else {}
    network = random_network(
        **of_method(method, **experts, **silent), parallel={"expert_backend": "loop"}
    )
    network.train(method in ("diff_moe", "expert_race"))
    model, images = network.config.model, 3
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(random_tensor(images, 1, 4, 4), torch.full((images,), 500.0), torch.arange(images))
    counted = counter.get_total_flops()
    if method == "kmeans":  # torch's counter knows no distances
        counted += (
            2
            * images
            * model.tokens_per_image
            * model.hidden_size
            * network.config.routing.num_experts
        )
    assert counted == images * forward_flops_per_image(network.config)


def test_forward_flops_of_expert_race_include_the_head_of_the_per_layer_loss() -> None:
    width, tokens, patch = 16, 4, 4
    more, less = (
        forward_flops_per_image(small_config(**of_method("expert_race", per_layer_weight=weight)))
        for weight in (0.1, 0.0)
    )
    assert more - less == 2 * tokens * width * patch
