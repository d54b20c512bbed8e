"""A stand-in for Transformer Engine on the CPU: its documented signatures, state and demands, exact
arithmetic.

What it checks is results, states and names, and sizes in FP8; how the library itself takes our
calls is what tests/fake_cuda/test_transformer_engine.py checks. It says nothing about FP8 numbers.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RECIPES = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")


class _State:
    """What the library knows of a process: the recipe in force; how its layers were called, under
    which recipe.

    rounds: whether inputs of products under a recipe are rounded to FP8; without, arithmetic is
    exact.
    """

    def __init__(self) -> None:
        self.recipe: Any = None
        self.rows: list[tuple[str, int]] = []
        self.products: list[tuple[str, str | None]] = []
        self.rounds = False

    def check(self, kind: str, rows: Tensor, splits: list[int]) -> Tensor:
        self.rows.append((kind, rows.shape[0]))
        self.products.append((kind, None if self.recipe is None else self.recipe.name))
        assert rows.shape[0] == sum(splits)
        assert rows.shape[0] > 0, "an empty product"
        if self.recipe is not None:
            multiple = 32 if self.recipe.name.startswith("MXFP8") else 16
            assert all(split % multiple == 0 for split in splits), splits
            assert rows.shape[1] % multiple == 0
        return (
            rows.to(torch.float8_e4m3fn).to(rows.dtype)
            if self.rounds and self.recipe is not None
            else rows
        )


class _Base(nn.Module):
    def get_extra_state(self) -> Tensor:
        return torch.zeros(4, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        raise AssertionError("a checkpoint must not hold foreign state")

    def register_parameter(
        self, name: str, param: nn.Parameter | None, init_fn: Any = None, **kwargs: Any
    ) -> None:
        assert init_fn is not None, "the library would initialise this parameter"
        super().register_parameter(name, param)

    def add(self, name: str, *shape: int) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")), init_fn=1)


def _make_layers(state: _State) -> tuple[type, ...]:
    """Return the library's layers, which note what they are given in `state`."""
    return _make_linear(state), _make_norm(state), _make_grouped(state)


def _make_linear(state: _State) -> type:
    class Linear(_Base):
        def __init__(
            self,
            in_features: int,
            out_features: int,
            *,
            bias: bool = True,
            params_dtype: torch.dtype | None = None,
            device: str = "cuda",
        ) -> None:
            super().__init__()
            assert device == "meta"
            self.add("weight", out_features, in_features)
            if bias:
                self.add("bias", out_features)
            else:
                self.bias = torch.empty(0)

        def forward(self, inp: Tensor) -> Tensor:
            inp = state.check("linear", inp, [inp.shape[0]])
            return F.linear(inp, self.weight, self.bias if self.bias.numel() else None)

    return Linear


def _make_norm(state: _State) -> type:
    class LayerNorm(_Base):
        def __init__(self, normalized_shape: int, eps: float = 1e-5, device: str = "cuda") -> None:
            super().__init__()
            assert device == "meta"
            self.eps, self.shape = eps, (normalized_shape,)
            self.add("weight", normalized_shape)
            self.add("bias", normalized_shape)

        def forward(self, inp: Tensor) -> Tensor:
            state.rows.append(("norm", inp.shape[0]))
            return F.layer_norm(inp, self.shape, self.weight, self.bias, self.eps)

    return LayerNorm


def _make_grouped(state: _State) -> type:
    class GroupedLinear(_Base):
        def __init__(
            self,
            num_gemms: int,
            in_features: int,
            out_features: int,
            *,
            bias: bool = True,
            params_dtype: torch.dtype | None = None,
            device: str = "cuda",
        ) -> None:
            super().__init__()
            assert device == "meta"
            self.num_gemms, self.use_bias = num_gemms, bias
            for i in range(num_gemms):
                self.add(f"weight{i}", out_features, in_features)
                if bias:
                    self.add(f"bias{i}", out_features)

        def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
            assert isinstance(m_splits, list)
            assert len(m_splits) == self.num_gemms
            inp = state.check("grouped", inp, m_splits)
            return torch.cat(
                [
                    F.linear(
                        rows,
                        getattr(self, f"weight{i}"),
                        getattr(self, f"bias{i}") if self.use_bias else None,
                    )
                    for i, rows in enumerate(inp.split(m_splits))
                ]
            )

    return GroupedLinear


def _make_autocast(state: _State) -> Any:
    """Return the library's `autocast`."""

    @contextmanager
    def autocast(enabled: bool = True, recipe: Any = None):
        before, state.recipe = state.recipe, recipe if enabled else None
        yield
        state.recipe = before

    return autocast


def _make_questions(capability: tuple[int, int]) -> dict[str, Any]:
    """Return what the library answers about a device."""

    def answer(can: bool) -> Any:
        return lambda return_reason=False: (can, "") if return_reason else can

    return {
        "is_fp8_available": answer(True),
        "is_fp8_block_scaling_available": answer(True),
        "is_mxfp8_available": answer(capability >= (10, 0)),
    }


def install(
    monkeypatch: pytest.MonkeyPatch,
    *,
    capability: tuple[int, int] = (9, 0),
    version: str = "2.20.2",
) -> _State:
    """Make `transformer_engine` importable for one test, on a device of this compute capability."""
    state = _State()
    package, torch_part, common = (
        ModuleType(name)
        for name in (
            "transformer_engine",
            "transformer_engine.pytorch",
            "transformer_engine.common",
        )
    )
    recipes = ModuleType("transformer_engine.common.recipe")
    for name in RECIPES:
        setattr(recipes, name, lambda name=name: SimpleNamespace(name=name))
    for value in (*_make_layers(state), _make_autocast(state)):
        setattr(torch_part, value.__name__, value)
    for name, question in _make_questions(capability).items():
        setattr(torch_part, name, question)
    package.__version__ = version
    for module in (package, torch_part, common, recipes):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return state
