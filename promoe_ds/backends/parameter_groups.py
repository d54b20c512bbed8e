"""The order and the kinds of parameters that ZeRO lays into flat buffers."""

from __future__ import annotations

from typing import Any

from torch import nn

from promoe_ds.config.optimizer import OptimizerConfig

#: Numbers of bf16 in 16 bytes.
_ALIGNED = 8


def parameter_groups(
    network: nn.Module, config: OptimizerConfig, precision: str = "fp32"
) -> list[dict[str, Any]]:
    """Split trainable parameters into dense and expert groups, each decayed and not decayed where
    there is a decay.

    Only matrices are decayed: the stacked biases of experts have two dimensions as well, so names
    decide. ZeRO lays a group into one buffer, in the group's order, and parameters become views of
    it. In bf16 those whose size is no multiple of 16 bytes, as a router's bias of 12 experts, stand
    last: behind them a matrix would begin where CUDA's grouped GEMM refuses it and other kernels
    are slow.
    Args:
        precision: of the weights, fp32 or bf16.
    Returns: groups with `params`, `param_names`, `weight_decay`, `name` and, for experts, `moe`,
    which DeepSpeed reads.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        expert_group: str | None = getattr(parameter, "group_name", None)
        decayed = (
            config.weight_decay > 0
            and name.endswith(("weight", "up_weight", "down_weight"))
            and "norm" not in name
        )
        group = groups.setdefault(
            (expert_group or "dense", decayed),
            {
                "params": [],
                "param_names": [],
                "name": expert_group or "dense",
                "weight_decay": config.weight_decay if decayed else 0.0,
                **({"moe": True} if expert_group else {}),
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    for group in groups.values() if precision == "bf16" else ():
        pairs = sorted(
            zip(group["params"], group["param_names"], strict=True),
            key=lambda pair: pair[0].numel() % _ALIGNED > 0,
        )
        group["params"], group["param_names"] = (
            list(column) for column in zip(*pairs, strict=True)
        )
    return list(groups.values())


def is_reordered(network: nn.Module, config: OptimizerConfig, precision: str) -> bool:
    """Whether the groups of a network in `precision` hold parameters in another order than the
    network's own.
    """
    own, laid = (
        [group["param_names"] for group in parameter_groups(network, config, kind)]
        for kind in ("fp32", precision)
    )
    return own != laid
