"""The unconditional expert as one more group of the routed experts' product.

It has a routed expert's shape, so a token of a null sample can be a row like any other: then the
shapes of a step do not depend on how many samples are null. Its parameters stay its own. Where they
are in memory right behind the routed experts', the stack of all is a view; elsewhere it is a copy.
Letters: E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from promoe_ds.torch_private import storage_key


def stack_of(name: str) -> str:
    """Return the routed experts' parameter to which a parameter of the unconditional expert could
    be the next one, by its dotted name in any network; other names as they are.
    """
    path, found, own = name.rpartition("moe.unconditional.")
    return f"{path}moe.routed.{own.replace('.', '_')}" if found else name


def parameters_behind(single: nn.Module, stacks: Sequence[str]) -> list[Tensor]:
    """Return a feed-forward's own parameters that continue stacks of these names."""
    return [single.get_parameter(name.replace("_", ".")) for name in stacks]


def is_behind(stack_E: Tensor, single: Tensor) -> bool:
    """Whether a tensor of an entry's shape is in memory where the stack's next entry would be."""
    return (
        single.shape == stack_E.shape[1:]
        and stack_E.is_contiguous()
        and single.is_contiguous()
        and single.dtype == stack_E.dtype
        and storage_key(single) == storage_key(stack_E)
        and single.storage_offset() == stack_E.storage_offset() + stack_E.numel()
    )


def join(stacks_E: Sequence[Tensor], singles: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return each stack with one more entry, (E + 1, ...); see `is_behind` for where that is free.

    Gradient: reaches both, as views of one.  Sync: none.
    """
    return _Join.apply(*stacks_E, *singles)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        half = len(tensors) // 2
        return tuple(map(_join, tensors[:half], tensors[half:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return (*(grad[:-1] for grad in grads), *(grad[-1] for grad in grads))


def _join(stack_E: Tensor, single: Tensor) -> Tensor:
    if not is_behind(stack_E, single):
        return torch.cat([stack_E, single[None]])
    return stack_E.as_strided((len(stack_E) + 1, *single.shape), stack_E.stride())
