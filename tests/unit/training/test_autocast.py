"""precision.compute=bf16_autocast: bf16 products of fp32 weights, in an fp32 residual stream."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from promoe_ds.training.step import TrainingModule, autocast_context

from ..builders import METHODS, random_network
from .test_step import batch_of, make_module

LABELS = [3, 10, 0, 7]


def _gradients(module: TrainingModule) -> dict[str, torch.Tensor]:
    module(batch_of(LABELS)).loss.backward()
    return {n: p.grad.float() for n, p in module.named_parameters() if p.grad is not None}


def _autocast(method: str) -> TrainingModule:
    module = make_module(method)
    config = random_network(precision={"compute": "bf16_autocast"}).config
    return TrainingModule(module.denoiser, autocast_context(config, "cpu")).train()


@pytest.mark.parametrize("method", METHODS)
def test_autocast_multiplies_in_bf16_and_keeps_weights_gradients_and_stream_in_fp32(
    method, monkeypatch
) -> None:
    multiplied, grouped_mm = [], F.grouped_mm

    def note(a, b, **options):
        multiplied.append((a.dtype, b.dtype))
        return grouped_mm(a, b, **options)

    monkeypatch.setattr(F, "grouped_mm", note)
    module = _autocast(method)
    streams = []
    for block in module.denoiser.blocks:
        block.register_forward_hook(
            lambda m, i, out: streams.append((out if torch.is_tensor(out) else out[0]).dtype)
        )
    gradients = _gradients(module)
    assert gradients.keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert set(streams) == {torch.float32}
    assert set(multiplied) <= {(torch.bfloat16, torch.bfloat16)} and (
        multiplied or method == "dense"
    )


def test_autocast_is_nearer_to_fp32_than_bf16_weights_are() -> None:
    exact = _gradients(make_module("token_choice"))
    rounded = make_module("token_choice")
    rounded.denoiser.to(torch.bfloat16)
    errors = []
    for found in (_gradients(_autocast("token_choice")), _gradients(rounded)):
        relative = [(found[n] - g).norm() / g.norm() for n, g in exact.items() if g.norm() > 0]
        errors.append(torch.stack(relative).median().item())
    assert errors[0] < errors[1] and 1e-4 < errors[0] < 0.05
