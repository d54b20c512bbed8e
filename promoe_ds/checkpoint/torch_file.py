"""Files of `torch.save`, read and written range by range: no file, however large, is ever whole in memory.

Torch reads a file's structure without its values (fake tensors that know where in the file their bytes lie) and writes a
file whose values are left out, to be filled in afterwards. Both are used here with plain reads and writes, so that what is
resident is the tensor in hand and nothing else. Nothing is executed from a file (`weights_only`).
"""

from __future__ import annotations

import errno
import os
import pickle
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from io import BufferedRandom, BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from promoe_ds.errors import CheckpointError
from promoe_ds.file_kind import SAFETENSORS, TORCH, identify
from promoe_ds.logs import get_logger
from promoe_ds.model.shards import bytes_of
from promoe_ds.torch_private import fake_tensors, file_offset

_LOG = get_logger("checkpoint")
_BLOCK = 1 << 22
#: Offsets and sizes of a zip archive's structures (APPNOTE 4.3.7, 4.3.9, 4.3.12).
_LOCAL_HEADER, _CRC_IN_HEADER = 30, 14
_DESCRIPTOR, _HAS_DESCRIPTOR = b"PK\x07\x08", 0x08
_DIRECTORY_ENTRY, _CRC_IN_DIRECTORY, _LENGTHS_IN_DIRECTORY = 46, 16, 28


class TorchFile:
    """A file of `torch.save`, opened for reading: `content` has its structure with fake tensors in place of values."""

    def __init__(self, path: Path, allowed: Sequence[Callable[..., Any]] | None = None) -> None:
        """Read the structure.

        Args:
            path: the file.
            allowed: plain records that the file may hold beside tensors, numbers, strings and containers.
        Raises: CheckpointError naming the file if it is damaged, no such file, or would run code.
        """
        self.path = path
        self._file = _open(path)
        try:
            self._size = path.stat().st_size
            require_torch(path, self._file)
            with torch.serialization.safe_globals(list(allowed or [])), fake_tensors():
                self.content: Any = torch.load(self._file, map_location="cpu", weights_only=True)
        except CheckpointError:
            self.close()
            raise
        except Exception as error:  # torch raises many kinds, from zip errors to unpickling ones
            self.close()
            raise CheckpointError(f"{path}: cannot be read: {unreadable_reason(path, error, allowed)}") from None

    def read(self, fake: Tensor) -> Tensor:
        """Return the values of one tensor of `content`, in memory of their own.

        Raises: CheckpointError if the file ends before, whatever size its header claims.
        """
        span = 1 + sum((size - 1) * stride for size, stride in zip(fake.shape, fake.stride(), strict=True)) if fake.numel() else 0
        self._check_extent(self._offset(fake), span * fake.element_size())
        flat = torch.empty(span, dtype=fake.dtype)
        self._read_bytes(flat, self._offset(fake))
        return flat.as_strided(fake.shape, fake.stride()).contiguous()

    def check_records(self) -> None:
        """Hold every record of the archive against the CRC-32 that the archive has of it.

        Raises: CheckpointError naming the file and its first damaged record.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                damaged = archive.testzip()
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error})") from None
        if damaged is not None:
            raise CheckpointError(f"{self.path}: its record {damaged} does not match its CRC-32: the file is damaged, or was "
                                  "written without (torch.serialization.set_crc32_options); if so, load it and save it again")

    def read_into(self, out_N: Tensor, fake: Tensor, start: int) -> None:
        """Fill a flat tensor with the values [start, start + N) of a contiguous tensor of `content`.

        Raises: CheckpointError if the file ends before, or the types differ.
        """
        if not fake.is_contiguous():
            out_N.copy_(self.read(fake).view(-1)[start:start + out_N.numel()])
            return
        if out_N.dtype != fake.dtype or start + out_N.numel() > fake.numel():
            raise CheckpointError(f"{self.path}: holds {fake.numel()} values of {fake.dtype} where {start + out_N.numel()} of "
                                  f"{out_N.dtype} are wanted")
        self._read_bytes(out_N, self._offset(fake) + start * fake.element_size())

    def item(self, value: Any) -> Any:
        """Return a number that is stored as such or as a tensor of one value."""
        return self.read(value).item() if isinstance(value, Tensor) else value

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _offset(self, fake: Tensor) -> int:
        return file_offset(fake) + int(fake.storage_offset()) * fake.element_size()

    def _check_extent(self, offset: int, length: int) -> None:
        if offset + length > self._size:
            raise CheckpointError(f"{self.path}: ends before its tensors do ({self._size} bytes)")

    def _read_bytes(self, out: Tensor, offset: int) -> None:
        self._check_extent(offset, out.nbytes)
        self._file.seek(offset)
        view = bytes_of(out)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{self.path}: ends before its tensors do")
            done += count


def require_torch(path: Path, file: BinaryIO | None = None) -> None:
    """Raise CheckpointError naming what a file is, open or not, if it is not torch.save's: torch would advise, or run it."""
    if (kind := identify(file or path)) != TORCH:
        remedy = ": torch.save(safetensors.torch.load_file(FILE), OTHER) makes one of torch of it" * (kind == SAFETENSORS)
        raise CheckpointError(f"{path}: cannot be read: it is {kind}{remedy}")


def unreadable_reason(path: Path, error: Exception, allowed: Sequence[Callable[..., Any]] | None = None) -> str:
    """Return why torch cannot read a file, in our words: torch's advise to execute what the file says."""
    if isinstance(error, pickle.UnpicklingError):
        try:
            with torch.serialization.safe_globals(list(allowed or [])):
                wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception as problem:  # a damaged file, again of many kinds
            error, wanted = problem, []
        if wanted:
            return (f"it asks for {', '.join(wanted)} when it is opened, and files that could run code are refused; save its "
                    "tensors alone, where you trust it")
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _open(path: Path) -> BufferedReader:
    """Open a file for reading; where this process may hold no more open, let it hold as many as its host allows.

    Checkpoints of many ranks are read side by side: more files than the usual 1,024.
    Raises: CheckpointError naming the limit.
    """
    try:
        return path.open("rb")
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == hard:
            raise CheckpointError(f"{path}: cannot be opened beside all others: this process may hold {hard} files open: raise "
                                  "the hard limit (ulimit -Hn)") from None
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _LOG.info("%d open files are not enough: raised the limit to the host's, %d", soft, hard)
    return path.open("rb")


class TorchFileWriter:
    """A file of `torch.save` whose structure is written first and whose values are filled in one by one."""

    def __init__(self, path: Path, content: Any) -> None:
        """Write the structure.

        Args:
            path: the file.
            content: nested dicts and lists; tensors in them are shapes only: `torch.empty` takes no memory until touched.
        Raises: CheckpointError naming the file if it cannot be written.
        """
        self.path = path
        try:
            with torch.serialization.skip_data():
                torch.save(content, path)
            with fake_tensors():
                self.content: Any = torch.load(path, weights_only=True)
            self._file = path.open("r+b")
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: cannot be written ({error})") from None

    def write(self, fake: Tensor, value: Tensor) -> None:
        """Fill in the values of one tensor of `content`."""
        if fake.shape != value.shape or fake.dtype != value.dtype:
            raise CheckpointError(f"{self.path}: {tuple(value.shape)} {value.dtype} does not fit {tuple(fake.shape)} {fake.dtype}")
        try:
            self._file.seek(file_offset(fake))
            self._file.write(bytes_of(value.contiguous()))
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written ({error})") from None

    def close(self) -> None:
        """Flush to the disk and close; the archive's own checksums, which only other readers look at, are made true."""
        _write_checksums(self._file, self.path)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _write_checksums(file: BufferedRandom, path: Path) -> None:
    """Put every record's CRC-32 where zip wants it: in its own header or the descriptor behind it, and in the directory."""
    file.flush()
    with zipfile.ZipFile(path) as archive:
        records, position = archive.infolist(), archive.start_dir
    for record in records:
        file.seek(record.header_offset)
        header = file.read(_LOCAL_HEADER)
        begin = record.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", header[26:30]))
        file.seek(begin)
        crc, left = 0, record.file_size
        while left:
            block = file.read(min(left, _BLOCK))
            crc, left = zlib.crc32(block, crc), left - len(block)
        value = struct.pack("<I", crc)
        places = [position + _CRC_IN_DIRECTORY]
        if record.flag_bits & _HAS_DESCRIPTOR:
            places.append(begin + record.file_size + len(_DESCRIPTOR))
            file.seek(begin + record.file_size)
            if file.read(len(_DESCRIPTOR)) != _DESCRIPTOR:
                raise CheckpointError(f"{path}: torch's archive is laid out otherwise than expected")
        else:
            places.append(record.header_offset + _CRC_IN_HEADER)
        for place in places:
            file.seek(place)
            file.write(value)
        file.seek(position + _LENGTHS_IN_DIRECTORY)
        position += _DIRECTORY_ENTRY + sum(struct.unpack("<HHH", file.read(6)))
