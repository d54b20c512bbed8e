"""The guard of the device that is not there, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fake_cuda.device import build_guard
from promoe_ds.errors import ConfigError


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build_guard(tmp_path_factory.mktemp("guard"))
    except ConfigError as error:
        pytest.skip(str(error))
