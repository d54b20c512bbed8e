"""The true global gradient norm under expert parallelism, for ZeRO 0.

ZeRO 1 and 2 compute it correctly. Without ZeRO, DeepSpeed averages the norms of ranks that hold
different experts: 7.2 for gradients whose norm is 10.9.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def global_grad_norm(
    parameters: Sequence[nn.Parameter], expert_group: dist.ProcessGroup | None
) -> Tensor:
    """Return the norm over all ranks' parameters: routed experts summed over the ranks that own
    them, the rest once.

    Args:
        parameters: with gradients already averaged over their data-parallel ranks.
        expert_group: this rank's expert-parallel group; None if no expert is sharded.
    Returns: scalar, fp32.  Collectives: one, where there is a group.
    """
    nothing = torch.zeros((), device=parameters[0].device)
    squares = {True: [nothing], False: [nothing]}
    for parameter in parameters:
        if parameter.grad is not None:
            is_dense = getattr(parameter, "allreduce", True)
            squares[is_dense].append(
                torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
            )
    dense, experts = (torch.stack(squares[kind]).sum() for kind in (True, False))
    if expert_group is not None:
        dist.all_reduce(experts, group=expert_group)
    return (dense + experts).sqrt()
