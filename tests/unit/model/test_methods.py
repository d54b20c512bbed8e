"""Every routing method as a whole network: built from a config, run, trained, cut into patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.model import DiT, build_model, initialise
from promoe_ds.model.export import load_model, save_export
from promoe_ds.model.state import buffer_names, check_state
from promoe_ds.moe import FeedForward
from promoe_ds.moe.experts import FEED_FORWARDS
from promoe_ds.routing import ClassificationRouter, build_router

from ..builders import METHODS, of_method, random_network, random_tensor, small_config
from ..routing.plans import SUPERCLASSES

NULL = 10
TYPES: dict[str, dict[str, Any]] = {
    "gelu": {},
    "swiglu": {"expert_type": "swiglu"},
    "shared swiglu": {"shared_expert_type": "swiglu", "num_shared_experts": 2},
    "swiglu, shared gelu": {
        "expert_type": "swiglu",
        "shared_expert_type": "gelu",
        "num_unconditional_experts": 2,
    },
    "alone": {"num_shared_experts": 0, "num_unconditional_experts": 0},
}
STATE = {"diff_moe": ["thresholds"], "expert_race": ["threshold"], "kmeans": ["centroids"]}

every_method = pytest.mark.parametrize("method", METHODS)


def make_network(method: str, **sections: Any) -> DiT:
    network = random_network(**{**of_method(method, **sections.pop("routing", {})), **sections})
    for layer in network.moe_layers().values():
        if isinstance(layer.router, ClassificationRouter):
            layer.router.set_superclasses(SUPERCLASSES)
        for name, buffer in layer.router.named_buffers():
            buffer.copy_(
                random_tensor(*buffer.shape, seed=2)
                if name == "centroids"
                else torch.full_like(buffer, 0.4)
            )
    return network


def denoise(network: DiT, labels: list[int]):
    model = network.config.model
    latents = random_tensor(len(labels), model.in_channels, model.input_size, model.input_size)
    return network.denoise(latents, torch.linspace(0, 1000, len(labels)), torch.tensor(labels))


@every_method
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES.keys())
def test_network_of_every_method_is_built_of_what_the_config_says(
    method: str, types: dict[str, Any]
) -> None:
    network = make_network(method, routing=types)
    config, layer = network.config, network.blocks[1].moe
    assert type(layer.router) is type(build_router(config))
    assert (layer.router.num_experts, layer.router.top_k) == (4, config.routing.top_k)
    assert layer.routed.expert_type == config.routing.expert_type
    for module, expert_type, width in (
        (
            layer.shared,
            config.shared_expert_type,
            config.routing.num_shared_experts * config.shared_expert_width,
        ),
        (
            layer.unconditional,
            config.routing.expert_type,
            config.routing.num_unconditional_experts * config.expert_width,
        ),
    ):
        if not width:
            assert module is None
            continue
        assert type(module) is FEED_FORWARDS[expert_type] and module.up.out_features == width
    assert type(network.blocks[0].feed_forward) is FeedForward  # a dense block stays a plain one


@every_method
def test_network_untrained_returns_exactly_zero(method: str) -> None:
    network = build_model(small_config(**of_method(method, expert_type="swiglu")))
    initialise(network, 0)
    assert torch.count_nonzero(denoise(network.eval(), [1, NULL, 2]).prediction_BZHW) == 0


@every_method
@pytest.mark.parametrize(
    "labels", [[3, NULL, 0], [NULL, NULL], [1]], ids=["mixed", "all unconditional", "one image"]
)
@pytest.mark.parametrize("mode", ["none", "full"])
def test_network_every_parameter_gets_a_finite_gradient(
    method: str, labels: list[int], mode: str
) -> None:
    network = make_network(method, parallel={"activation_checkpointing": mode}).train()
    output = denoise(network, labels)
    loss = output.prediction_BZHW.square().mean()
    for plan in output.plans.values():
        predicted = (
            [] if plan.target_patches_BSP is None else [plan.target_patches_BSP.square().mean()]
        )
        loss = sum([*plan.aux_losses.values(), *predicted], loss)
    loss.backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@every_method
def test_network_checkpointing_equals_none_to_the_last_bit(method: str) -> None:
    results = []
    for mode in ("none", "full"):
        network = make_network(method, parallel={"activation_checkpointing": mode}).train()
        output = denoise(network, [3, NULL, 0])
        plan = output.plans[1]
        (
            output.prediction_BZHW.square().mean() + sum(plan.aux_losses.values(), torch.zeros(()))
        ).backward()
        gradients = [
            parameter.grad for parameter in network.parameters() if parameter.grad is not None
        ]
        results.append(
            [
                output.prediction_BZHW,
                *gradients,
                *([] if plan.observation is None else [plan.observation]),
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_method
def test_network_in_bf16_keeps_its_running_state_in_fp32(method: str) -> None:
    network = make_network(method).bfloat16()
    assert all(
        buffer.dtype == torch.float32
        for layer in network.moe_layers().values()
        for buffer in layer.router.buffers()
    )
    assert denoise(network, [3, NULL, 0]).prediction_BZHW.isfinite().all()


@every_method
def test_state_names_the_buffers_and_fits_its_own_model(method: str) -> None:
    network = make_network(method, model={"depth": 4})
    names = [
        f"blocks.{block}.moe.router.{name}" for block in (1, 3) for name in STATE.get(method, [])
    ]
    assert buffer_names(network.config) == names
    check_state(network.state_dict(), network.config)


@every_method
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_export_of_every_method_is_loaded_with_its_running_state(
    method: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    network = make_network(method, routing={"expert_type": "swiglu"}).eval()
    save_export(tmp_path, network.state_dict(), network.config, origin={})
    loaded = load_model(tmp_path, dtype=dtype).state_dict()
    expected = network.to(dtype=dtype).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(
        value.dtype == expected[name].dtype and torch.equal(value, expected[name])
        for name, value in loaded.items()
    )
    assert all(loaded[name].dtype == torch.float32 for name in buffer_names(network.config))


@every_method
def test_router_settings_are_those_of_the_config(method: str) -> None:
    config = small_config(**of_method(method, num_experts=6))
    assert build_router(config).settings is config.routing


@pytest.mark.parametrize(("per_layer_weight", "values"), [(0.1, 4), (0.0, None)])
def test_router_of_expert_race_predicts_patches_where_there_is_a_loss(
    per_layer_weight: float, values: int | None
) -> None:
    head = build_router(
        small_config(**of_method("expert_race", per_layer_weight=per_layer_weight))
    ).target_head
    assert (head if head is None else head.out_features) == values


# Patches.


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"input_size": 6, "patch_size": 2, "in_channels": 3},
        {"input_size": 6, "patch_size": 3},
        {"input_size": 4, "patch_size": 1, "in_channels": 2},
    ],
)
def test_patchify_is_the_inverse_of_the_networks_own_unpatchify(model: dict[str, int]) -> None:
    network = random_network(model={**model, "learn_sigma": False})
    sizes = network.config.model
    latents = random_tensor(2, sizes.in_channels, sizes.input_size, sizes.input_size)
    patches = network.patchify(latents)
    assert patches.shape == (2, sizes.tokens_per_image, sizes.in_channels * sizes.patch_size**2)
    assert torch.equal(network._unpatchify(patches), latents)


def test_patchify_gives_each_token_the_values_of_its_own_patch() -> None:
    """The token that the patch embedding makes of some pixels is the one that is held against
    them.
    """
    network = random_network(model={"input_size": 6, "patch_size": 2})
    latents = torch.zeros(1, 1, 6, 6)
    latents[0, 0, 3, 4] = 1.0  # row 1, column 2 of the grid of three
    tokens = network.patch_embedding(latents) - network.patch_embedding(torch.zeros(1, 1, 6, 6))
    assert _touched(tokens) == _touched(network.patchify(latents)) == [5]


def _touched(tokens_BSD: Tensor) -> list[int]:
    return tokens_BSD[0].abs().sum(dim=-1).nonzero().flatten().tolist()
