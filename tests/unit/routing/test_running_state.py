"""Thresholds and centroids as buffers: precision, start, saving."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ..builders import random_tensor
from .plans import METHODS, NULL, WITH_STATE, make_router, plan_rows, route

CASTS: dict[str, tuple[Any, torch.dtype]] = {
    "bfloat16": (nn.Module.bfloat16, torch.float32),
    "half": (nn.Module.half, torch.float32),
    "float": (nn.Module.float, torch.float32),
    "double": (nn.Module.double, torch.float64),
    "to bfloat16": (lambda module: module.to(torch.bfloat16), torch.float32),
    "to device and half": (lambda module: module.to("cpu", torch.float16), torch.float32),
    "bfloat16 and back": (lambda module: module.bfloat16().float(), torch.float32),
}

with_state = pytest.mark.parametrize("method", WITH_STATE)


@with_state
@pytest.mark.parametrize(("cast", "expected"), CASTS.values(), ids=CASTS.keys())
def test_buffers_stay_in_fp32_or_become_fp64_inside_any_module(
    method: str, cast: Any, expected: torch.dtype
) -> None:
    router = make_router(method, dtype=torch.float32)
    before = {name: value.clone() for name, value in router.named_buffers()}
    cast(nn.Sequential(nn.ModuleDict({"router": router})))
    assert {name: value.dtype for name, value in router.named_buffers()} == dict.fromkeys(
        before, expected
    )
    assert all(torch.equal(value.float(), before[name]) for name, value in router.named_buffers())


@with_state
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_from_the_meta_device_come_to_their_start_in_fp32(
    method: str, dtype: torch.dtype
) -> None:
    router = make_router(method, dtype=torch.float32).to("meta").to(dtype)
    assert all(buffer.is_meta for buffer in router.buffers())
    router.to_empty(device="cpu")
    for buffer in router.buffers():
        buffer.fill_(torch.nan)  # what memory may hold
    router.reset_state()
    assert all(buffer.dtype == torch.float32 and not buffer.any() for buffer in router.buffers())


@pytest.mark.parametrize("method", METHODS)
def test_state_is_saved_and_restored_with_the_parameters(method: str) -> None:
    router, other = make_router(method), make_router(method, seed=9)
    state = router.state_dict()
    assert {name for name, _ in router.named_buffers()} <= state.keys()
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    tokens = random_tensor(3, 4, 8, dtype=torch.float64)
    plans = [route(each.eval(), tokens, [0, NULL, 2]) for each in (router, other)]
    assert plan_rows(plans[0]) == plan_rows(plans[1])


@with_state
def test_state_of_fp32_enters_a_bf16_router_unrounded(method: str) -> None:
    router, other = (
        make_router(method, dtype=torch.float32),
        make_router(method, seed=9, dtype=torch.bfloat16),
    )
    other.load_state_dict(router.state_dict())
    assert all(
        torch.equal(value, dict(router.named_buffers())[name])
        for name, value in other.named_buffers()
    )


@with_state
def test_state_absorbs_the_mean_of_passes_and_ranks(method: str) -> None:
    """Two equal observations added up are one."""
    once, twice, before = make_router(method), make_router(method), make_router(method)
    tokens = random_tensor(2, 4, 8, dtype=torch.float64)
    observation = route(once, tokens, [0, 1]).observation
    once.update_running_state(observation)
    twice.update_running_state(observation + observation)
    for name, value in once.named_buffers():
        torch.testing.assert_close(dict(twice.named_buffers())[name], value, rtol=1e-12, atol=1e-12)
        assert not torch.equal(value, dict(before.named_buffers())[name])


@with_state
def test_state_absorbs_without_a_graph(method: str) -> None:
    router = make_router(method)
    tokens = random_tensor(2, 4, 8, dtype=torch.float64).requires_grad_()
    router.update_running_state(route(router, tokens, [0, 1]).observation)
    assert not any(buffer.requires_grad for buffer in router.buffers())
