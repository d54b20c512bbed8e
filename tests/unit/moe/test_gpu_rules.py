"""What CUDA asks of the experts' products and of the exchange, held without a device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from promoe_ds.moe import StackedExperts, products
from promoe_ds.moe.collectives import WaitClock
from promoe_ds.moe.dispatch import select_rows
from promoe_ds.routing.assignment import Assignment

from ..builders import random_tensor, randomise


@pytest.mark.parametrize("expert_type", ["gelu", "swiglu"])
def test_expanded_gradient_of_no_rows_reaches_grouped_gemm_with_strides(expert_type) -> None:
    stack = randomise(StackedExperts(4, 8, 12, expert_type=expert_type))
    stack(torch.empty(0, 8), torch.zeros(4, dtype=torch.int64)).sum().backward()
    assert all(not parameter.grad.any() for parameter in stack.parameters())


def test_expert_without_rows_has_no_gradient_where_the_device_leaves_it_unwritten(
    monkeypatch,
) -> None:
    """As on a B200: the product of an empty group is whatever the memory held."""
    grouped_mm = F.grouped_mm

    def unwritten(a, b, *, offs):
        result = grouped_mm(a, b, offs=offs)
        if result.dim() == 3:
            result[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = float("nan")
        return result

    monkeypatch.setattr(F, "grouped_mm", unwritten)
    monkeypatch.setattr(products, "leaves_empty_groups_unwritten", lambda device: True)
    stack = randomise(StackedExperts(4, 8, 12))
    stack(random_tensor(5, 8), torch.tensor([2, 0, 3, 0])).sum().backward()
    for name, parameter in stack.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert not parameter.grad[1].any() and parameter.grad[2].any(), name


@pytest.mark.parametrize(
    ("capability", "dtype", "backend"),
    [
        ((9, 0), torch.bfloat16, "grouped_mm"),
        ((10, 0), torch.bfloat16, "grouped_mm"),
        ((9, 0), torch.float32, "loop"),
        ((8, 0), torch.bfloat16, "loop"),
        ((12, 0), torch.bfloat16, "loop"),
    ],
)
def test_auto_avoids_the_slow_fallback_of_grouped_gemm(
    monkeypatch, capability, dtype, backend
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    class Rows:
        is_cuda, device = True, "cuda"

    Rows.dtype = dtype
    assert products.falls_back(Rows) == (backend == "loop")
    assert StackedExperts(4, 8, 12, backend="auto").backend_for(Rows) == backend


def test_gradient_of_a_token_with_many_rows_is_summed_in_fp32() -> None:
    ids = torch.zeros(400, dtype=torch.int64)
    rows = Assignment(ids, torch.ones(400), torch.tensor([400]))
    tokens = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    select_rows(tokens, rows).sum().backward()
    assert tokens.grad.flatten().tolist() == [400.0, 0.0]  # in bf16, 256 + 1 is 256


class _Event:
    """An event of a stream: it has happened once the test says so."""

    made, past = 0, False

    def __init__(self, enable_timing: bool) -> None:
        _Event.made += 1

    def record(self) -> None: ...

    def query(self) -> bool:
        return _Event.past

    def elapsed_time(self, other: _Event) -> float:
        return 2.0


def test_wait_clock_uses_events_again_and_holds_none_when_it_does_not_count(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    device, clock = torch.device("cuda"), WaitClock()
    for _ in range(5):
        with clock.waiting("combine", device):
            pass
    assert _Event.made == 10  # all under way
    _Event.past = True
    for _ in range(100):
        with clock.waiting("combine", device):
            pass
    assert _Event.made == 10
    assert clock.take()["combine"] == pytest.approx(0.210)
    silent = WaitClock(counts=False)
    with silent.paused(), silent.waiting("combine", device):
        pass
    with silent.waiting("combine", device):
        pass
    assert _Event.made == 10 and silent.take()["combine"] == 0
