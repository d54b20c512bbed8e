"""The whole network: untrained output, shapes, labels, and checkpointing that changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from promoe_ds.model import DiT, build_model, initialise

from ..builders import random_network, random_tensor, small_config

NULL = 10
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
}


def inputs(network: DiT, images: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    model = network.config.model
    latents = random_tensor(images, model.in_channels, model.input_size, model.input_size)
    return latents, torch.linspace(0, 1000, images), LABELS[:images]


@pytest.mark.parametrize("setting", SETTINGS)
def test_network_untrained_returns_exactly_zero(setting: str) -> None:
    network = build_model(small_config(**SETTINGS[setting]))
    initialise(network, 0)
    assert torch.count_nonzero(network(*inputs(network))) == 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_network_output_has_the_channels_and_size_of_the_config(setting: str) -> None:
    network = random_network(**SETTINGS[setting])
    output = network(*inputs(network))
    model = network.config.model
    assert output.shape == (4, model.out_channels, model.input_size, model.input_size)
    assert output.abs().sum() > 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_network_plans_are_those_of_the_moe_blocks(setting: str) -> None:
    network = random_network(**SETTINGS[setting])
    output = network.denoise(*inputs(network))
    assert tuple(output.plans) == tuple(network.moe_layers()) == network.config.moe_block_indices
    assert torch.equal(output.prediction_BZHW, network(*inputs(network)))


def test_network_ten_classes_null_label_is_not_routed() -> None:
    network = random_network()
    plan = network.denoise(*inputs(network)).plans[1]
    assert plan.stats.is_routed_B.tolist() == [True, False, True, True]
    assert plan.assignment.token_ids_N.numel() == 3 * network.config.model.tokens_per_image


def test_network_without_unconditional_expert_routes_null_samples() -> None:
    network = random_network(**SETTINGS["no unconditional"])
    assert network.denoise(*inputs(network)).plans[1].stats.is_routed_B.all()


@pytest.mark.parametrize("setting", SETTINGS)
def test_network_output_of_an_image_does_not_depend_on_its_batch_mates(setting: str) -> None:
    network = random_network(**SETTINGS[setting], parallel={"expert_backend": "loop"}).double()
    latents, timestep, labels = inputs(network)
    together = network(latents.double(), timestep, labels)
    for i in range(len(labels)):
        alone = network(latents[i : i + 1].double(), timestep[i : i + 1], labels[i : i + 1])
        # Matrix products of another height may add in another order.
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def test_network_depends_on_label_timestep_and_position() -> None:
    network = random_network()
    latents, timestep, labels = inputs(network, images=1)
    output = network(latents, timestep, labels)
    assert not torch.equal(network(latents, timestep + 1, labels), output)
    assert not torch.equal(network(latents, timestep, labels + 1), output)
    rolled = network(latents.roll(2, dims=-1), timestep, labels).roll(-2, dims=-1)
    assert not torch.allclose(rolled, output, atol=1e-3)  # a patch is not treated alike everywhere


def test_network_unpatchify_puts_each_value_in_its_place() -> None:
    network = random_network(
        model={"input_size": 6, "patch_size": 2, "in_channels": 3, "learn_sigma": False}
    )
    patches = torch.arange(2 * 9 * 12, dtype=torch.float32).view(2, 9, 12)
    image = network._unpatchify(patches)
    assert image.shape == (2, 3, 6, 6)
    for b in range(2):
        for token in range(9):
            for value in range(12):
                # Within a token: row, column, channel.
                row, column, channel = value // 6, value // 3 % 2, value % 3
                place = image[b, channel, token // 3 * 2 + row, token % 3 * 2 + column]
                assert place == patches[b, token, value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_network_output_has_the_dtype_of_the_latents(dtype: torch.dtype) -> None:
    network = random_network()
    latents, timestep, labels = inputs(network)
    assert network(latents.to(dtype), timestep, labels).dtype == dtype


def test_network_positions_are_no_parameter_and_not_saved() -> None:
    network = random_network()
    assert "positions" not in dict(network.named_parameters())
    assert "positions" not in network.state_dict()


# Activation checkpointing.


def training_pass(
    network: DiT, *, flip_prototypes: bool = False
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Return loss, gradients and the lists of assigned tokens of one training pass.

    flip_prototypes: negate them between forward and backward pass, so that routing anew would
    decide otherwise.
    """
    network.train()
    output = network.denoise(*inputs(network))
    target = random_tensor(*output.prediction_BZHW.shape, seed=7)
    loss = (output.prediction_BZHW - target).square().mean()
    loss = loss + sum(value for plan in output.plans.values() for value in plan.aux_losses.values())
    if flip_prototypes:
        for layer in network.moe_layers().values():
            layer.router.prototypes.data.neg_()
    loss.backward()
    lists = [plan.assignment for plan in output.plans.values()]
    assigned = [
        value
        for each in lists
        for value in (each.token_ids_N, each.tokens_per_expert_E, each.gates_N.detach())
    ]
    return loss.detach(), {name: p.grad for name, p in network.named_parameters()}, assigned


CHECKPOINTED = {
    "moe": {"model": {"depth": 4}, "routing": {"top_k": 2, "balance_weight": 0.1}},
    "all blocks": {"routing": {"moe_blocks": "all"}},
    "dense": {"routing": {"method": "dense"}},
}


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("setting", CHECKPOINTED)
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_equals_none_to_the_last_bit(setting: str, backend: str, mode: str) -> None:
    results = [
        training_pass(
            random_network(
                **CHECKPOINTED[setting],
                parallel={"activation_checkpointing": each, "expert_backend": backend},
            )
        )
        for each in ("none", mode)
    ]
    (loss, gradients, assigned), (loss_full, gradients_full, assigned_full) = results
    assert torch.equal(loss, loss_full)
    assert [
        name for name in gradients if not torch.equal(gradients[name], gradients_full[name])
    ] == []
    assert all(torch.equal(a, b) for a, b in zip(assigned, assigned_full, strict=True))


def test_checkpointing_recompute_does_not_route_again() -> None:
    settings = CHECKPOINTED["moe"]
    _, expected, _ = training_pass(random_network(**settings))
    network = random_network(**settings, parallel={"activation_checkpointing": "full"})
    _, gradients, _ = training_pass(network, flip_prototypes=True)
    # The prototypes' own gradient is formed from their values at the time of the backward pass,
    # recomputed or not.
    names = [name for name in expected if not name.endswith("prototypes")]
    assert [name for name in names if not torch.equal(gradients[name], expected[name])] == []


def test_checkpointing_flipped_prototypes_would_have_changed_the_routing() -> None:
    network = random_network(**CHECKPOINTED["moe"])
    before = network.denoise(*inputs(network)).plans[1].assignment.tokens_per_expert_E
    network.blocks[1].moe.router.prototypes.data.neg_()
    assert not torch.equal(
        network.denoise(*inputs(network)).plans[1].assignment.tokens_per_expert_E, before
    )


@pytest.mark.parametrize(("mode", "attention", "exchanges"), [("full", 2, 2), ("selective", 1, 1)])
def test_checkpointing_recomputes_experts_but_routes_once(
    mode: str, attention: int, exchanges: int
) -> None:
    network = random_network(parallel={"activation_checkpointing": mode})
    calls = {"router": 0, "routed": 0, "shared": 0, "dense": 0, "qkv": 0, "dispatch": 0}

    def count(name: str) -> Any:
        return lambda *args: calls.__setitem__(name, calls[name] + 1)

    moe = network.blocks[1].moe
    moe.router.register_forward_pre_hook(count("router"))
    moe.routed.register_forward_pre_hook(count("routed"))
    moe.shared.register_forward_pre_hook(count("shared"))
    network.blocks[0].feed_forward.register_forward_pre_hook(count("dense"))
    network.blocks[1].attention.qkv.register_forward_pre_hook(count("qkv"))
    dispatch = moe.dispatcher.dispatch
    moe.dispatcher.dispatch = lambda *args: (count("dispatch")(), dispatch(*args))[1]
    training_pass(network)
    assert calls == {
        "router": 1,
        "routed": 2,
        "shared": 2,
        "dense": 2,
        "qkv": attention,
        "dispatch": exchanges,
    }


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


@pytest.mark.parametrize("routing", [{}, {"num_shared_experts": 0}, {"method": "dense"}])
def test_compiled_network_equals_eager(routing: dict[str, Any]) -> None:
    """The graphs are captured whole and run without a compiler's rounding; weights keep their
    names.
    """
    loss, gradients, _ = training_pass(random_network(routing=routing))
    network = random_network(routing=routing)
    for block in network.blocks:
        block.compile_dense(backend="aot_eager")
    compiled_loss, compiled_gradients, _ = training_pass(network)
    assert compiled_gradients.keys() == gradients.keys()
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-6, atol=0)
    for name, value in gradients.items():
        torch.testing.assert_close(
            compiled_gradients[name], value, rtol=1e-4, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_checkpointing_is_off_in_evaluation() -> None:
    network = random_network(parallel={"activation_checkpointing": "full"}).eval()
    calls = []
    network.blocks[1].attention.qkv.register_forward_pre_hook(lambda *args: calls.append(1))
    network(*inputs(network)).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize(
    "labels", [[NULL] * 4, [1, 2, 3, 4]], ids=["all unconditional", "all conditional"]
)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_network_every_parameter_gets_a_gradient(labels: list[int], mode: str) -> None:
    network = random_network(parallel={"activation_checkpointing": mode}).train()
    latents, timestep, _ = inputs(network)
    output = network.denoise(latents, timestep, torch.tensor(labels))
    (output.prediction_BZHW.square().mean() + output.plans[1].aux_losses["rcl"]).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
