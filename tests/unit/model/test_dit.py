"""The whole network: untrained output, shapes, labels, and checkpointing that changes nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.condition import Condition
from promoe_ds.errors import ConfigError
from promoe_ds.model import DiT, build_model, initialise

from ..builders import (
    METHODS,
    MODERN,
    TEXT,
    condition_of,
    of_method,
    random_network,
    random_tensor,
    randomise,
    small_config,
)
from ..routing.plans import NULL, give_state

LABELS = torch.tensor([3, NULL, 0, 7])
SETTINGS: dict[str, dict[str, Any]] = {
    "moe": {},
    "dense": {"routing": {"method": "dense"}},
    "qk_norm, all blocks": {
        "model": {"qk_norm": True, "depth": 3},
        "routing": {"moe_blocks": "all", "top_k": 2},
    },
    "no learned sigma": {"model": {"learn_sigma": False, "in_channels": 4}},
    "no unconditional": {"routing": {"num_unconditional_experts": 0, "num_shared_experts": 0}},
    "text": TEXT,
    "text, dense": {**TEXT, "routing": {"method": "dense"}},
    "not square": {"model": {"input_size": [6, 4]}},
    "modern": MODERN,
}


def inputs(network: DiT, images: int = 4) -> tuple[Tensor, Tensor, Condition]:
    model = network.config.model
    latents = random_tensor(images, model.in_channels, *model.latent_size)
    condition = condition_of(network.config, LABELS[:images])
    return latents, torch.linspace(0, 1000, images), condition


@pytest.mark.parametrize("setting", SETTINGS)
def test_network_untrained_returns_zero_and_trained_what_the_config_says(setting: str) -> None:
    network = build_model(small_config(**SETTINGS[setting]))
    initialise(network, 0)
    assert torch.count_nonzero(network(*inputs(network))) == 0
    randomise(network)
    output, config = network.denoise(*inputs(network)), network.config
    model, has_unconditional = config.model, config.routing.num_unconditional_experts > 0
    assert output.prediction_BZHW.shape == (4, model.out_channels, *model.latent_size)
    assert tuple(output.plans) == tuple(network.moe_layers()) == config.moe_block_indices
    for plan in output.plans.values():
        assert plan.stats.is_routed_B.tolist() == [True, not has_unconditional, True, True]
    assert torch.equal(output.prediction_BZHW, network(*inputs(network)))
    assert "positions" not in network.state_dict()


@pytest.mark.parametrize("setting", SETTINGS)
def test_network_output_of_an_image_does_not_depend_on_its_batch_mates(setting: str) -> None:
    network = random_network(**SETTINGS[setting], parallel={"expert_backend": "loop"}).double()
    latents, timestep, condition = inputs(network)
    together = network(latents.double(), timestep, condition)
    for i in range(len(condition)):
        one = slice(i, i + 1)
        alone = network(latents[one].double(), timestep[one], condition.select(one).counted())
        # Matrix products of another height may add in another order.
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def test_network_whose_time_runs_to_data_sees_and_predicts_the_other_way() -> None:
    """As SiT and DiffMoE train: t = 1 - sigma as it is, and clean - noise."""
    sees_noise, sees_data = random_network(), random_network(model={"time": "data"})
    latents, _, condition = inputs(sees_noise)
    t_B = torch.tensor([0.0, 0.25, 0.7, 1.0])
    published = sees_noise(latents, t_B, condition)
    found = sees_data(latents, 1000 * (1 - t_B), condition)
    torch.testing.assert_close(found, -published, rtol=1e-5, atol=1e-5)


def test_network_depends_on_label_timestep_and_position() -> None:
    network = random_network()
    (latents, timestep, _), labels = inputs(network, images=1), LABELS[:1]
    output = network(latents, timestep, labels)
    assert network(latents.double(), timestep, labels).dtype == torch.float64
    assert not torch.equal(network(latents, timestep + 1, labels), output)
    assert not torch.equal(network(latents, timestep, labels + 1), output)
    rolled = network(latents.roll(2, dims=-1), timestep, labels).roll(-2, dims=-1)
    assert not torch.allclose(rolled, output, atol=1e-3)  # a patch is not treated alike everywhere


# Activation checkpointing.


def training_pass(
    network: DiT, *, flip_prototypes: bool = False
) -> tuple[Tensor, dict[str, Tensor | None], list[Tensor]]:
    """Return loss, gradients and what the plans of one training pass hold.

    flip_prototypes: negate them between forward and backward pass, so that routing anew would
    decide otherwise.
    """
    network.train()
    for layer in network.moe_layers().values():
        give_state(layer.router, seed=2)
    output = network.denoise(*inputs(network))
    target = random_tensor(*output.prediction_BZHW.shape, seed=7)
    loss = (output.prediction_BZHW - target).square().mean()
    loss = loss + sum(value for plan in output.plans.values() for value in plan.aux_losses.values())
    if flip_prototypes:
        for layer in network.moe_layers().values():
            layer.router.prototypes.data.neg_()
    loss.backward()
    held = [
        value
        for plan in output.plans.values()
        for value in (*vars(plan.assignment).values(), plan.observation)
        if value is not None
    ]
    return loss.detach(), {name: p.grad for name, p in network.named_parameters()}, held


CHECKPOINTED: dict[str, dict[str, Any]] = {
    **{method: of_method(method) for method in METHODS},
    "balanced": {"model": {"depth": 4}, "routing": {"top_k": 2, "balance_weight": 0.1}},
    "all blocks": {"routing": {"moe_blocks": "all"}},
    "dense": {"routing": {"method": "dense"}},
    "text": TEXT,
    "modern, text": TEXT | {"model": TEXT["model"] | MODERN["model"]},
}


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("setting", CHECKPOINTED)
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_equals_none_to_the_last_bit(setting: str, backend: str, mode: str) -> None:
    (loss, gradients, held), (other_loss, other_gradients, other_held) = (
        training_pass(
            random_network(
                **CHECKPOINTED[setting],
                parallel={"activation_checkpointing": each, "expert_backend": backend},
            )
        )
        for each in ("none", mode)
    )
    assert torch.equal(loss, other_loss)
    assert differing(gradients, other_gradients) == []
    assert all(torch.equal(a, b) for a, b in zip(held, other_held, strict=True))


def differing(first: dict[str, Tensor | None], second: dict[str, Tensor | None]) -> list[str]:
    """Return the names of what is not equal; no gradient equals no gradient."""
    return [
        name
        for name, value in first.items()
        if (value is None) != (second[name] is None)
        or (value is not None and not torch.equal(value, second[name]))
    ]


def test_checkpointing_recompute_does_not_route_again() -> None:
    settings = CHECKPOINTED["balanced"]
    _, expected, before = training_pass(random_network(**settings))
    network = random_network(**settings, parallel={"activation_checkpointing": "full"})
    _, gradients, _ = training_pass(network, flip_prototypes=True)
    # The prototypes' own gradient is formed from their values at the time of the backward pass,
    # recomputed or not.
    assert all(name.endswith("prototypes") for name in differing(gradients, expected))
    _, _, after = training_pass(network)
    assert not torch.equal(before[0], after[0])  # the flipped prototypes route otherwise


@pytest.mark.parametrize(("mode", "attention", "exchanges"), [("full", 2, 2), ("selective", 1, 1)])
def test_checkpointing_recomputes_experts_but_routes_once(
    mode: str, attention: int, exchanges: int
) -> None:
    network = random_network(parallel={"activation_checkpointing": mode})
    moe, calls = network.blocks[1].moe, Counter[str]()
    watched = {
        "router": moe.router,
        "routed": moe.routed,
        "shared": moe.shared,
        "dense": network.blocks[0].feed_forward,
        "qkv": network.blocks[1].attention.qkv,
    }
    for name, module in watched.items():
        module.register_forward_pre_hook(lambda *args, n=name: calls.update([n]))
    dispatch = moe.dispatcher.dispatch
    moe.dispatcher.dispatch = lambda *args: (calls.update(["dispatch"]), dispatch(*args))[1]
    training_pass(network)
    assert calls == {
        "router": 1,
        "routed": 2,
        "shared": 2,
        "dense": 2,
        "qkv": attention,
        "dispatch": exchanges,
    }
    before = calls["routed"]
    network.eval()(*inputs(network)).sum().backward()
    assert calls["routed"] == before + 1  # nothing is recomputed in evaluation


def test_checkpointing_keeps_less_the_more_it_recomputes() -> None:
    kept = {}
    for mode in ("none", "selective", "full"):
        network, sizes = random_network(parallel={"activation_checkpointing": mode}), {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

        def pack(tensor: Any, sizes: dict = sizes, weights: set = weights) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network.train().denoise(*inputs(network))
        kept[mode] = sum(sizes.values())
    assert kept["full"] < kept["selective"] < kept["none"]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"routing": {"num_shared_experts": 0}},
        {"routing": {"method": "dense"}},
        {**TEXT, "routing": {"method": "dense"}},
        MODERN,
    ],
)
def test_compiled_network_equals_eager(sections: dict[str, Any]) -> None:
    """The graphs are captured whole and run without a compiler's rounding; weights keep their
    names.
    """
    loss, gradients, _ = training_pass(random_network(**sections))
    network = random_network(**sections)
    for block in network.blocks:
        block.compile_dense(backend="aot_eager")
    compiled_loss, compiled_gradients, _ = training_pass(network)
    assert compiled_gradients.keys() == gradients.keys()
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-6, atol=0)
    for name, value in gradients.items():
        torch.testing.assert_close(
            compiled_gradients[name], value, rtol=1e-4, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
        )


# Patches.


@pytest.mark.parametrize("size", [(6, 6), (4, 6), (8, 2)])
def test_unpatchify_equals_torchs_fold(size: tuple[int, int]) -> None:
    network = random_network(
        model={"input_size": 6, "patch_size": 2, "in_channels": 3, "learn_sigma": False}
    )
    grid = network.config.model.grid_of(size)
    tokens = grid[0] * grid[1]
    patches = random_tensor(2, tokens, 12)
    # Within a token: row, column, channel; torch's fold wants the channel first.
    columns = patches.view(2, tokens, 4, 3).transpose(2, 3).flatten(2).transpose(1, 2)
    expected = torch.nn.functional.fold(columns, size, kernel_size=2, stride=2)
    assert torch.equal(network._unpatchify(patches, grid), expected)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"input_size": 6, "patch_size": 2, "in_channels": 3},
        {"input_size": 6, "patch_size": 3},
        {"input_size": 4, "patch_size": 1, "in_channels": 2},
        {"input_size": [4, 8]},
    ],
)
def test_patchify_is_the_inverse_of_the_networks_own_unpatchify(model: dict[str, Any]) -> None:
    network = random_network(model={**model, "learn_sigma": False})
    sizes = network.config.model
    latents = random_tensor(2, sizes.in_channels, *sizes.latent_size)
    patches = network.patchify(latents)
    assert patches.shape == (2, sizes.tokens_per_image, sizes.in_channels * sizes.patch_size**2)
    assert torch.equal(network._unpatchify(patches, sizes.patch_grid), latents)


@pytest.mark.parametrize("sections", [{}, TEXT, {"routing": {"method": "hash"}}])
def test_network_of_one_size_computes_another_as_a_network_of_that_size(
    sections: dict[str, Any],
) -> None:
    one, other = (
        random_network(**{**sections, "model": {**sections.get("model", {}), "input_size": size}})
        for size in (6, [4, 6])
    )
    other.load_state_dict(one.state_dict())
    own, (latents, timestep, condition) = inputs(one), inputs(other)
    before = one(*own)
    assert torch.equal(one(latents, timestep, condition), other(latents, timestep, condition))
    prepared = one.prepare(condition, (4, 6))
    torch.testing.assert_close(
        one(latents, timestep, prepared), other(latents, timestep, condition)
    )
    assert torch.equal(one(*own), before)
    with pytest.raises(ConfigError, match=r"5x6.*patch_size=2"):
        one(latents.new_zeros(4, 1, 5, 6), timestep, condition)
