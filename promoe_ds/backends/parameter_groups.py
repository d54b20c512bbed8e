"""The order and the kinds of parameters that ZeRO lays into flat buffers."""

from __future__ import annotations

from typing import Any

from torch import nn

from promoe_ds.config.optimizer import OptimizerConfig
from promoe_ds.moe.joining import stack_of

#: Numbers of bf16 in 16 bytes.
_ALIGNED = 8


def parameter_groups(
    network: nn.Module, config: OptimizerConfig, precision: str = "fp32"
) -> list[dict[str, Any]]:
    """Split trainable parameters into dense and expert groups, each decayed and not decayed where
    there is a decay.

    Only matrices are decayed: the stacked biases of experts have two dimensions as well, so names
    decide. ZeRO lays a group into one buffer, in the group's order, and parameters become views of
    it. In bf16 those whose size is no multiple of 16 bytes, as a router's bias of 12 experts, are
    last: behind them a matrix would begin where CUDA's grouped GEMM refuses it and other kernels
    are slow. And the unconditional expert's are each behind the routed experts' they would continue
    (`moe.joining`).
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
        decayed = config.weight_decay > 0 and name.endswith("weight") and "norm" not in name
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
        order = _order_in_bf16(group)
        for column in ("params", "param_names"):
            group[column] = [group[column][index] for index in order]
    return list(groups.values())


def _order_in_bf16(group: dict[str, Any]) -> list[int]:
    """Return the places of a group's parameters in the order in which they are laid."""
    place_of = {name: place for place, name in enumerate(group["param_names"])}

    def key(place: int) -> tuple[bool, int]:
        is_odd = group["params"][place].numel() % _ALIGNED > 0
        return is_odd, place_of.get(stack_of(group["param_names"][place]), place)

    return sorted(place_of.values(), key=key)


def lays_joined(network: nn.Module, config: OptimizerConfig, precision: str) -> bool:
    """Whether parameters of unconditional experts are laid behind those of routed experts."""
    groups = parameter_groups(network, config, precision) if precision == "bf16" else []
    return any(
        stack_of(name) in group["param_names"]
        for group in groups
        for name in group["param_names"]
        if stack_of(name) != name
    )


def is_reordered(network: nn.Module, config: OptimizerConfig, precision: str) -> bool:
    """Whether the groups of a network in `precision` hold parameters in another order than the
    network's own.
    """
    own, laid = (
        [group["param_names"] for group in parameter_groups(network, config, kind)]
        for kind in ("fp32", precision)
    )
    return own != laid
