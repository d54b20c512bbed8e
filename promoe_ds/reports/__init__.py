"""Expert load, specialisation and comparison: one log reader, one chart system, one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from promoe_ds.reports.load.page import ExpertLoad

__all__ = ["expert_load"]


def expert_load(run_dir: str | Path, *, last_steps: int | None = None) -> ExpertLoad:
    """Read how a run uses its experts: what `promoe-load` shows of it.

    Args:
        run_dir: directory of a run, or its routing.jsonl.
        last_steps: training steps that count as now; the last tenth if left out.
    Raises: DataError if there is no such log, or nothing in it.
    """
    from promoe_ds.reports.load.page import ExpertLoad
    from promoe_ds.reports.load.run import RunView

    return ExpertLoad(RunView.open(Path(run_dir), last_steps))
