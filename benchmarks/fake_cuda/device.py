"""The device that is not there: the guard's library, and stand-ins for what is asked of torch.cuda.

`build_guard` and `load_guard` import no torch: the guard must be in the process before it.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from promoe_ds.errors import ConfigError

if TYPE_CHECKING:
    from benchmarks.fake_cuda.recorder import Recorder

NAME = "NVIDIA H100 80GB HBM3"
_MEMORY = 80 << 30
_GUARD = Path(__file__).with_name("guard.cpp")


def build_guard(folder: Path) -> Path:
    """Compile the guard against the installed torch into `folder`; return the library.

    Raises: ConfigError without a g++, or where this torch's headers or libraries refuse.
    """
    compiler, spec = shutil.which("g++"), find_spec("torch")
    if compiler is None or spec is None or spec.origin is None:
        raise ConfigError("tracing without a GPU needs g++ and torch: install g++ (Debian: g++)")
    torch, library = Path(spec.origin).parent, folder / "libfakecuda.so"
    includes = (torch / "include", torch / "include/torch/csrc/api/include")
    command = [compiler, "-std=c++20", "-w", "-shared", "-fPIC", str(_GUARD), "-o", str(library)]
    command += [*(f"-I{path}" for path in includes), f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib"]
    done = subprocess.run(
        [*command, "-ltorch_cpu", "-lc10"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"g++ cannot build {_GUARD.name} against {torch}:\n{done.stderr[-800:]}")
    return library


def load_guard(library: Path) -> None:
    """Load the guard into this process.

    Raises: ConfigError where torch is loaded already, or a torch built for CUDA has a guard.
    """
    if "torch" in sys.modules:
        raise ConfigError(f"{library}: load the guard before torch")
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ConfigError(f"{library} does not fit this torch: {error}") from None


def stand_in(recorder: Recorder) -> None:
    """Answer in place of torch.cuda for the rest of this process; waits and events are noted in
    `recorder`.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Event:
        def __init__(self, enable_timing: bool = False, *unused: Any, **options: Any) -> None:
            self._is_timed, self.is_unread = enable_timing, False

        def record(self, *unused: Any) -> None:
            self.is_unread = self._is_timed
            recorder.events.add(self) if self._is_timed else None

        def wait(self, *unused: Any) -> None: ...

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            recorder.note_wait("event")

        def elapsed_time(self, end: Event) -> float:
            recorder.events -= {self, end}
            return 0.0

    class Stream:
        cuda_stream = 0

        def __init__(self, *unused: Any, **options: Any) -> None: ...

        def wait_stream(self, other: Stream) -> None: ...

        def wait_event(self, event: Event) -> None: ...

        def record_event(self, event: Event | None = None) -> Event:
            return event or Event()

        def synchronize(self) -> None:
            recorder.note_wait("stream")

    for name, answer in _answers(Stream()).items():
        setattr(torch.cuda, name, lambda *unused, _answer=answer, **options: _answer)
    torch.cuda.Event, torch.cuda.Stream = Event, Stream
    torch.cuda.stream = lambda stream: nullcontext()
    torch.cuda.synchronize = lambda *unused: recorder.note_wait("device")
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *unused, **options: None
    torch.version.cuda = "12.9"
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.Tensor.pin_memory = _pin
    torch.Tensor.is_pinned = lambda tensor, *unused: hasattr(tensor, "_is_pinned")
    torch.nn.Module._apply = _replace_parameters
    torch.nn.functional.scaled_dot_product_attention = _attention
    # A build for CUDA has a kernel for it; where there is none, autograd takes it apart.
    torch.library.impl("aten::silu_backward", "CUDA", torch.ops.aten.silu_backward.default)
    FakeTensorMode.avoid_device_init = property(lambda mode: True)
    torch.tensor = partial(_tensor, torch.tensor)


def _answers(default: Any) -> dict[str, Any]:
    """Return what functions of torch.cuda answer, by name; `default` is the only stream."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    properties.name, properties.total_memory = NAME, _MEMORY
    return {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "current_device": 0,
        "device_count": 8,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "get_device_name": NAME,
        "mem_get_info": (_MEMORY, _MEMORY),
        "current_stream": default,
        "default_stream": default,
        **dict.fromkeys(
            ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"),
            0,
        ),
        **dict.fromkeys(("set_device", "empty_cache", "reset_peak_memory_stats")),
    }


def _tensor(make: Any, *values: Any, **options: Any) -> Any:
    """Make a tensor on the host, then copy it: a rule that threads of the backward pass need."""
    import torch

    torch._C._set_only_lift_cpu_tensors(True)
    return make(*values, **options)


def _pin(tensor: Any) -> Any:
    """Mark a tensor as one in pinned memory."""
    tensor._is_pinned = True
    return tensor


def _replace_parameters(module: Any, fn: Any, recurse: bool = True) -> Any:
    """Do as Module._apply does; fake parameters cannot be changed or swapped in place."""
    from torch import nn, no_grad

    for child in module.children() if recurse else ():
        child._apply(fn)
    for table in (module._parameters, module._buffers):
        for name, old in [item for item in table.items() if item[1] is not None]:
            with no_grad():
                new = fn(old)
            if new is not old:
                is_parameter = table is module._parameters
                table[name] = nn.Parameter(new, old.requires_grad) if is_parameter else new
    return module


def _attention(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """Take the kernel that a GPU would: flash attention, or the efficient one in fp32."""
    import torch

    aten = torch.ops.aten
    if query.dtype == torch.float32:
        return aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
    return aten._scaled_dot_product_flash_attention(query, key, value)[0]
