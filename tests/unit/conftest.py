"""Settings of every unit test: repeatable, on one thread."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Repeatable runs; no database, which would write into the repository.
settings.register_profile("unit", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("unit")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Leave no variable behind: a port that one test has chosen may be taken when the next one
    asks for it.
    """
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """Return what the package logs from INFO on, as it goes."""
    lines: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("promoe_ds")
    handler.emit = lambda record: lines.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)
