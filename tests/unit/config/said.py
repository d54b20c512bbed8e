"""What a refusal says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from promoe_ds.errors import ConfigError


def refuses(*parts: str) -> Any:
    """Expect a ConfigError whose message holds these parts, in this order."""
    return pytest.raises(ConfigError, match="(?s)" + ".*".join(re.escape(part) for part in parts))
