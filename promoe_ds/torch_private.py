"""Every use of torch's insides in this package; `NAMES` lists them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Self

import torch
from torch import Tensor, nn

from promoe_ds.private_names import check_names, find_private, read_private

_FAKE_TENSORS, _GROUPS = "torch._subclasses.fake_tensor", "torch.distributed.distributed_c10d"
#: module -> attributes; a dot goes into a class.
NAMES = {
    "torch.nn": ("Module._apply",),
    _FAKE_TENSORS: ("FakeTensorMode",),
    _GROUPS: ("_set_pg_timeout", "default_pg_timeout", "default_pg_nccl_timeout"),
}


class KeepsBuffersPrecise(nn.Module):
    """A module whose buffers stay in fp32 when it is cast to half precision.

    A cast reaches modules inside others through `_apply` alone.
    """

    def __init__(self) -> None:
        """Check that a cast still goes this way.

        Raises: ConfigError naming torch's version and the attribute.
        """
        super().__init__()
        check_names({"torch.nn": NAMES["torch.nn"]})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, kept in before.items():
            buffer = self.get_buffer(name)
            if buffer.dtype in (torch.bfloat16, torch.float16):
                setattr(
                    self,
                    name,
                    (
                        torch.empty_like(buffer, dtype=kept.dtype)
                        if kept.is_meta
                        else kept.to(buffer.device)
                    ),
                )
        return self


def fake_tensors() -> AbstractContextManager[Any]:
    """Return the context in which torch.load reads a file's structure alone.

    Raises: ConfigError naming torch's version and the attribute.
    """
    mode: AbstractContextManager[Any] = find_private(_FAKE_TENSORS, "FakeTensorMode")()
    return mode


def file_offset(fake: Tensor) -> int:
    """Return where in its file the storage of a tensor begins that was loaded within
    `fake_tensors`.

    Raises: ConfigError naming torch's version and the attribute.
    """
    return int(read_private(fake.untyped_storage(), "_checkpoint_offset", library="torch"))


def set_group_timeouts(timeout_seconds: float, *groups: Any) -> None:
    """Give process groups a time-out; without any, all those that libraries make from now on."""
    timeout = timedelta(seconds=timeout_seconds)
    for group in groups:
        find_private(_GROUPS, "_set_pg_timeout")(timeout, group)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout") if not groups else ():
        find_private(_GROUPS, name)
        setattr(torch.distributed.distributed_c10d, name, timeout)
