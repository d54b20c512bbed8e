"""Transformer Engine's compiled part as shapes, so that its own Python runs on fake tensors.

`install` makes the library of an unpacked wheel importable and puts `Compiled` in place of the
module that its C++ makes. Products and norms are torch's on tensors of the same shapes; a function
that is not here raises NotImplementedError with its name.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from enum import IntEnum
from functools import _lru_cache_wrapper
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor
from triton.runtime import Autotuner, JITFunction

_LIBRARY, _NAME = "transformer_engine.pytorch", "transformer_engine_torch"
_CUBLAS, _CUDNN = 130500, 91300
_ENUMS = {
    "DType": "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1",
    "FP8FwdTensors": " ".join(
        f"GEMM{number}_{kind}" for number in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")
    ),
    "FP8BwdTensors": " ".join(
        f"GRAD_{kind}{number}" for number in (1, 2, 3) for kind in ("OUTPUT", "INPUT")
    ),
    "CommOverlapType": "RS AG",
}


class _Unknown(type):
    """A name of the compiled part that nothing here needs: importable, never called.

    As an enum its members are those that were asked for, as its mirrors in Python demand.
    """

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{cls.__name__}.{name}")
        setattr(cls, name, _Unknown(f"{cls.__name__}.{name}", (), {"number": len(cls.__members__)}))
        return vars(cls)[name]

    @property
    def __members__(cls) -> dict[str, Any]:
        return {name: one for name, one in vars(cls).items() if isinstance(one, _Unknown)}

    def __int__(cls) -> int:
        return vars(cls)["number"]

    def __call__(cls, *unused: Any, **options: Any) -> Any:
        raise NotImplementedError(f"{cls.__name__} is not part of the stub")


class Compiled(ModuleType):
    """The module `transformer_engine_torch`; `products` counts products while `recorder.is_on`.

    A product is named by kind ("single", "grouped"), type of its operands and pass: the sizes are
    checked by torch's own product.
    """

    def __init__(self, recorder: Any) -> None:
        super().__init__(_NAME)
        for name, members in _ENUMS.items():
            setattr(self, name, IntEnum(name, members.split(), start=0))
        self.products: Counter[str] = Counter()
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _Unknown(f"{_NAME}.{name}", (), {}))
        return vars(self)[name]

    def forget(self) -> None:
        """Let the library forget the tensors that it keeps over a whole process."""
        for module in [one for name, one in sys.modules.items() if name.startswith(_LIBRARY)]:
            for value in vars(module).values():
                if isinstance(value, _lru_cache_wrapper):
                    value.cache_clear()
        importlib.import_module(f"{_LIBRARY}.fp8").FP8GlobalStateManager.reset()

    def get_cublasLt_version(self) -> int:
        return _CUBLAS

    def get_cudnn_version(self) -> int:
        return _CUDNN

    def get_num_cublas_streams(self) -> int:
        return 4

    _num_cublas_streams = 4

    def quantize(self, tensor: Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
        if output is not None:
            return output
        return quantizer.make_empty([*tensor.shape], dtype=tensor.dtype, device=tensor.device)

    def split_quantize(self, tensor: Tensor, splits: list[int], quantizers: list, **_: Any) -> list:
        pieces = zip(tensor.split(splits), quantizers, strict=True)
        return [self.quantize(piece, quantizer) for piece, quantizer in pieces]

    def fused_multi_quantize(self, tensors: list, outputs: Any, quantizers: list, _: Any) -> list:
        return [self.quantize(*pair) for pair in zip(tensors, quantizers, strict=True)]

    def bgrad_quantize(self, gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
        return gradient.sum(0), self.quantize(gradient, quantizer)

    def fused_amax_and_scale_update_after_reduction(self, *unused: Any) -> None: ...

    def create_empty_quantized_tensor(
        self, quantizer: Any, shape: Any, dtype: torch.dtype, device: Any, pin_memory: bool
    ) -> Any:
        """Make a tensor in FP8 of the parts that the library says it has."""
        from transformer_engine.pytorch import tensor as classes

        kind = type(quantizer)
        if kind is classes.Float8Quantizer:  # which says nothing, but makes the same
            kind = classes.Float8CurrentScalingQuantizer
        parts = kind.inner_tensor_specs(quantizer, tuple(shape))
        made = kind.storage_metadata(quantizer, dtype)
        values = {
            argument: torch.empty(parts[name][0], dtype=parts[name][1], device=device)
            if name in parts
            else None
            for name, argument in made["cls"]._INNER_TENSORS
        }
        if not quantizer.internal:
            values |= {"shape": tuple(shape), "dtype": dtype, "device": device}
        return made["cls"](**made["nontensor_kwargs"], **values)

    def generic_gemm(
        self,
        a: Any,
        is_a_turned: bool,
        b: Any,
        is_b_turned: bool,
        out: Any,
        quantizer: Any,
        dtype: Any,
        bias: Tensor | None,
        bias_dtype: Any,
        gelu: bool,
        gelu_in: Any,
        grad: bool,
        *unused: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, None, None]:
        """Return b @ a and, of a gradient, the sum over its rows."""
        assert quantizer is None and not gelu
        self._note("single", a, b, grad)
        result, rows = _product(a, is_a_turned, b, is_b_turned)
        bias_gradient = rows.sum(0) if grad and bias is not None else None
        if bias is not None and not grad:
            result = result + bias
        return result if out is None else out.copy_(result), bias_gradient, None, None

    def te_general_grouped_gemm(
        self,
        a: list,
        is_a_turned: bool,
        b: list,
        is_b_turned: bool,
        out: list,
        dtype: Any,
        splits: list[int],
        bias: list[Tensor],
        bias_dtype: Any,
        is_single: bool,
        gelu_in: Any,
        grad: bool,
        *unused: Any,
    ) -> list[Tensor]:
        """Write each group's product; return the biases or, of gradients, the sums over rows."""
        self._note("grouped", a[0], b[0], grad)
        targets = out[0].split(splits) if is_single else out
        for first, second, target, vector in zip(a, b, targets, bias, strict=True):
            result, rows = _product(first, is_a_turned, second, is_b_turned)
            if vector.numel():
                vector.copy_(rows.sum(0)) if grad else result.add_(vector)
            target.copy_(result)
        return bias

    def layernorm_fwd(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *_: Any) -> tuple:
        y, mean, deviation = torch.native_layer_norm(x, [x.shape[-1]], weight, bias, eps)
        return y, mean.flatten(), deviation.flatten()

    def layernorm_bwd(self, gradient: Tensor, x: Tensor, _m: Any, _d: Any, weight: Tensor, *_: Any):
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)

    def _note(self, kind: str, a: Any, b: Any, grad: bool) -> None:
        if self._recorder.is_on:
            pass_ = "backward" if grad else "forward"
            types = "fp8" if not (_is_plain(a) or _is_plain(b)) else "plain"
            self.products[f"{kind} {types} {pass_}"] += 1


def _is_plain(value: Any) -> bool:
    return hasattr(value, "dtype") and not hasattr(value, "_quantizer")


def _product(a: Any, is_a_turned: bool, b: Any, is_b_turned: bool) -> tuple[Tensor, Tensor]:
    """Return b @ a in the library's order of operands, and b, in bf16 whatever they are kept in."""
    first, second = _plain(a), _plain(b)
    left = second.T if is_b_turned else second
    return left @ (first.T if is_a_turned else first), second


def _plain(value: Any) -> Tensor:
    if _is_plain(value):
        return value
    sizes = tuple(value.size())
    return torch.empty(prod(sizes[:-1]), sizes[-1], dtype=torch.bfloat16, device="cuda")


def install(folder: Path, recorder: Any) -> Compiled:
    """Import the library in `folder`, an unpacked wheel, around a stub that reports to a recorder.

    The library looks for the file of its compiled part, and gets one that says where it would be.
    """
    compiled = Compiled(recorder)
    (folder / f"transformer_engine/{_NAME}.stub.so").touch()
    # Its export of models, which nobody here asks for.
    for name in ("onnx", "onnxscript"):
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
    sys.path.insert(0, str(folder))
    torch.cuda.default_generators = (MagicMock(),)  # of which recomputation keeps the state
    for launcher in (JITFunction, Autotuner):  # the tensors are there without a launch
        launcher.run = lambda *unused, **options: None
    plain = importlib.util.spec_from_file_location

    def find(name: str, *places: Any, **options: Any) -> Any:
        is_stub = name == _NAME
        return ModuleSpec(name, _Loader(compiled)) if is_stub else plain(name, *places, **options)

    with (
        patch.dict(os.environ, {"NVTE_PROJECT_BUILDING": "1"}),  # it looks for no CUDA library
        patch("importlib.util.spec_from_file_location", find),
    ):
        importlib.import_module(_LIBRARY)
    return compiled


class _Loader(Loader):
    """Gives a module that is there already."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None: ...
