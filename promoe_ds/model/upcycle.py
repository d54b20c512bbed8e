"""From a dense feed-forward to the experts of a MoE layer (sparse upcycling, Komatsuzaki et al.,
2023).

A feed-forward of U hidden units is a sum over its units, so it can be split: the shared experts
take the first units, every routed and unconditional expert the rest. A part wider than its units
repeats them, each copy with its share of the outgoing weights, so that their sum is unchanged.
Routed experts narrower than the rest take consecutive windows of it, expert after expert, around
and around. Where the shared experts can hold all units, the others start silent (zero outgoing
weights). Parts of another type (GELU, SwiGLU) cannot express the units and start silent,
too.

Letters: D width, F hidden width of an expert, E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from promoe_ds.config.schema import RunConfig
from promoe_ds.model.init import fill_parameter
from promoe_ds.moe.experts import EXPERT_PARAMETERS

#: By type, what a dense feed-forward calls the parameters of a MoE layer's stacked experts.
DENSE_PARAMETERS = {
    kind: {name: name.replace("_", ".") for name in names}
    for kind, names in EXPERT_PARAMETERS.items()
}


@dataclass(frozen=True, kw_only=True)
class UnitPart:
    """What one expert, or one group of experts that is one feed-forward, takes over.

    units: (F,) int64, the dense hidden unit that each of its own units copies.
    silent: whether its outgoing weights are zero; has_bias: whether it brings the dense output
    bias.
    """

    units: Tensor
    silent: bool
    has_bias: bool

    def parameters(self, dense: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        """Return gate_weight or none and up_weight (F, D), down_weight (D, F), up_bias (F,) and
        down_bias (D,) or none, the output times `scale`.

        Args:
            dense: the dense feed-forward's, under the same names.
        """
        copies = torch.bincount(self.units)[self.units]
        factor = 0.0 if self.silent else scale
        outgoing = {
            "down_weight": lambda value: value[:, self.units] * (factor / copies),
            "down_bias": lambda value: value * (factor if self.has_bias else 0.0),
        }
        return {
            name: outgoing[name](value) if name in outgoing else value[self.units]
            for name, value in dense.items()
        }


@dataclass(frozen=True, kw_only=True)
class UnitSplit:
    """How a dense feed-forward is split over a MoE layer; None for parts that the layer does
    not have or that are of another type.

    shared_units, rest_units: hidden units held by the shared experts, and left to the others.
    """

    shared: UnitPart | None
    routed: tuple[UnitPart, ...] | None
    unconditional: UnitPart | None
    shared_units: int
    rest_units: int

    @property
    def routed_is_exact(self) -> bool:
        """Whether a conditional token keeps the dense output whatever its expert, given gates that
        add up to 1.
        """
        return self.rest_units == 0 or (
            self.routed is not None and len(self.routed[0].units) >= self.rest_units
        )

    @property
    def unconditional_is_exact(self) -> bool:
        """Whether a null token keeps the dense output."""
        return self.rest_units == 0 or (
            self.unconditional is not None and len(self.unconditional.units) >= self.rest_units
        )


def split_units(config: RunConfig) -> UnitSplit:
    """Decide who takes over which hidden units.

    Args:
        config: the MoE recipe, of whose width and type its dense feed-forwards are.
    """
    routing, dense, kind = config.routing, config.dense_width, config.model.mlp_type
    shared_width = (
        routing.num_shared_experts * config.shared_expert_width
        if config.shared_expert_type == kind
        else 0
    )
    held = min(shared_width, dense)
    rest = dense - held

    def part_of(width: int, offset: int) -> UnitPart:
        units = torch.arange(offset, offset + width) % (rest or dense) + (held if rest else 0)
        return UnitPart(units=units, silent=rest == 0, has_bias=held == 0)

    is_alike, width = routing.expert_type == kind, config.expert_width
    stride = width if width < (rest or dense) else 0
    unconditional = routing.num_unconditional_experts * width
    return UnitSplit(
        shared=(
            UnitPart(units=torch.arange(shared_width) % held, silent=False, has_bias=True)
            if held
            else None
        ),
        routed=(
            tuple(part_of(width, expert * stride) for expert in range(routing.num_experts))
            if is_alike
            else None
        ),
        unconditional=part_of(unconditional, 0) if is_alike and unconditional else None,
        shared_units=held,
        rest_units=rest,
    )


def upcycled_parameter(
    name: str,
    shape: tuple[int, ...],
    dense: Mapping[str, Tensor],
    split: UnitSplit,
    config: RunConfig,
    *,
    gate_scale: float,
    noise: float,
) -> Tensor:
    """Return one parameter of a MoE layer's experts.

    Args:
        name: rank-blind, `blocks.<i>.moe.<routed|shared|unconditional>.<...>`; shape: its shape.
        dense: the block's dense feed-forward, under the names of DENSE_PARAMETERS.
        config: the MoE recipe, for initial weights and noise.
        gate_scale: what routed experts' outputs are multiplied by, against their gates.
        noise: standard deviation added to routed experts' incoming weights, relative to theirs;
        tells copies apart.
    """
    part, leaf = name.split(".moe.")[1].split(".", 1)
    initial = torch.empty(shape)
    fill_parameter(initial, name, config.train.seed, config.routing)
    if part == "routed":
        if split.routed is None:
            return torch.zeros(shape) if leaf == "down_weight" else initial
        value = torch.stack([one.parameters(dense, gate_scale)[leaf] for one in split.routed])
        if leaf == "up_weight" and noise > 0:
            value += initial * (noise * value.std() / initial.std())
        return value
    owner = split.shared if part == "shared" else split.unconditional
    if owner is None:
        return torch.zeros(shape) if leaf == "down.weight" else initial
    return owner.parameters(dense)[leaf.replace(".", "_")]
