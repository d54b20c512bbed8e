"""One net around every decoder of foreign files, and names of files as a message can print them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from promoe_ds.errors import DataError, PromoeError
from promoe_ds.file_kind import identify


def shown(name: str | Path) -> str:
    """Return a file's name on one line of UTF-8: line breaks and foreign bytes are escaped."""
    text = str(name)
    return text if text.isprintable() else repr(text)[1:-1]


@contextmanager
def reading(path: Path, what: str, *, kind: str | None = None) -> Iterator[None]:
    """Turn whatever a decoder raises into one error.

    Decoders of damaged files raise any kind: IndexError, RuntimeError, struct.error, zlib.error,
    MemoryError. Args:
        kind: of `identify` that the file should be: where it is another, the message says which.
    Raises: DataError naming the file, what it should be, and the decoder's complaint.
    """
    try:
        yield
    except PromoeError:
        raise
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        complaint = f"{type(error).__name__}: {shown(first_line)}"
        if kind is not None and path.is_file() and (found := identify(path)) != kind:
            complaint = f"it is {found}"
        raise DataError(f"{shown(path)}: not a readable {what} ({complaint})") from None
