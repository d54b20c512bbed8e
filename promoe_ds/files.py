"""Files that are replaced in one move, and JSON without NaN and infinities, which it has no words
for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def json_text(value: Any, indent: int | None = None) -> str:
    """Return JSON in which NaN and infinities are null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as `replacing` does.

    Raises: OSError.
    """
    replace_text(path, json_text(value, indent=1))


def replace_text(path: Path, text: str) -> None:
    """Write a text as `replacing` does.

    Raises: OSError.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which it replaces when all went well.

    A reader finds the old file or the new one, whatever happens.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    temporary.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
