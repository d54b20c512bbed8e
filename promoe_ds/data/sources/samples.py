"""Where samples come from: one interface for trees of files, tables and archives, and the threads
that decode them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import xxhash

from promoe_ds.data.listing import Files
from promoe_ds.data.reading import shown
from promoe_ds.data.vae import MOMENTS
from promoe_ds.errors import DataError
from promoe_ds.logs import get_logger

_LOG = get_logger("data")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns the user names: None where the usual ones are meant, '' for no labels."""

    image: str | None = None
    label: str | None = None


class Samples(ABC, Generic[_T]):
    """Images, or latents that are encoded already, in a fixed order.

    root: what messages call them all. labels: (N,) int64, places among `classes`. kind: of latents
    that are encoded already.
    """

    root: Path
    labels: np.ndarray
    classes: tuple[str, ...]
    kind = MOMENTS

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what shards of latents and messages call a sample."""

    @abstractmethod
    def take(self, index: int) -> _T:
        """Return what a decoder takes of a sample. One thread calls it, for best speed with
        ascending indices.

        Raises: DataError if there is nothing.
        """

    @abstractmethod
    def listing(self) -> str:
        """Return the checksum of what makes these samples these: names, and labels if the names do
        not say them.
        """


class PackedSamples(Samples[_T]):
    """Samples of which a file holds many. A reader sets `labels` and `classes`."""

    def __init__(self, files: Files, counts: Sequence[int], settings: str = "") -> None:
        """Take the files and the number of samples in each.

        Args:
            settings: what else decides which samples these are, for `listing`.
        Raises: DataError if they hold none.
        """
        self.root, self.files, self._settings = files.root, files, settings
        self.ends = np.cumsum(counts, dtype=np.int64)
        if not self.ends[-1]:
            raise DataError(f"{shown(files.root)}: the files there hold no sample")

    def name(self, index: int) -> str:
        """Return `FILE/ROW`."""
        file, row = place_of(self.ends, index)
        return f"{self.files.names[file]}/{row}"

    def listing(self) -> str:
        """Return the checksum of files, their sizes and numbers of samples, and of labels."""
        sizes = [path.stat().st_size for path in self.files.paths()]
        parts = self.files.names, sizes, self.ends.tolist(), self.classes, self._settings
        digest = xxhash.xxh3_64(repr(parts).encode(errors="surrogateescape"))
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


def place_of(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Return the number of the file that holds a sample, and the sample's row there."""
    file = int(np.searchsorted(ends, index, side="right"))
    return file, index - (int(ends[file - 1]) if file else 0)


class SampleReader:
    """Reads samples in several threads: decoders release Python's lock."""

    def __init__(
        self,
        samples: Samples[_T],
        read: Callable[[_T], Any],
        workers: int,
        *,
        max_corrupt: int = 0,
        setting: str = "",
    ) -> None:
        """Read with `read`, which raises DataError for a sample that it cannot.

        Args:
            max_corrupt: samples that may be left out, as `setting` says; without it none may.
        """
        self._samples, self._read = samples, read
        self._limit, self._setting = max_corrupt, setting
        self._pool = ThreadPoolExecutor(workers)
        self._corrupt: set[str] = set()

    def read(self, indices: Sequence[int]) -> dict[int, Any]:
        """Return what `read` makes of each of these samples, but for those that cannot be read.

        Raises: DataError, naming the latest of them, when they are too many.
        """
        found = {}
        items = [_attempt(self._samples.take, index) for index in indices]
        values = self._pool.map(partial(_attempt, self._read), items)
        for index, value in zip(indices, values, strict=True):
            if isinstance(value, DataError):
                self._count(self._samples.name(index), value)
            else:
                found[index] = value
        return found

    def _count(self, name: str, problem: DataError) -> None:
        """Name and count an unreadable sample; again the same costs nothing."""
        if not self._setting:
            raise problem
        if name in self._corrupt:
            return
        self._corrupt.add(name)
        count, allowed = len(self._corrupt), f"{self._setting}={self._limit}"
        if count > self._limit:
            raise DataError(
                f"{problem}; that makes {count} unreadable files, {allowed} are allowed: repair or "
                "remove them, or raise it"
            )
        _LOG.warning("skipped %s (%d of %s)", problem, count, allowed)


def _attempt(action: Callable[[Any], _T], value: Any) -> _T | DataError:
    """Return what an action makes of a value, or why it cannot; why there is no value stays."""
    if isinstance(value, DataError):
        return value
    try:
        return action(value)
    except DataError as error:
        return error
