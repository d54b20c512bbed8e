"""Several ranks in one process: collectives that know what the other ranks hold."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from promoe_ds.distributed.context import DistributedContext

ONE_RANK = DistributedContext(rank=0, world_size=1, device=torch.device("cpu"))


def pretend_one_rank(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let sums over ranks be the rank's own; return the list of tensors that will be summed."""
    seen: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **kwargs: seen.append(tensor.clone()))
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    return seen


def call_together(
    monkeypatch: pytest.MonkeyPatch,
    objects: Sequence[Any],
    method: str,
    *,
    groups: Mapping[str, Sequence[int]] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call a method on each rank's object, each in a thread, where they meet in their sums and
    maxima; return the results.

    Args:
        groups: the ranks of each smaller group that the objects know, by what stands for it there.
    """
    members: dict[str | None, Sequence[int]] = {None: range(len(objects)), **(groups or {})}
    barriers = {group: threading.Barrier(len(ranks)) for group, ranks in members.items()}
    given: dict[int, Tensor] = {}
    own = threading.local()

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: str | None = None) -> None:
        given[own.rank] = tensor.clone()
        barriers[group].wait(timeout=100)
        of_ranks = torch.stack([given[rank] for rank in members[group]])
        barriers[group].wait(timeout=100)
        tensor.copy_(of_ranks.amax(dim=0) if op == dist.ReduceOp.MAX else of_ranks.sum(dim=0))

    def call(rank: int) -> Any:
        own.rank = rank
        return getattr(objects[rank], method)(**kwargs)

    monkeypatch.setattr(dist, "get_world_size", lambda group=None: len(members[group]))
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with ThreadPoolExecutor(len(objects)) as threads:
        return list(threads.map(call, range(len(objects))))
