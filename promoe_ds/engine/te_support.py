"""What Transformer Engine can do here: whether it is installed, which FP8 recipe the device has, what it wants of sizes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from promoe_ds.config.precision import PrecisionConfig
from promoe_ds.errors import ConfigError

#: Compute capability from which a recipe runs: FP8 at all (Ada, Hopper), blocks (Hopper), MXFP8 (Blackwell).
_NEEDS = {"delayed": (8, 9), "current": (8, 9), "block": (9, 0), "mxfp8": (10, 0)}
#: Rows of every FP8 matrix product are a multiple of this.
ALIGNMENT = {"delayed": 16, "current": 16, "block": 16, "mxfp8": 32}
_CLASSES = {"delayed": "DelayedScaling", "current": "Float8CurrentScaling", "block": "Float8BlockScaling",
            "mxfp8": "MXFP8BlockScaling"}
#: Megatron-core's names of the recipes.
_MEGATRON_NAMES = {"delayed": "delayed", "current": "tensorwise", "block": "blockwise", "mxfp8": "mxfp8"}


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's torch part can be imported."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError:
        return False
    return True


def require_transformer_engine(precision: PrecisionConfig, device: torch.device) -> Any:
    """Return the module `transformer_engine.pytorch`.

    Raises: ConfigError naming what is missing: a CUDA device or the library.
    """
    wanted = f"precision.compute={precision.compute}, precision.kernels={precision.kernels}"
    otherwise = "or set precision.compute=bf16 and precision.kernels=torch"
    if device.type != "cuda":
        raise ConfigError(f"{wanted}: Transformer Engine runs on CUDA devices alone, this process runs on the {device.type}: use a "
                          f"GPU, {otherwise}")
    try:
        return importlib.import_module("transformer_engine.pytorch")
    except ImportError as error:
        raise ConfigError(f"{wanted} needs Transformer Engine, which cannot be imported ({error}): pip install "
                          f"'promoe_ds[te]', {otherwise}") from None


def choose_recipe(requested: str, capability: tuple[int, int]) -> str:
    """Return the FP8 recipe that `precision.fp8_recipe` stands for on a device of this compute capability.

    auto: MXFP8 where there is hardware for it, else current scaling, which has no history that a resumed run would miss.
    Raises: ConfigError if the device cannot run it.
    """
    chosen = requested
    if requested == "auto":
        chosen = "mxfp8" if capability >= _NEEDS["mxfp8"] else "current"
    if capability < _NEEDS[chosen]:
        possible = [name for name, needed in _NEEDS.items() if capability >= needed]
        remedy = f"use {' or '.join(possible)}" if possible else "use precision.compute=bf16"
        raise ConfigError(f"precision.fp8_recipe={requested} needs compute capability {_dotted(_NEEDS[chosen])}, this device has "
                          f"{_dotted(capability)}: {remedy}")
    return chosen


def resolved_recipe(precision: PrecisionConfig, device: torch.device) -> str:
    """Return the recipe for a CUDA device, as `choose_recipe` does."""
    return choose_recipe(precision.fp8_recipe, torch.cuda.get_device_capability(device))


def make_recipe(name: str) -> Any:
    """Build Transformer Engine's recipe object: e4m3 forward, e5m2 for gradients, where the recipe has a choice.

    Raises: ConfigError if the installed version does not know it.
    """
    recipes = importlib.import_module("transformer_engine.common.recipe")
    try:
        return getattr(recipes, _CLASSES[name])()
    except AttributeError:
        raise ConfigError(f"precision.fp8_recipe={name}: the installed Transformer Engine has no {_CLASSES[name]}: install a newer "
                          "one, or use another recipe") from None


def fp8_context(te: Any, recipe: Any) -> Callable[[], AbstractContextManager]:
    """Return what makes the context in which Transformer Engine's layers compute in FP8; its name changed over versions."""
    if hasattr(te, "autocast"):
        return lambda: te.autocast(enabled=True, recipe=recipe)
    return lambda: te.fp8_autocast(enabled=True, fp8_recipe=recipe)


def megatron_fp8(precision: PrecisionConfig, device: torch.device) -> dict[str, str]:
    """Return the settings of Megatron's config that make its grouped experts pad for FP8; none otherwise."""
    if precision.compute != "fp8":
        return {}
    return {"fp8": "hybrid", "fp8_recipe": _MEGATRON_NAMES[resolved_recipe(precision, device)]}


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
