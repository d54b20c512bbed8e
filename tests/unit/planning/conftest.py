"""Ranks that do not exist."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from promoe_ds.planning.shapes import fake_world


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Be rank 0 of four, or of as many as the test's parameter says."""
    with fake_world(getattr(request, "param", 4)):
        yield
