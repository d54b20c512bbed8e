"""A run as the report looks at it: its log, the window that counts as now, and sums that several figures need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from promoe_ds.analysis.expert_load.log import RoutingLog, load_log
from promoe_ds.analysis.expert_load.placement import Outlook, advise, others
from promoe_ds.analysis.expert_load.stats import Lack, RunFacts, find_lacks, read_facts, share_of_time_lost

#: Points that a curve or a map over time has at most.
_MOST_POINTS = 120


@dataclass
class RunView:
    """One run. Letters: T intervals, P points in time, L layers, Q bins, E experts.

    peers: the runs that it is shown beside, itself among them: their curves share a scale. label: its name among them.
    """

    log: RoutingLog
    facts: RunFacts
    window: slice
    peers: list[RunView] = field(default_factory=list)

    label: str = ""

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
        """The run directory's name, with as much of its path as tells it from its peers."""
        return self.label or self.facts.name

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
        """Tokens of the window by noise level."""
        return self.log.tokens_TLQE[self.window].sum(axis=0)

    @cached_property
    def tokens_LE(self) -> np.ndarray:
        """Tokens of the window, all bins."""
        return self.log.tokens_TLE[self.window].sum(axis=0)

    @cached_property
    def lacks(self) -> list[Lack]:
        """Dead and starving experts."""
        return find_lacks(self.log, self.window)

    @cached_property
    def present(self) -> Outlook:
        """How experts lie now."""
        return Outlook.of(self.log, self.window, "present", self.log.order_LE, self.log.ep_size)

    @cached_property
    def advised(self) -> Outlook:
        """The advised placement on as many ranks; the present one where nothing better was found."""
        order_LE = advise(self.log, self.window, self.log.ep_size)
        return Outlook.of(self.log, self.window, "advised", order_LE, self.log.ep_size)

    @cached_property
    def outlooks(self) -> list[Outlook]:
        """The present placement, then others on every number of ranks that divides the experts."""
        return [self.present, *others(self.log, self.window, self.advised)]

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
        return np.where(np.isnan(measured), self.present.uneven_L, measured)

    def advised_uneven(self) -> np.ndarray:
        """Return what the advised placement is estimated to give, pass by pass as `present_uneven`.

        The measured unevenness also holds what comes and goes from pass to pass, which no order takes away: an order changes it
        by the factor by which it changes that of whole intervals.
        """
        before, after = self.present.uneven_L, self.advised.uneven_L
        return self.present_uneven() * np.divide(after, before, out=np.ones(len(before)), where=before > 0)

    def newest(self, values_TLE: np.ndarray) -> np.ndarray:
        """Return each value's newest one in the window, NaN where none was logged."""
        known = ~np.isnan(values_TLE[self.window])
        last = known.shape[0] - 1 - known[::-1].argmax(axis=0)
        return np.take_along_axis(values_TLE[self.window], last[None], axis=0)[0]


def open_views(run_dirs: Sequence[Path], last_steps: int | None = None) -> list[RunView]:
    """Read runs that are shown side by side, each under a name of its own.

    Args:
        last_steps: as of `RunView.open`.
    """
    views = [RunView.open(run_dir, last_steps) for run_dir in run_dirs]
    paths = [view.log.path.resolve() for view in views]
    # The file's name counts where one folder holds several logs.
    parts = [path.parts[1:-1] if len({path.parent for path in paths}) == len(paths) else path.parts[1:] for path in paths]
    names = next((names for length in range(1, max(map(len, parts)) + 1)
                  if len(set(names := ["/".join(each[-length:]) for each in parts])) == len(parts)), None)
    for place, view in enumerate(views):
        view.peers = views
        view.label = names[place] if names else f"{view.facts.name} ({place + 1})"
    return views
