"""What Transformer Engine can do here: whether it is installed and recent enough, and which FP8
recipe the device has.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch

from promoe_ds.config import RunConfig
from promoe_ds.config.parallel import PrecisionConfig, fp8_multiple
from promoe_ds.errors import ConfigError, cause_of
from promoe_ds.private_names import read_private

#: Before it grouped products had neither current scaling nor MXFP8, and `te.checkpoint` refused
# methods.
LEAST_VERSION = (2, 3)
#: Against the torch that is installed. No extra of the package: pip would build it against
# whatever torch is newest.
INSTALL = "pip install --no-build-isolation --upgrade 'transformer-engine[pytorch]'"
#: What an installation that is broken or half there raises at its import, missing shared objects
# among it.
BROKEN_INSTALLATION = (ImportError, OSError, RuntimeError, AssertionError)
_TORCH_PART = "transformer_engine.pytorch"
#: Recipes by the library's question whether device and CUDA have them.
_QUESTIONS = {
    "delayed": "is_fp8_available",
    "current": "is_fp8_available",
    "block": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}
_CLASSES = {
    "delayed": "DelayedScaling",
    "current": "Float8CurrentScaling",
    "block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
#: Megatron-core's names of the recipes.
_MEGATRON_NAMES = {
    "delayed": "delayed",
    "current": "tensorwise",
    "block": "blockwise",
    "mxfp8": "mxfp8",
}


def find_transformer_engine() -> tuple[ModuleType | None, str]:
    """Return the module `transformer_engine.pytorch`, or None and the reason why it cannot be
    used.
    """
    try:
        module = importlib.import_module(_TORCH_PART)
    except BROKEN_INSTALLATION as error:
        return None, f"it cannot be imported ({cause_of(error)})"
    version = transformer_engine_version()
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        return None, (
            f"version {version} is installed, {least} is the first with grouped products of every"
            " recipe"
        )
    return module, ""


def transformer_engine_version() -> str:
    """Return the version of the installed Transformer Engine."""
    return importlib.import_module("transformer_engine").__version__


def require_transformer_engine(precision: PrecisionConfig, device: torch.device) -> ModuleType:
    """Return the module `transformer_engine.pytorch`.

    Raises: ConfigError naming what is missing: a CUDA device or the library, or what is wrong with
    it.
    """
    wanted = f"precision.compute={precision.compute}, precision.kernels={precision.kernels}"
    otherwise = "or set precision.compute=bf16 and precision.kernels=torch"
    if device.type != "cuda":
        raise ConfigError(
            f"{wanted}: Transformer Engine runs on CUDA devices alone, this process runs on the"
            f" {device.type}: use a GPU, {otherwise}"
        )
    module, problem = find_transformer_engine()
    if module is None:
        raise ConfigError(
            f"{wanted} needs Transformer Engine, but {problem}: {INSTALL} on this machine, with"
            f" nvcc and cuDNN's headers, {otherwise}"
        )
    return module


def resolved_recipe(config: RunConfig) -> str:
    """Return the FP8 recipe that `precision.fp8_recipe` stands for on this process's device, as the
    library judges it.

    auto: MXFP8 where device and widths have it, else current scaling, which has no history that a
    resumed run would miss.
    Raises: ConfigError with the library's reason if the device, its CUDA or the config cannot have
    it.
    """
    requested = config.precision.fp8_recipe
    chosen = requested
    if requested == "auto":
        fits = config.fp8_misfit(fp8_multiple("mxfp8")) is None
        chosen = "mxfp8" if fits and _problem("mxfp8") is None else "current"
    problem = _problem(chosen)
    if problem is not None:
        possible = [name for name in _QUESTIONS if _problem(name) is None]
        remedy = f"use {' or '.join(possible)}" if possible else "use precision.compute=bf16"
        raise ConfigError(
            f"precision.fp8_recipe={requested}: Transformer Engine {transformer_engine_version()}"
            f" cannot run {chosen} scaling here: {problem.rstrip('.')}: {remedy}"
        )
    return chosen


def _problem(recipe: str) -> str | None:
    """Return why the library cannot run a recipe on this process's device; None if it can."""
    ask = getattr(importlib.import_module(_TORCH_PART), _QUESTIONS[recipe], None)
    if ask is None:  # older versions keep the questions elsewhere
        manager = importlib.import_module(f"{_TORCH_PART}.fp8").FP8GlobalStateManager
        can, reason = getattr(manager, _QUESTIONS[recipe])()
    else:
        can, reason = ask(return_reason=True)
    return None if can else reason


def make_recipe(name: str) -> Any:
    """Build Transformer Engine's recipe object: e4m3 forward, e5m2 for gradients, where the recipe
    has a choice.

    Raises: ConfigError if the installed version does not know it.
    """
    recipes = importlib.import_module("transformer_engine.common.recipe")
    try:
        return getattr(recipes, _CLASSES[name])()
    except AttributeError:
        raise ConfigError(
            f"precision.fp8_recipe={name}: the installed Transformer Engine has no"
            f" {_CLASSES[name]}: install a newer one, or use another recipe"
        ) from None


def fp8_context(te: Any, recipe: Any) -> Callable[[], AbstractContextManager]:
    """Return what makes the context in which Transformer Engine's layers compute in FP8; its name
    changed over versions.

    Raises: ConfigError if it has changed again.
    """
    if hasattr(te, "autocast"):
        return lambda: te.autocast(enabled=True, recipe=recipe)
    before = read_private(te, "fp8_autocast", library="transformer_engine")
    return lambda: before(enabled=True, fp8_recipe=recipe)


def megatron_fp8(config: RunConfig) -> dict[str, str]:
    """Return the settings of Megatron's config that make its grouped experts pad for FP8; none
    otherwise.
    """
    if config.precision.compute != "fp8":
        return {}
    return {"fp8": "hybrid", "fp8_recipe": _MEGATRON_NAMES[resolved_recipe(config)]}
