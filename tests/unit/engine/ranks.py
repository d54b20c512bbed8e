"""Several ranks in one process: collectives that know what the other ranks hold."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from promoe_ds.engine.distributed import Ranks

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def pretend_one_rank(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let sums over ranks be the rank's own; return the list of tensors that will be summed."""
    seen: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **kwargs: seen.append(tensor.clone()))
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    return seen


def call_together(monkeypatch: pytest.MonkeyPatch, objects: Sequence[Any], method: str, **kwargs: Any) -> list[Any]:
    """Call a method that sums over the ranks once, on each rank's object; return the results.

    What each rank gives is found out on copies first.
    """
    given: list[Tensor] = []
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: len(objects))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **unused: given.append(tensor.clone()))
    for each in objects:
        getattr(copy.deepcopy(each), method)(**kwargs)
    assert len(given) == len(objects)  # one collective each
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **unused: tensor.copy_(torch.stack(given).sum(dim=0)))
    return [getattr(each, method)(**kwargs) for each in objects]
