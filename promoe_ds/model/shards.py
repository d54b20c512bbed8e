"""Tensors in safetensors files: one, or several of bounded size with an index, by the conventions
of the Hugging Face hub.

A file's metadata also holds the XXH3 of each tensor's bytes, which other readers pass over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from promoe_ds.errors import CheckpointError, cause_of, explaining
from promoe_ds.file_kind import SAFETENSORS, identify

#: Larger sets of tensors are cut into files of at most this many bytes.
MAX_SHARD_BYTES = 2 * 10**9
_CHECKSUMS = "xxh3_64"
_AGAIN = ": copy or convert the export again"


class ShardReader:
    """Reads tensors by name from `STEM.safetensors`, or from the files that
    `STEM.safetensors.index.json` lists.
    """

    def __init__(self, folder: Path, stem: str, *, check: bool = True) -> None:
        """Read names and shapes.

        Args:
            check: whether `read` compares tensors with their checksums.
        Raises: CheckpointError naming the file that is missing, damaged, or outside of the folder.
        """
        self._open: tuple[str, safe_open] | None = None
        self._checksums: dict[str, str] = {}
        self._folder = folder
        self._files = _read_index(folder, stem)
        self.shapes: dict[str, tuple[int, ...]] = {}
        #: As safetensors calls them: F32, BF16, ...
        self.dtypes: dict[str, str] = {}
        single = self._files.pop("", None)
        for file in [single] if single else sorted(set(self._files.values())):
            with self._opened(file) as handle:
                for name in handle.keys():
                    if single:
                        self._files[name] = single
                    elif self._files.get(name) != file:
                        raise CheckpointError(
                            f"{folder / file}: holds {name}, which the index does not place there"
                        )
                    self.shapes[name] = tuple(handle.get_slice(name).get_shape())
                    self.dtypes[name] = handle.get_slice(name).get_dtype()
                # None where another program wrote the file.
                checksums = (handle.metadata() or {}).get(_CHECKSUMS, "{}") if check else "{}"
            with explaining(f"{folder / file}: {_CHECKSUMS} cannot be understood"):
                self._checksums |= dict(json.loads(checksums))
        if missing := self._files.keys() - self.shapes.keys():
            raise CheckpointError(
                f"{folder}: {sorted(missing)[0]} is in the index and in no file{_AGAIN}"
            )

    def read(self, name: str) -> Tensor:
        """Return one tensor, mapped from its file, after comparing it with its checksum where the
        file has one.

        Raises: CheckpointError if it cannot be read, or is damaged.
        """
        with self._opened(self._files[name]) as handle:
            value = handle.get_tensor(name)
        if name in self._checksums and self._checksums[name] != digest(value):
            raise CheckpointError(
                f"{self._folder / self._files[name]}: {name} does not match its checksum{_AGAIN}"
            )
        return value

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        """Return entries [first, first + count) of a tensor's first axis, in memory of their own;
        no checksum covers them.

        Raises: CheckpointError if it cannot be read.
        """
        with self._opened(self._files[name]) as handle:
            return handle.get_slice(name)[first : first + count].clone()

    def close(self) -> None:
        """Let go of the file that is open."""
        self._open = None

    @contextmanager
    def _opened(self, file: str) -> Iterator[safe_open]:
        """Yield a file, which stays open until another one is: what is mapped counts as memory.

        Raises: CheckpointError if it cannot be read, also by the caller.
        """
        path = self._folder / file
        try:
            if self._open is None or self._open[0] != file:
                self._open = None
                self._open = (file, safe_open(path, framework="pt"))
            yield self._open[1]
        except (OSError, SafetensorError) as error:
            reason = f"{cause_of(error)}{_AGAIN}"
            if isinstance(error, SafetensorError) and (kind := identify(path)) != SAFETENSORS:
                reason = f"it is {kind}"
            raise CheckpointError(f"{path}: cannot be read: {reason}") from None


class ShardWriter:
    """Writes tensors one by one; a file is written whenever it is full, so that one file's worth is
    held at most.
    """

    def __init__(self, folder: Path, stem: str, *, max_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write into `folder`, which exists."""
        self._folder, self._stem, self._max_bytes = folder, stem, max_bytes
        self._pending: dict[str, Tensor] = {}
        self._checksums: dict[str, str] = {}
        self._bytes = self._total = 0
        self._written: list[tuple[Path, list[str]]] = []
        self._is_closed = False

    def write(self, name: str, value: Tensor) -> str:
        """Add a tensor; return the checksum of its bytes.

        Raises: CheckpointError naming the file if it cannot be written.
        """
        if self._pending and self._bytes + value.nbytes > self._max_bytes:
            self._flush()
        self._pending[name] = value.contiguous()
        self._checksums[name] = digest(self._pending[name])
        self._bytes += value.nbytes
        self._total += value.nbytes
        return self._checksums[name]

    def close(self) -> None:
        """Write the rest, give the files their names, and an index if they are several.  Once;
        later calls do nothing.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._flush()
        count = len(self._written)
        if count == 1:
            self._written[0][0].rename(self._folder / f"{self._stem}.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._written, start=1):
            final = f"{self._stem}-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        _index_path(self._folder, self._stem).write_text(
            json.dumps(index, indent=1), encoding="utf-8"
        )

    def _flush(self) -> None:
        path = self._folder / f"{self._stem}.part{len(self._written)}"
        try:
            save_file(
                self._pending,
                path,
                metadata={"format": "pt", _CHECKSUMS: json.dumps(self._checksums)},
            )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be written ({cause_of(error)})") from None
        self._written.append((path, list(self._pending)))
        self._pending, self._checksums, self._bytes = {}, {}, 0


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's memory as bytes, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def digest(value: Tensor) -> str:
    """Return the XXH3 of a tensor's bytes, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(bytes_of(value))


def _index_path(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.safetensors.index.json"


def _read_index(folder: Path, stem: str) -> dict[str, str]:
    """Return name -> file; for a single file the names are not known yet: one entry without a
    name.
    """
    single, index = f"{stem}.safetensors", _index_path(folder, stem)
    if (folder / single).is_file():
        return {"": single}
    if not index.is_file():
        raise CheckpointError(f"{folder / single}: there is no such file, nor {index.name}{_AGAIN}")
    with explaining(f"{index}: cannot be understood"):
        files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index}: the file name {file!r} leaves the folder")
    return files
