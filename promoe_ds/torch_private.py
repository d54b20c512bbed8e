"""Every use of torch's insides in this package.

`NAMES` lists what a training needs, `TRACE_NAMES` what planning needs to watch operations.
"""

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
    "torch": ("_foreach_add_", "_foreach_copy_", "_foreach_norm"),
    "torch.nn": ("Module._apply",),
    _FAKE_TENSORS: ("FakeTensorMode",),
    _GROUPS: ("_set_pg_timeout", "default_pg_timeout", "default_pg_nccl_timeout"),
}
_DISPATCH, _TREES = "torch.utils._python_dispatch", "torch.utils._pytree"
_FAKE_GROUPS = "torch.testing._internal.distributed.fake_pg"
TRACE_NAMES = {
    _FAKE_TENSORS: ("FakeTensorMode",),
    _DISPATCH: ("TorchDispatchMode",),
    _TREES: ("tree_leaves",),
    _FAKE_GROUPS: ("FakeStore",),
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
    """Return the context of tensors without values; torch.load reads a file's structure alone.

    Raises: ConfigError naming torch's version and the attribute.
    """
    return find_private(_FAKE_TENSORS, "FakeTensorMode")()


def file_offset(fake: Tensor) -> int:
    """Return where in its file the storage of a tensor begins that was loaded within
    `fake_tensors`.

    Raises: ConfigError naming torch's version and the attribute.
    """
    return int(read_private(fake.untyped_storage(), "_checkpoint_offset", library="torch"))


def add_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Add tensors to tensors in place, on a GPU by few kernels."""
    torch._foreach_add_(targets, sources)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors into tensors, on a GPU by few kernels."""
    torch._foreach_copy_(targets, sources)


def norms_of_all(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the norm of each tensor, an fp32 scalar, on a GPU by few kernels."""
    return torch._foreach_norm(tensors, 2, dtype=torch.float32)


def set_group_timeouts(timeout_seconds: float, *groups: Any) -> None:
    """Give process groups a time-out; without any, all those that libraries make from now on."""
    timeout = timedelta(seconds=timeout_seconds)
    for group in groups:
        find_private(_GROUPS, "_set_pg_timeout")(timeout, group)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout") if not groups else ():
        find_private(_GROUPS, name)
        setattr(torch.distributed.distributed_c10d, name, timeout)


def dispatch_mode() -> Any:
    """Return the class of contexts whose `__torch_dispatch__` gets every operation inside.

    Raises: ConfigError naming torch's version and what else of `TRACE_NAMES` is missing.
    """
    check_names(TRACE_NAMES)
    return find_private(_DISPATCH, "TorchDispatchMode")


def fake_store() -> Any:
    """Return the store of a process group of torch's backend "fake", and register the backend."""
    return find_private(_FAKE_GROUPS, "FakeStore")()


def traced_operation(name: str) -> Any:
    """Return one of torch's operations, such as `_grouped_mm.default`."""
    return find_private("torch", f"ops.aten.{name}")


def operation_family(operation: Any) -> Any:
    """Return what all overloads of an operation have in common, by which torch counts FLOPs."""
    return read_private(operation, "_overloadpacket", library="torch")


def changes_inputs(operation: Any) -> bool:
    """Return whether an operation writes into one of its inputs."""
    return bool(read_private(operation, "_schema", library="torch").is_mutable)


def arguments_of(operation: Any) -> list[tuple[str, bool, bool]]:
    """Return of each argument of an operation its name, whether it is written, and whether by
    keyword alone, as an `out`.
    """
    schema = read_private(operation, "_schema", library="torch")
    return [
        (one.name, one.alias_info is not None and one.alias_info.is_write, one.kwarg_only)
        for one in schema.arguments
    ]


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries."""
    leaves = find_private(_TREES, "tree_leaves")(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def storage_key(tensor: Tensor) -> int:
    """Return what tells a tensor's storage from the other storages that are alive."""
    return int(read_private(tensor.untyped_storage(), "_cdata", library="torch"))
