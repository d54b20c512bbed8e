"""Modulated norm, gated residual and split heads against plain torch operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs triton: pip install triton")

from promoe_ds.kernels import block_ops
from promoe_ds.model.blocks import SelfAttention, modulate

from ..builders import random_tensor, randomise
from .test_ops import DEVICE, _draw, _gradients, _same, every_dtype

every_norm = pytest.mark.parametrize("is_centred", [True, False], ids=["layer", "rms"])
every_shape = pytest.mark.parametrize("shape", [(1, 1, 24), (2, 37, 72), (3, 8, 136)], ids=str)


def _modulation(shape: tuple[int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Parts of one wider tensor, as a block has them."""
    wide = _draw(shape[0], 6 * shape[2], seed=7, dtype=dtype)
    return [part.detach().requires_grad_() for part in wide.chunk(6, dim=-1)]


def _exact_norm(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, is_centred: bool
) -> torch.Tensor:
    """Return the modulated norm in fp64, rounded once, as the fused one."""
    norm = F.layer_norm if is_centred else F.rms_norm
    exact = norm(x.double(), x.shape[-1:], eps=1e-6)
    return modulate(exact, shift.double(), scale.double()).to(x.dtype)


@pytest.mark.parametrize("is_used", [False, True], ids=["alone", "x used"])
@every_norm
@every_dtype
@every_shape
def test_modulated_norm_and_its_gradients(shape, dtype, is_centred, is_used) -> None:
    results = []
    for is_fused in (True, False):
        x = _draw(*shape, seed=3, dtype=dtype).requires_grad_()
        shift, scale, *_ = _modulation(shape, dtype)
        if is_fused:
            passed, output = block_ops.modulated_norm(x, shift, scale, 1e-6, is_centred)
        else:
            passed, output = x, _exact_norm(x, shift, scale, is_centred)
        output = torch.cat([output, passed]) if is_used else output
        results.append(_gradients(output, x, shift, scale))
    _same(*results, dtype)


@every_norm
@every_dtype
@every_shape
def test_residual_norm_and_its_gradients(shape, dtype, is_centred) -> None:
    results = []
    for is_fused in (True, False):
        x, y = (_draw(*shape, seed=seed, dtype=dtype).requires_grad_() for seed in (3, 4))
        gate, shift, scale, *_ = _modulation(shape, dtype)
        if is_fused:
            total, output = block_ops.residual_norm(x, gate, y, shift, scale, 1e-6, is_centred)
        else:
            total = (x.double() + gate.double()[:, None] * y.double()).to(dtype)
            output = _exact_norm(total, shift, scale, is_centred)
        both = torch.cat([output, total])
        results.append(_gradients(both, x, gate, y, shift, scale))
    _same(*results, dtype)


@every_dtype
@every_shape
def test_gated_residual_and_its_gradients(shape, dtype) -> None:
    results = []
    for is_fused in (True, False):
        x, y = (_draw(*shape, seed=seed, dtype=dtype).requires_grad_() for seed in (3, 4))
        gate, *_ = _modulation(shape, dtype)
        if is_fused:
            output = block_ops.gated_residual(x, gate, y)
        else:
            output = (x.double() + gate.double()[:, None] * y.double()).to(dtype)
        results.append(_gradients(output, x, gate, y))
    _same(*results, dtype)


@every_dtype
@every_shape
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qk_norm"])
def test_split_heads_sum_the_bias_s_gradient_where_they_join_the_others(
    shape, dtype, qk_norm
) -> None:
    results = []
    for kernels in ("triton", "eager"):
        attention = randomise(SelfAttention(shape[2], 4, qk_norm=qk_norm)).to(DEVICE, dtype)
        attention.kernels = kernels
        x = _draw(*shape, seed=3, dtype=dtype).requires_grad_()
        results.append(_gradients(attention(x), x, *attention.parameters()))
    _same(*results, dtype)


@pytest.mark.parametrize("name", ["modulated_norm", "residual_norm", "gated_residual"])
def test_operations_are_whole_for_tracing_and_compiling(name) -> None:
    shape = (2, 5, 24)
    x, y = (_draw(*shape, seed=seed) for seed in (3, 4))
    first, second, third, *_ = (part.detach() for part in _modulation(shape, torch.float32))
    arguments = {
        "modulated_norm": (x, first, second, 1e-6, True),
        "residual_norm": (x, y, first, second, third, 1e-6, False),
        "gated_residual": (x, first, y),
    }
    torch.library.opcheck(
        getattr(torch.ops.promoe_ds, name).default,
        arguments[name],
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("qk_norm", [False, True])
def test_split_heads_give_the_gradients_of_plain_views_to_the_bit(qk_norm, monkeypatch) -> None:
    attention = randomise(SelfAttention(24, 4, qk_norm=qk_norm)).to(DEVICE)
    found = []
    for _ in range(2):
        x = random_tensor(2, 9, 24).to(DEVICE).requires_grad_()
        attention.zero_grad()
        attention(x).square().sum().backward()
        found.append([x.grad, *(p.grad.clone() for p in attention.parameters())])
        monkeypatch.setattr(
            "promoe_ds.model.blocks._SplitHeads.apply",
            lambda qkv: qkv.permute(2, 0, 3, 1, 4).unbind(0),
        )
    for split, plain in zip(*found, strict=True):
        assert torch.equal(split, plain)
