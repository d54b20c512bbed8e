"""With a CUDA device these tests run the kernels on it: they belong to `pytest -m gpu`, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if torch.cuda.is_available() and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
