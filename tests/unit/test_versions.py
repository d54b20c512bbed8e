"""Which versions of DeepSpeed a run starts with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from promoe_ds import versions
from promoe_ds.errors import ConfigError


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        ("0.19.8", True),
        ("0.19.8+unknown", True),
        ("0.19.12", True),
        ("0.19.6", False),
        ("0.18.9", False),
        ("0.20.0", False),
        ("1.0", False),
        (None, False),
    ],
)
def test_deepspeed_out_of_range_is_refused_before_its_import(
    monkeypatch, found: str | None, fits: bool
) -> None:
    def version(package: str) -> str:
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(versions, "version", version)
    if fits:
        versions.check_deepspeed()
        return
    with pytest.raises(ConfigError, match="deepspeed"):
        versions.check_deepspeed()


def test_deepspeed_range_is_the_installers() -> None:
    least, below = versions.DEEPSPEED_RANGE
    assert f'"deepspeed>={least},<{below}"' in (
        Path(__file__).parents[2] / "pyproject.toml"
    ).read_text(encoding="utf-8")
