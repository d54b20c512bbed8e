"""Files of `torch.save`, read and written range by range: no file is ever whole in memory.

A file is mapped when it is read, and what was read of it is released at once: resident are the
tensor in hand and nothing else. It is written by torch without its values (a sparse file), which
are filled in afterwards by plain writes. Nothing is executed from a file (`weights_only`).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import struct
import zipfile
import zlib
from argparse import Namespace
from io import BufferedRandom
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promoe_ds.backends.deepspeed_private import LossScaler, fragment_address
from promoe_ds.errors import CheckpointError, cause_of, explaining
from promoe_ds.file_kind import SAFETENSORS, TORCH, identify
from promoe_ds.model.shards import bytes_of
from promoe_ds.torch_private import fake_tensors, file_offset, tensors_in

#: Plain records that DeepSpeed and the published code store beside tensors; nothing else is let in.
ALLOWED_RECORDS = [fragment_address, LossScaler, Namespace]
_LIBC = ctypes.CDLL(None)
_BLOCK = 1 << 22
#: Offsets and sizes of a zip archive's structures (APPNOTE 4.3.7, 4.3.9, 4.3.12).
_LOCAL_HEADER, _CRC_IN_HEADER = 30, 14
_DESCRIPTOR, _HAS_DESCRIPTOR = b"PK\x07\x08", 0x08
_DIRECTORY_ENTRY, _CRC_IN_DIRECTORY, _LENGTHS_IN_DIRECTORY = 46, 16, 28


def load_torch(path: Path, *, is_mapped: bool = False, map_location: Any = "cpu") -> Any:
    """Read a file of tensors, numbers, strings, containers and ALLOWED_RECORDS, executing nothing
    from it.

    Args:
        path: the file.
        is_mapped: leave the values in the file until `copy_range` or `copy_tensor` reads them.
    Raises: CheckpointError naming the file if it is damaged, no such file, or would run code.
    """
    with explaining(f"{path}: cannot be read"):
        kind = identify(path)
    if kind != TORCH:
        remedy = "torch.save(safetensors.torch.load_file(FILE), OTHER) makes a torch file of it"
        raise CheckpointError(
            f"{path}: cannot be read: it is {kind}{f': {remedy}' * (kind == SAFETENSORS)}"
        )
    try:
        with torch.serialization.safe_globals(ALLOWED_RECORDS):
            return torch.load(path, map_location=map_location, mmap=is_mapped, weights_only=True)
    except Exception as error:  # torch raises many kinds, from zip errors to unpickling ones
        reason = _unreadable_reason(path, error)
        raise CheckpointError(f"{path}: cannot be read: {reason}") from None


def copy_range(out_N: Tensor, mapped: Tensor, start: int) -> None:
    """Fill a flat tensor with the values [start, start + N) of a tensor of a mapped file.

    Raises: ValueError if the tensor has fewer values, or values of another type.
    """
    stop = start + out_N.numel()
    if out_N.dtype != mapped.dtype or stop > mapped.numel():
        raise ValueError(
            f"{mapped.numel()} values of {mapped.dtype}, expected {stop} of {out_N.dtype}"
        )
    whole = mapped if mapped.is_contiguous() else copy_tensor(mapped)
    values_N = whole.view(-1)[start:stop]
    out_N.copy_(values_N)
    _release(values_N)


def copy_tensor(mapped: Tensor) -> Tensor:
    """Return a tensor of a mapped file in memory of its own, contiguous."""
    value = mapped.clone(memory_format=torch.contiguous_format)
    _release(mapped)
    return value


def _release(mapped: Tensor) -> None:
    """Take the pages of a mapped tensor out of this process; they are read again if wanted."""
    # What is not mapped from a file would be lost; its storage can be resized.
    if mapped.numel() and not mapped.untyped_storage().resizable():
        strides = zip(mapped.shape, mapped.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in strides)
        first = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = mapped.data_ptr() + span * mapped.element_size() - first
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def check_records(path: Path) -> None:
    """Compare every record of a file with the CRC-32 that its archive has of it.

    Raises: CheckpointError naming the file and its first damaged record.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path}: cannot be read ({cause_of(error)})") from None
    if damaged is not None:
        raise CheckpointError(
            f"{path}: its record {damaged} does not match its CRC-32: the file is damaged, or was "
            "written without (torch.serialization.set_crc32_options); if so, load it and save it "
            "again"
        )


def _unreadable_reason(path: Path, error: Exception) -> str:
    """Return why torch cannot read a file; its own words advise to execute what the file says."""
    if isinstance(error, pickle.UnpicklingError):
        try:
            with torch.serialization.safe_globals(ALLOWED_RECORDS):
                wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception as problem:  # a damaged file, again of many kinds
            error, wanted = problem, []
        if wanted:
            return (
                f"it asks for {', '.join(wanted)} when it is opened, and files that could run code "
                "are refused; if you trust it, save its tensors alone"
            )
    return f"{cause_of(error)}: copy or download it again"


class TorchFileWriter:
    """A file of `torch.save` whose structure is written first and its values one by one."""

    def __init__(self, path: Path, content: Any) -> None:
        """Write the structure.

        Args:
            path: the file.
            content: nested dicts and lists; only the shapes of its tensors count (`torch.empty`
                takes no memory until it is touched), and each stands for its place in the file.
        Raises: CheckpointError naming the file if it cannot be written.
        """
        self.path = path
        with explaining(f"{path}: cannot be written"):
            with torch.serialization.skip_data():
                torch.save(content, path)
            with fake_tensors():
                places = tensors_in(torch.load(path, weights_only=True))
            self._file = path.open("r+b")
        self._offsets: dict[Tensor, int] = {
            tensor: file_offset(place)
            for tensor, place in zip(tensors_in(content), places, strict=True)
        }

    def write(self, place: Tensor, value: Tensor) -> None:
        """Write the values of one tensor of `content`."""
        if place.shape != value.shape or place.dtype != value.dtype:
            raise CheckpointError(
                f"{self.path}: {tuple(value.shape)} {value.dtype} does not fit "
                f"{tuple(place.shape)} {place.dtype}"
            )
        with explaining(f"{self.path}: cannot be written"):
            self._file.seek(self._offsets[place])
            self._file.write(bytes_of(value.contiguous()))

    def close(self) -> None:
        """Write the archive's checksums, which other readers check, flush to the disk, close."""
        _write_checksums(self._file, self.path)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _write_checksums(file: BufferedRandom, path: Path) -> None:
    """Write every record's CRC-32 to its header or the descriptor after it, and the directory."""
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
        places = [position + _CRC_IN_DIRECTORY, record.header_offset + _CRC_IN_HEADER]
        if record.flag_bits & _HAS_DESCRIPTOR:
            places[1] = begin + record.file_size + len(_DESCRIPTOR)
            file.seek(begin + record.file_size)
            if file.read(len(_DESCRIPTOR)) != _DESCRIPTOR:
                raise CheckpointError(f"{path}: torch's archive has an unknown structure")
        for place in places:
            file.seek(place)
            file.write(struct.pack("<I", crc))
        file.seek(position + _LENGTHS_IN_DIRECTORY)
        position += _DIRECTORY_ENTRY + sum(struct.unpack("<HHH", file.read(6)))
