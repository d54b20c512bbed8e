"""Every routing method as a whole network: built from a config, run, trained, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from promoe_ds.model import DiT
from promoe_ds.model.export import load_model
from promoe_ds.model.state import buffer_names, state_shapes
from promoe_ds.moe import FeedForward
from promoe_ds.moe.experts import FEED_FORWARDS
from promoe_ds.routing import ROUTERS

from ..builders import METHODS, MODERN, of_method, random_network, random_tensor, save_export
from ..routing.plans import NULL, give_state

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
        give_state(layer.router, seed=2)
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
    routing, layer = network.config.routing, network.blocks[1].moe
    assert type(layer.router) is ROUTERS[method] and layer.router.settings is routing
    assert layer.routed.expert_type == routing.expert_type
    assert (layer.shared is None) == (routing.num_shared_experts == 0)
    if layer.shared is not None:
        assert type(layer.shared) is FEED_FORWARDS[network.config.shared_expert_type]
    assert (layer.unconditional is None) == (routing.num_unconditional_experts == 0)
    if layer.unconditional is not None:
        assert type(layer.unconditional) is FEED_FORWARDS[routing.expert_type]
    assert type(network.blocks[0].feed_forward) is FeedForward  # a dense block stays a plain one


@every_method
@pytest.mark.parametrize(
    "labels", [[3, NULL, 0], [NULL, NULL], [1]], ids=["mixed", "all unconditional", "one image"]
)
@pytest.mark.parametrize(
    ("mode", "block"),
    [("none", "dit"), ("selective", "dit"), ("full", "dit"), ("full", "modern")],
)
def test_network_every_parameter_gets_a_finite_gradient(
    method: str, labels: list[int], mode: str, block: str
) -> None:
    network = make_network(
        method, model={"block": block}, parallel={"activation_checkpointing": mode}
    ).train()
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
def test_state_names_the_buffers_and_fits_its_own_model(method: str) -> None:
    network = make_network(method, model={"depth": 4})
    names = [
        f"blocks.{block}.moe.router.{name}" for block in (1, 3) for name in STATE.get(method, [])
    ]
    assert buffer_names(network.config) == names
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    assert shapes == state_shapes(network.config)


@every_method
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_export_of_every_method_is_loaded_with_its_running_state(
    method: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    network = make_network(method, **MODERN).eval()  # with SwiGLU experts
    save_export(tmp_path, network)
    loaded = load_model(tmp_path, dtype=dtype).state_dict()
    expected = network.to(dtype=dtype).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(
        value.dtype == expected[name].dtype and torch.equal(value, expected[name])
        for name, value in loaded.items()
    )
    assert all(loaded[name].dtype == torch.float32 for name in buffer_names(network.config))
