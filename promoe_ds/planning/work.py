"""What one operation of a trace costs: floating-point operations, bytes, kernels, and a predicted
time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from promoe_ds.backends.devices import Device
from promoe_ds.torch_private import (
    arguments_of,
    changes_inputs,
    operation_family,
    storage_key,
    tensors_in,
)

#: Make a tensor without writing it, or change its shape alone.
_NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("resize_", "set_", "record_stream"),
}
#: Write their result without reading what was there.
_OVERWRITE = {"copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_", "uniform_", "normal_"}
#: Touch as much of the indexed tensor as they bring or take.
_ADD_ROWS = {"index_add_", "scatter_add_", "index_put_", "index_copy_"}
_TAKE_ROWS = {"index_select", "gather", "embedding", "index", "select_rows"}
#: Arguments that operations of ours write without reading what was there.
_OUTPUTS = {"out_N"}
#: Kernels of operations that are several.
_KERNELS = {
    **dict.fromkeys(("sort", "argsort", "embedding_dense_backward"), 6),
    **dict.fromkeys(("index_put_", "repeat_interleave"), 3),
    **dict.fromkeys(("_grouped_mm", "topk", "sum_by_expert", "sum_groups", "sort_choices"), 2),
    **dict.fromkeys(("cosine_backward", "modulated_norm_backward", "residual_norm_backward"), 2),
    **dict.fromkeys(("gated_residual_backward", "bias_gelu_backward", "join_heads"), 2),
}
#: torch's operations on lists: numbers of a block, blocks of a kernel (MultiTensorApply.cuh).
_BLOCK, _BLOCKS = 65536, 320
#: Products of fused attention on a CPU, which torch's counter does not know.
_CPU_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,
}


@dataclass(frozen=True)
class Efficiency:
    """Reached shares of peak: matrix products, attention, memory bandwidth, links.

    For an offloaded update, bytes/s of a rank: host_memory, its share of the host's; host_link,
    between device and host.
    """

    matrix: float = 0.7
    attention: float = 0.5
    memory: float = 0.8
    link: float = 0.8
    host_memory: float = 25e9
    host_link: float = 25e9


class Work(NamedTuple):
    """An operation's kind (matrix, attention, other), the dtype it computes in, what it computes
    and moves, and in how many kernels.
    """

    kind: str
    dtype: str
    flops: int
    bytes: int
    kernels: int = 1

    def seconds(self, device: Device, efficiency: Efficiency) -> float:
        """Predict its time: the longer of computing and moving its operands."""
        peak = device.flops["bf16" if self.dtype == "bfloat16" else "fp32"]
        share = efficiency.attention if self.kind == "attention" else efficiency.matrix
        moving = self.bytes / (device.memory_bandwidth * efficiency.memory)
        return max(moving, self.flops / (peak * share))


def work_of(func: Any, args: tuple, kwargs: dict, result: Any) -> Work | None:
    """Return what an operation costs; None for one that needs no kernel: a view, or memory that
    nobody writes.
    """
    inputs, outputs = tensors_in((args, kwargs)), tensors_in(result)
    name, is_mutable = operation_family(func).__name__, changes_inputs(func)
    if name in _NO_KERNEL or (not outputs and not is_mutable):
        return None
    read = {storage_key(tensor) for tensor in inputs}
    if not is_mutable and all(storage_key(tensor) in read for tensor in outputs):
        return None
    dtype = str((inputs or outputs)[0].dtype).removeprefix("torch.")
    kind, flops = _flops(func, name, args, kwargs, result)
    moved = _bytes_moved(func, name, args, kwargs, inputs, outputs)
    return Work(kind, dtype, flops, moved, _kernels(name, args))


def _kernels(name: str, args: tuple) -> int:
    if not name.startswith(("_foreach_", "_fused_adam")):
        return _KERNELS.get(name, 1)
    return -(-sum(-(-tensor.numel() // _BLOCK) for tensor in args[0]) // _BLOCKS)


def _flops(func: Any, name: str, args: tuple, kwargs: dict, result: Any) -> tuple[str, int]:
    if name == "_grouped_mm":
        return "matrix", 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[-1]
    if name in _CPU_ATTENTION:
        queries, keys = args[1:3] if name.endswith("backward") else args[:2]
        batch, num_heads, tokens, width = queries.shape
        pairs = batch * num_heads * tokens * keys.shape[2]
        return "attention", _CPU_ATTENTION[name] * 2 * pairs * width
    kind = "attention" if "attention" in name else "matrix"
    counter = flop_registry.get(operation_family(func))
    if counter is None:
        return kind if kind == "attention" else "other", 0
    return kind, int(counter(*args, **kwargs, out_val=result))


def _bytes_moved(
    func: Any, name: str, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]
) -> int:
    if name in _TAKE_ROWS:
        return 2 * _size(outputs)
    if not changes_inputs(func):
        return sum(map(_distinct_bytes, inputs)) + _size(outputs)
    moved, positional = 0, dict(enumerate(args))
    for index, (argument, is_written, is_keyword) in enumerate(arguments_of(func)):
        tensors = tensors_in(positional.get(index, kwargs.get(argument)))
        if not is_written:
            moved += sum(map(_distinct_bytes, tensors)) * (2 if name in _ADD_ROWS else 1)
        elif name not in _ADD_ROWS:
            is_replaced = name in _OVERWRITE or is_keyword or argument in _OUTPUTS
            moved += _size(tensors) * (1 if is_replaced else 2)
    return moved


def _size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _distinct_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor that is read; expanded dimensions count once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count
