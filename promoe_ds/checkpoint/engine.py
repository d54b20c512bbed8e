"""How DeepSpeed's checkpoint files reach the disk: with checksums, without pickled code."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash
from torch import Tensor

from promoe_ds.backends.deepspeed_private import TorchCheckpointEngine
from promoe_ds.checkpoint.manifest import FileRecord
from promoe_ds.checkpoint.torch_file import load_torch

#: Smaller blocks are not worth a thread.
_LARGE_BLOCK = 1 << 20


class RecordingStorage(TorchCheckpointEngine):
    """Writes flushed files and remembers their sizes and checksums; reads tensors and plain records
    only.

    A failed write is remembered, not raised: DeepSpeed's save has barriers in it, where the other
    ranks would wait for ever. The trainer asks all ranks afterwards.
    """

    def __init__(self, *, background: bool = False) -> None:
        """Start with no record.

        Args:
            background: `save` copies to host memory and returns; a thread writes. `wait` before the
                records are read.
        """
        super().__init__()
        self.records: dict[str, FileRecord] = {}
        self.failure: str | None = None
        self._thread = (
            ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        )
        self._writes: list[Future[None]] = []

    @property
    def is_writing(self) -> bool:
        """Whether files are still being written."""
        return not all(write.done() for write in self._writes)

    def wait(self) -> None:
        """Return when everything handed over was written or has failed."""
        for write in self._writes:
            write.result()
        self._writes.clear()

    def create(self, info: Any) -> None:
        """Begin a checkpoint: forget the last one's records."""
        self.wait()
        self.records, self.failure = {}, None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file, or hand a copy of it over to be written."""
        if self._thread is None:
            self._write(_storable(state_dict, copy=False), Path(path))
        else:
            self._writes.append(
                self._thread.submit(self._write, _storable(state_dict, copy=True), Path(path))
            )

    def _write(self, state: Any, path: Path) -> None:
        if self.failure is not None:
            return
        writer = None
        try:
            with (
                path.open("wb") as file,
                ThreadPoolExecutor(1, thread_name_prefix="checksum") as helper,
            ):
                writer = _ChecksumWriter(file, helper)
                torch.save(state, cast("IO[bytes]", writer))
                file.flush()
                os.fsync(file.fileno())
            self.records[path.name] = FileRecord(writer.bytes, writer.checksum.hexdigest())
        except (OSError, RuntimeError) as error:
            # torch reports a failed write as an inner inconsistency of its archive; the writer
            # knows the cause.
            self.failure = f"{path}: {(writer and writer.failure) or error}"

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file.

        Raises: CheckpointError if it is missing, damaged, or holds anything but tensors and plain
            records.
        """
        return load_torch(Path(path), map_location=map_location)


def _storable(value: Any, *, copy: bool) -> Any:
    """Replace enums by their values and, with `copy`, tensors by copies in host memory.

    Some Python versions pickle enums as a call of getattr, which no reader should allow.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Tensor) and copy:
        return value.detach().to("cpu", copy=True)
    if type(value) is dict or type(value) is OrderedDict:
        result = type(value)((key, _storable(item, copy=copy)) for key, item in value.items())
        if type(value) is OrderedDict:
            vars(result).update(vars(value))  # a module's state carries its version so
        return result
    if type(value) in (list, tuple):
        return type(value)(_storable(item, copy=copy) for item in value)
    return value


class _ChecksumWriter(io.RawIOBase):
    """A write-only file that keeps count and checksum of what passes; large blocks are summed up
    while they are written.
    """

    def __init__(self, file: Any, helper: ThreadPoolExecutor) -> None:
        self._file, self._helper = file, helper
        self.bytes, self.checksum = 0, xxhash.xxh3_64()
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.bytes += view.nbytes
        summing = (
            self._helper.submit(self.checksum.update, view) if view.nbytes > _LARGE_BLOCK else None
        )
        try:
            if summing is None:
                self.checksum.update(view)
            self._file.write(view)
        except OSError as error:
            self.failure = error
            raise
        finally:
            if summing is not None:
                summing.result()  # the block is the caller's again when we return
        return view.nbytes
