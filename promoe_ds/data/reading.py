"""One net around every decoder of foreign files, names of files as a message can print them, and
what rank 0 alone says of files that all ranks see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from promoe_ds.errors import DataError, PromoeError, cause_of
from promoe_ds.file_kind import identify
from promoe_ds.logs import get_logger, rank_from_environment

_LOG = get_logger("data")
_T = TypeVar("_T")
_NAMED = 3


def shown(name: str | Path) -> str:
    """Return a file's name on one line of UTF-8: line breaks and foreign bytes are escaped."""
    text = str(name)
    return text if text.isprintable() else repr(text)[1:-1]


def some_of(names: Collection[str], *, counted: bool = False) -> str:
    """Return the first names, or the most frequent with their counts, for a message."""
    parts = [
        f"{count} {shown(name)}" if counted else shown(name)
        for name, count in Counter(names).most_common(_NAMED)
    ]
    return ", ".join(parts) + (" ..." if len(names) > _NAMED else "")


def warn_once(message: str, *values: Any) -> None:
    """Warn on rank 0 of what every rank finds."""
    if rank_from_environment() == 0:
        _LOG.warning(message, *values)


@contextmanager
def reading(path: Path, what: str, *, kind: str | None = None) -> Iterator[None]:
    """Turn whatever a decoder raises into one error.

    Decoders of damaged files raise any kind: IndexError, RuntimeError, struct.error, zlib.error,
    MemoryError.
    Args:
        kind: of `identify` that the file should be: where it is another, the message says which.
    Raises: DataError naming the file, what it should be, and the decoder's complaint.
    """
    try:
        yield
    except PromoeError:
        raise
    except Exception as error:
        complaint = shown(cause_of(error))
        if kind is not None and path.is_file() and (found := identify(path)) != kind:
            complaint = f"it is {found}"
        raise DataError(f"{shown(path)}: not a readable {what} ({complaint})") from None


def read_text(path: Path) -> str:
    """Return what a text file holds.

    Raises: DataError naming a file that cannot be read, or the first byte that is not UTF-8.
    """
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{shown(path)}: line {line} is not UTF-8 (byte {content[error.start]:#04x}): convert"
            " it, e.g. by iconv -f latin1 -t utf-8"
        ) from None


def read_json(path: Path, what: str, kind: type[_T]) -> _T:
    """Return what a JSON file holds.

    Raises: DataError naming a file that cannot be read, or the field that is not as `kind` says.
    """
    with reading(path, what):
        return msgspec.json.decode(path.read_bytes(), type=kind)
