"""A run as the report looks at it: its log, the window that counts as now, and sums that several figures need."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from promoe_ds.analysis.expert_load.log import RoutingLog, load_log
from promoe_ds.analysis.expert_load.placement import Outlook, outlooks
from promoe_ds.analysis.expert_load.stats import Lack, RunFacts, find_lacks, read_facts, share_of_time_lost

#: Points that a curve or a map over time has at most.
_MOST_POINTS = 120


@dataclass
class RunView:
    """One run. Letters: T intervals, P points in time, L layers, Q bins, E experts.

    peers: the runs that it is shown beside, itself among them: their curves share a scale.
    """

    log: RoutingLog
    facts: RunFacts
    window: slice
    peers: list[RunView] = field(default_factory=list)

    @classmethod
    def open(cls, run_dir: Path, last_steps: int | None = None) -> RunView:
        """Read a run.

        Args:
            last_steps: that count as now; the last tenth if left out.
        """
        log = load_log(run_dir)
        window = log.window(last_steps)
        return cls(log, read_facts(log, window), window)

    @property
    def name(self) -> str:
        """The run directory's name."""
        return self.facts.name

    @property
    def notes(self) -> list[str]:
        """What had to be left out or put right."""
        return [*self.log.notes, *self.facts.notes]

    @cached_property
    def starts_P(self) -> np.ndarray:
        """First interval of each point in time."""
        count = min(_MOST_POINTS, len(self.log.steps_T))
        return np.linspace(0, len(self.log.steps_T), count, endpoint=False).astype(int)

    @cached_property
    def steps_P(self) -> np.ndarray:
        """Step at the end of each point in time."""
        return self.log.steps_T[np.append(self.starts_P[1:], len(self.log.steps_T)) - 1]

    @cached_property
    def tokens_PLE(self) -> np.ndarray:
        """Tokens over time, all bins."""
        return self.over_time(self.log.tokens_TLE)

    @cached_property
    def tokens_LQE(self) -> np.ndarray:
        """Tokens of the window."""
        return self.log.tokens_TLQE[self.window].sum(axis=0)

    @cached_property
    def tokens_LE(self) -> np.ndarray:
        """Tokens of the window, all bins."""
        return self.tokens_LQE.sum(axis=1)

    @cached_property
    def lacks(self) -> list[Lack]:
        """Dead and starving experts."""
        return find_lacks(self.log, self.window)

    @cached_property
    def outlooks(self) -> list[Outlook]:
        """Other placements; the first is the present one."""
        return outlooks(self.log, self.window)

    @cached_property
    def window_steps(self) -> int:
        """Steps that the window covers."""
        return int(self.log.covered_T[self.window].sum())

    def over_time(self, values: np.ndarray) -> np.ndarray:
        """Sum intervals (T, ...) into points in time (P, ...)."""
        return np.add.reduceat(values, self.starts_P, axis=0)

    def mean_over_time(self, values: np.ndarray) -> np.ndarray:
        """Average intervals (T, ...) into points in time, NaN left out."""
        known = ~np.isnan(values)
        total, count = self.over_time(np.where(known, values, 0.0)), self.over_time(known.astype(int))
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    def time_lost(self, uneven_L: np.ndarray) -> float | None:
        """Return the estimated share of a step that an unevenness costs; None where it cannot be known."""
        if self.facts.config is None:
            return None
        return share_of_time_lost(self.facts.config, self.log, uneven_L, self.window)

    def measured_uneven(self) -> np.ndarray:
        """Return each layer's fullest rank over the mean, pass by pass (L,), NaN where not logged."""
        values = self.log.rank_uneven_TL[self.window]
        known = ~np.isnan(values)
        return np.divide(np.where(known, values, 0).sum(axis=0), known.sum(axis=0), out=np.full(values.shape[1], np.nan),
                         where=known.any(axis=0))

    def present_uneven(self) -> np.ndarray:
        """Return the measured unevenness, or that of whole intervals where it was not logged."""
        measured = self.measured_uneven()
        return np.where(np.isnan(measured), self.outlooks[0].uneven_L, measured)
