"""NVIDIA apex's multi-tensor FusedAdam as the optimizer (`optimizer.implementation=apex`).

Its state has the names of torch's AdamW, so that checkpoints of one continue with the other.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.optim import Optimizer

from promoe_ds.backends.te_support import BROKEN_INSTALLATION
from promoe_ds.config.optimizer import OptimizerConfig
from promoe_ds.errors import ConfigError, cause_of

#: PyPI's package of this name is another one.
INSTALL = (
    "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
    " pip install --no-build-isolation ."
)
_WANTED, _OTHERWISE = "optimizer.implementation=apex", "or set optimizer.implementation=torch"


def check_apex(device: torch.device, *, offloads: bool) -> None:
    """Check that apex's optimizer can be used by a process on a device.

    Raises: ConfigError naming what is missing: the library, a CUDA device, or the state on it.
    """
    _fused_adam()
    if device.type != "cuda" or offloads:
        where = "the host's memory (offload_optimizer)" if offloads else f"the {device.type}"
        raise ConfigError(
            f"{_WANTED} updates weights on CUDA devices alone, here they are on {where}: use a GPU"
            f" without offloading, {_OTHERWISE}"
        )


def build_apex_adam(groups: list[dict[str, Any]], settings: OptimizerConfig) -> Optimizer:
    """Build FusedAdam as AdamW over parameter groups.

    Raises: ConfigError for an apex that is not NVIDIA's, or was built without its kernels.
    """
    try:
        optimizer: Optimizer = _fused_adam()(
            groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, adam_w_mode=True
        )
    except BROKEN_INSTALLATION as error:  # it looks for its kernels here
        raise _missing(cause_of(error)) from None
    optimizer.register_step_pre_hook(_take_steps)
    optimizer.register_step_post_hook(_keep_steps)
    return optimizer


def _fused_adam() -> Any:
    """Return the class by its place in NVIDIA's library, which the other package does not have."""
    try:
        found = importlib.import_module("apex.optimizers").FusedAdam
    except (*BROKEN_INSTALLATION, AttributeError) as error:
        raise _missing(cause_of(error)) from None
    return found


def _missing(problem: str) -> ConfigError:
    return ConfigError(
        f"{_WANTED} needs NVIDIA apex with its kernels, which cannot be used ({problem}; the"
        f" package apex of PyPI is another one): {INSTALL}, {_OTHERWISE}"
    )


def _take_steps(optimizer: Optimizer, *unused: Any) -> None:
    """Give each group the step of its parameters, where apex counts."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and "step" in optimizer.state.get(parameter, {}):
                group["step"] = int(optimizer.state[parameter]["step"])
                break


def _keep_steps(optimizer: Optimizer, *unused: Any) -> None:
    """Keep the step with each parameter, as torch does, and nowhere else."""
    for group in optimizer.param_groups:
        step = group.pop("step", None)
        for parameter in group["params"]:
            if parameter.grad is not None and step is not None:
                optimizer.state[parameter]["step"] = torch.tensor(float(step))
