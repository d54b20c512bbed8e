"""Discovers the reference cases: every JSON sidecar in $PROMOE_GOLDEN_DIR is one."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

GOLDEN_DIR = Path(
    os.environ.get("PROMOE_GOLDEN_DIR", Path(__file__).parents[3] / "shared" / "golden")
)


@dataclass(frozen=True)
class Case:
    """One reference case: its sidecar and, on demand, its tensors."""

    path: Path
    sidecar: dict[str, Any]

    def __str__(self) -> str:
        return self.path.stem

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.sidecar["compute_dtype"])

    @property
    def tolerance(self) -> dict[str, float]:
        return {name: self.sidecar["tolerance"][name] for name in ("rtol", "atol")}

    def tensors(self, prefix: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Return the tensors under `prefix.`; floating ones cast to `dtype`, else inputs and states
        to the compute dtype.
        """
        data = load_file(self.path.with_suffix(".safetensors"))
        cast = dtype or (self.dtype if prefix in ("state", "in") else None)
        return {
            key.removeprefix(f"{prefix}."): value.to(cast) if value.is_floating_point() else value
            for key, value in data.items()
            if key.startswith(f"{prefix}.")
        }


def all_cases() -> list[Case]:
    return [Case(path, json.loads(path.read_text())) for path in sorted(GOLDEN_DIR.glob("*.json"))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test of level L (its marker) the cases of that level."""
    marker = metafunc.definition.get_closest_marker("golden_level")
    if marker is None or "case" not in metafunc.fixturenames:
        return
    cases = [case for case in all_cases() if case.sidecar["level"] == marker.args[0]]
    if cases:
        metafunc.parametrize("case", cases, ids=str)
    else:
        reason = (
            f"no reference case of level {marker.args[0]!r} in {GOLDEN_DIR} (set PROMOE_GOLDEN_DIR)"
        )
        metafunc.parametrize("case", [pytest.param(None, marks=pytest.mark.skip(reason=reason))])
