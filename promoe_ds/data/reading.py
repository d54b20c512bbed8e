"""One net around every decoder of foreign files, and names of files as a message can print them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from promoe_ds.errors import DataError, PromoeError


def shown(name: str | Path) -> str:
    """Return a file's name on one line of UTF-8: line breaks and foreign bytes are escaped."""
    text = str(name)
    return text if text.isprintable() else repr(text)[1:-1]


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a decoder raises into one error.

    Decoders of damaged files raise any kind: IndexError, RuntimeError, struct.error, zlib.error,
    MemoryError.
    Raises: DataError naming the file, what it should be, and the decoder's complaint.
    """
    try:
        yield
    except PromoeError:
        raise
    except Exception as error:
        complaint = next(iter(str(error).splitlines()), "")
        raise DataError(
            f"{shown(path)}: not a readable {what} ({type(error).__name__}: {shown(complaint)})"
        ) from None
