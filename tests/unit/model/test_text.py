"""Text in the network: against a slow oracle in double precision, prepared, padded, refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from promoe_ds.condition import TextCondition
from promoe_ds.diffusion.guidance import GuidedDenoiser
from promoe_ds.errors import ConfigError
from promoe_ds.model import DiT

from ..builders import METHODS, TEXT, condition_of, of_method, random_network, random_tensor
from ..routing.plans import NULL, give_state
from .test_rotary import slow_rotation

LABELS = torch.tensor([3, NULL, 0, 7])
TIMESTEPS = torch.tensor([0.0, 250.0, 500.0, 1000.0])
LATENTS = random_tensor(4, 1, 4, 4)


def text_network(method: str = "dense", **model: Any) -> DiT:
    routing = {"routing": {"method": "dense"}} if method == "dense" else of_method(method)
    network = random_network(**TEXT | {"model": TEXT["model"] | model}, **routing).eval()
    for layer in network.moe_layers().values():
        give_state(layer.router, seed=2)
    return network


def texts(network: DiT) -> TextCondition:
    condition = condition_of(network.config, LABELS)
    assert isinstance(condition, TextCondition)
    assert len(set(condition.mask_BL.sum(dim=1).tolist())) > 2, "texts of several lengths"
    return condition


# The oracle: one sample, one head and one query at a time, over the tokens that there are.


def slow_norm(x: Tensor, norm: nn.LayerNorm | nn.RMSNorm) -> Tensor:
    is_centred = isinstance(norm, nn.LayerNorm)
    x = x - x.mean() if is_centred else x
    normed = x / (x.square().mean() + norm.eps).sqrt()
    normed = normed if norm.weight is None else normed * norm.weight
    return normed + norm.bias if is_centred and norm.bias is not None else normed


def slow_attention(attention: nn.Module, x_SD: Tensor, states_LC: Tensor, *, turns: bool) -> Tensor:
    heads, width = attention.num_heads, x_SD.shape[1]
    result_SD, size = torch.zeros_like(x_SD), width // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        q, k, v = (
            [weight[part] @ x + bias[part] for x in x_SD]
            for weight, bias in zip(
                attention.qkv.weight.split(width), attention.qkv.bias.split(width), strict=True
            )
        )
        if not isinstance(attention.q_norm, nn.Identity):
            q = [slow_norm(each, attention.q_norm) for each in q]
            k = [slow_norm(each, attention.k_norm) for each in k]
        if turns:  # a text's keys are at no place
            side = math.isqrt(len(x_SD))
            q, k = (
                [slow_rotation(each, *divmod(place, side)) for place, each in enumerate(part)]
                for part in (q, k)
            )
        text_k, text_v = (
            [weight[part] @ state + bias[part] for state in states_LC]
            for weight, bias in zip(
                attention.text_kv.weight.split(width),
                attention.text_kv.bias.split(width),
                strict=True,
            )
        )
        k += [slow_norm(each, attention.text_k_norm) for each in text_k]
        v += text_v
        for place, query in enumerate(q):
            weights = [((query @ key) / size**0.5).exp() for key in k]
            mixed = sum(weight * value for weight, value in zip(weights, v, strict=True))
            result_SD[place, part] = mixed / sum(weights)
    return torch.stack([attention.proj(row) for row in result_SD])


def slow_modulated(
    norm: nn.LayerNorm | nn.RMSNorm, x_SD: Tensor, shift_D: Tensor, scale_D: Tensor
) -> Tensor:
    return torch.stack([slow_norm(row, norm) * (1 + scale_D) + shift_D for row in x_SD])


def slow_denoise(
    network: DiT, latents_ZHW: Tensor, timestep: Tensor, states_LC: Tensor, pooled_C: Tensor
) -> Tensor:
    """Return the prediction of a dense network for one sample; `network` is in double precision."""
    x_SD = network.patch_embedding(latents_ZHW[None])[0] + network.positions
    condition_D = network.timestep_embedding(timestep[None])[0]
    condition_D = condition_D + network.text_embedding.pooled(pooled_C)
    for block in network.blocks:
        modulation = block.modulation(nn.functional.silu(condition_D)).chunk(6)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation
        tokens_SD = slow_modulated(block.attention_norm, x_SD, shift_a, scale_a)
        x_SD = x_SD + gate_a * slow_attention(
            block.attention, tokens_SD, states_LC, turns=network.config.model.block == "modern"
        )
        tokens_SD = slow_modulated(block.feed_forward_norm, x_SD, shift_f, scale_f)
        x_SD = x_SD + gate_f * block.feed_forward(tokens_SD)
    patches = network.final_layer(x_SD[None], condition_D[None])
    return network._unpatchify(patches, network.config.model.patch_grid)[0]


def oracle(network: DiT, condition: TextCondition, *, null: bool = False) -> Tensor:
    """Return the predictions for LATENTS; of the empty text where a sample or all of them are
    null.
    """
    rows = []
    for place in range(len(condition)):
        states, pooled = condition.empty.tokens_LC, condition.empty.pooled_C
        if not (null or condition.null_B[place]):
            states = condition.tokens_BLC[place][condition.mask_BL[place]]
            pooled = condition.pooled_BC[place]
        arguments = LATENTS[place], TIMESTEPS[place], states, pooled
        rows.append(
            slow_denoise(
                network, *(x.double() if x is not TIMESTEPS else x for x in arguments)
            ).detach()
        )
    return torch.stack(rows)


@pytest.mark.parametrize(
    "model", [{}, {"qk_norm": True}, {"block": "modern"}, {"block": "modern", "qk_norm": False}]
)
def test_text_network_equals_slow_oracle_with_masks_and_dropped_conditions(
    model: dict[str, Any],
) -> None:
    """In float64 to 1e-10; in fp32, whose roundings attention may amplify, each sample to 1e-5 of
    its norm.
    """
    network = text_network(**model).double()
    condition = texts(network)
    for each in (condition, condition.drop(torch.tensor([True, False, False, False]))):
        found = network(LATENTS.double(), TIMESTEPS, each)
        torch.testing.assert_close(found, oracle(network, each), rtol=1e-10, atol=1e-10)
    single = text_network(**model)(LATENTS, TIMESTEPS, condition)
    expected = oracle(network, condition)
    off_B = (single - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert off_B.max() <= 1e-5


def test_text_guidance_with_keys_and_values_made_before_equals_slow_oracle() -> None:
    network = text_network().double()
    condition, latents, scale = texts(network), LATENTS.double(), 3.0
    joined = condition.cat([condition.null_like()])
    prepared = network.prepare(joined)
    assert (prepared.num_null, len(prepared)) == (5, 8)
    both = torch.cat([latents, latents]), TIMESTEPS.repeat(2)
    conditional, null = network(*both, prepared).chunk(2)
    assert torch.equal(torch.cat([conditional, null]), network(*both, joined))
    expected = oracle(network, condition, null=True)
    expected = expected + scale * (oracle(network, condition) - expected)
    torch.testing.assert_close(null + scale * (conditional - null), expected, rtol=1e-9, atol=1e-9)
    guided = GuidedDenoiser(network, condition, scale=scale, prepare=network.prepare)
    found = guided(latents, TIMESTEPS, channels=2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["dense", *METHODS])
def test_text_of_every_method_prepared_or_padded_is_the_same_to_the_bit(method: str) -> None:
    network = text_network(method)
    condition = texts(network)
    expected = network.denoise(LATENTS, TIMESTEPS, condition)
    prepared = network.prepare(condition)
    assert prepared.group_B is condition.group_B
    length = condition.mask_BL.shape[1]
    padded = [condition.padded(length + more) for more in (7, 16)]
    for each in (prepared, *padded, *(one.counted() for one in padded)):
        found = network.denoise(LATENTS, TIMESTEPS, each)
        assert torch.equal(found.prediction_BZHW, expected.prediction_BZHW)
        for block, plan in expected.plans.items():
            other = found.plans[block]
            assert torch.equal(other.assignment.token_ids_N, plan.assignment.token_ids_N)
    two = torch.tensor([2, 0])
    some = network(LATENTS[two], TIMESTEPS[two], condition.select(two))
    # Made for four samples, not two: products of another height may add in another order.
    found = network(LATENTS[two], TIMESTEPS[two], prepared.select(two))
    torch.testing.assert_close(found, some, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_text_reaches_experts_of_images_alone_and_null_samples_reach_none(method: str) -> None:
    network = text_network(method).train()
    condition = texts(network)
    output = network.denoise(LATENTS, TIMESTEPS, condition)
    tokens = network.config.model.tokens_per_image
    for plan in output.plans.values():
        assert plan.stats.is_routed_B.tolist() == [True, False, True, True]
        assert plan.assignment.token_ids_N.max() < 4 * tokens
        assert not (plan.assignment.token_ids_N // tokens == 1).any()
    loss = output.prediction_BZHW.square().mean()
    sum((v for plan in output.plans.values() for v in plan.aux_losses.values()), loss).backward()
    for name, parameter in network.named_parameters():
        if "text" in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            # A softmax knows no constant: the bias of the text's keys is seen against the image's.
            assert parameter.grad.any(), name


def test_text_network_refuses_labels_and_a_prepared_condition_cannot_be_dropped() -> None:
    network = text_network()
    with pytest.raises(ConfigError, match=r"TextCondition, not ClassCondition.*text encoder"):
        network(LATENTS, TIMESTEPS, LABELS)
    with pytest.raises(ConfigError, match="labels, not a TextCondition"):
        random_network()(LATENTS, TIMESTEPS, texts(network))
    prepared = network.prepare(texts(network))
    for change in (prepared.null_like, lambda: prepared.cat([prepared])):
        with pytest.raises(TypeError, match=r"before DiT\.prepare"):
            change()
    labelled = random_network()
    condition = condition_of(labelled.config, LABELS)
    assert labelled.prepare(condition) is condition
