"""Files that other programs read: JSON without NaN and infinities, which it cannot say, written in one move."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def json_text(value: Any, indent: int | None = None) -> str:
    """Return JSON in which NaN and infinities are null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file that is either the old or the new one, whatever happens.

    Raises: OSError.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json_text(value, indent=1), encoding="utf-8")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
