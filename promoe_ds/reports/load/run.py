"""A run as its report looks at it: the log, the window that counts as now, and what follows from
them.

Letters: T log intervals, P points in time, L MoE layers, Q timestep bins, E routed experts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from promoe_ds.config import RunConfig, training_flops_per_image
from promoe_ds.config.accounting import count_parameters
from promoe_ds.config.loader import read_saved
from promoe_ds.errors import PromoeError
from promoe_ds.load_stats import divide, known_mean, shares
from promoe_ds.reports.load.placement import Candidate, advise, candidates
from promoe_ds.reports.log import RoutingLog, load_log
from promoe_ds.reports.records import Metrics, read_lines

#: An expert is starved below this part of an even share.
STARVED_SHARE = 0.1
#: It is dead without a token in the whole window, or in so many of the newest intervals that span
# such a part of the steps.
_DEAD_INTERVALS, _DEAD_SPAN = 3, 0.01
#: Points that a curve or a map over time has at most.
_MOST_POINTS = 120


@dataclass(frozen=True)
class Starved:
    """An expert without tokens (dead), or with hardly any.

    since: the step after which it has had none (or stayed below STARVED_SHARE); where the log
    begins if is_always.
    """

    layer: int
    expert: int
    is_dead: bool
    since: int
    is_always: bool


@dataclass
class RunView:
    """One run.

    window: intervals that count as now; config: None if it cannot be used; notes: what was left out
    or corrected; name: of the run directory, with as much of its path as differs from the runs that
    it is shown beside.
    """

    log: RoutingLog
    window: slice
    config: RunConfig | None
    notes: list[str]
    name: str

    @classmethod
    def of(cls, log: RoutingLog, window: slice) -> RunView:
        """Add what a run's other files say to its log."""
        folder = log.path.parent
        config, notes = _read_config(folder / "config.yaml", log)
        return cls(
            log,
            window,
            config,
            [*log.notes, *notes],
            folder.resolve().name,
        )

    @classmethod
    def open(cls, run_dir: Path, last_steps: int | None = None) -> RunView:
        """Read a run.

        Args:
            last_steps: that count as now; the last tenth if left out.
        """
        log = load_log(run_dir)
        return cls.of(log, log.window(last_steps))

    @cached_property
    def images_per_second(self) -> float | None:
        """Median over the window, None if not logged."""
        path, start = self.log.path.with_name("metrics.jsonl"), self.log.steps_T[self.window][0]
        lines = (line for *_, line, _ in read_lines(path, kind=Metrics)) if path.is_file() else ()
        speeds = [
            line.images_per_second
            for line in lines
            if line and line.step >= start and line.images_per_second
        ]
        return float(np.median(speeds)) if speeds else None

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
    def window_steps(self) -> int:
        """Steps that the window covers."""
        return int(self.log.covered_T[self.window].sum())

    @cached_property
    def starved(self) -> list[Starved]:
        """Dead and starved experts, dead ones first: of the window, and those that died within
        it.
        """
        log, found = self.log, []
        for row, layer in enumerate(log.layers):
            has_tokens_T = np.asarray(log.tokens_TLE[:, row].any(axis=1))
            if not has_tokens_T[self.window].any():
                continue
            # An interval without tokens says nothing about its experts.
            steps_t, tokens_tE = log.steps_T[has_tokens_T], log.tokens_TLE[has_tokens_T, row]
            is_fed_tE = shares(tokens_tE) * log.experts >= STARVED_SHARE
            for expert, share in enumerate(shares(self.tokens_LE[row])):
                since, intervals = _last(tokens_tE[:, expert] > 0, steps_t, log)
                is_dead = share == 0 or (
                    intervals >= _DEAD_INTERVALS and steps_t[-1] - since >= _DEAD_SPAN * steps_t[-1]
                )
                if not is_dead:
                    since, intervals = _last(is_fed_tE[:, expert], steps_t, log)
                if is_dead or share * log.experts < STARVED_SHARE:
                    found.append(
                        Starved(layer, expert, bool(is_dead), since, intervals == len(steps_t))
                    )
        return sorted(found, key=lambda each: (not each.is_dead, each.layer, each.expert))

    def starved_L(self, *, is_dead: bool) -> list[int]:
        """Return how many experts of each layer are dead, or starved and not dead."""
        return [
            sum(each.layer == layer and each.is_dead is is_dead for each in self.starved)
            for layer in self.log.layers
        ]

    @cached_property
    def present(self) -> Candidate:
        """The experts' present placement."""
        return Candidate.of(self.log, self.window, "present", self.log.order_LE, self.log.ep_size)

    @cached_property
    def advised(self) -> Candidate:
        """The advised placement on as many ranks; the present one if nothing better was found."""
        size = self.log.ep_size
        order_LE = advise(self.log, self.window, size)
        return Candidate.of(self.log, self.window, "advised", order_LE, size)

    @cached_property
    def candidates(self) -> list[Candidate]:
        """The present placement, then others on every number of ranks that divides the experts."""
        return [self.present, *candidates(self.log, self.window, self.advised)]

    def over_time(self, values: np.ndarray) -> np.ndarray:
        """Sum intervals (T, ...) into points in time (P, ...)."""
        return np.add.reduceat(values, self.starts_P, axis=0)

    def mean_over_time(self, values: np.ndarray) -> np.ndarray:
        """Average intervals (T, ...) into points in time, NaN left out."""
        known = ~np.isnan(values)
        return divide(
            self.over_time(np.where(known, values, 0.0)), self.over_time(known.astype(int))
        )

    def newest(self, values_T: np.ndarray) -> np.ndarray:
        """Return each value's newest one in the window, NaN if none was logged."""
        known = ~np.isnan(values_T[self.window])
        last = known.shape[0] - 1 - known[::-1].argmax(axis=0)
        return np.take_along_axis(values_T[self.window], last[None], axis=0)[0]

    def time_lost(self, uneven_L: np.ndarray) -> float | None:
        """Return the estimated share of a step for which ranks wait because the fullest one has
        more rows than the mean.

        With x = (operations of the rows above the mean on the fullest rank, all layers) /
        (operations of a rank's share of the batch), x / (1 + x) of the time is lost, at equal speed
        per operation. None if it cannot be known.
        """
        if self.config is None or not self.window_steps or np.isnan(uneven_L).all():
            return None
        rows_L = self.tokens_LE.sum(axis=1) / self.window_steps
        # Operations over all ranks, if all had the fullest one's rows, above the real ones; six a
        # parameter and row.
        extra = float(np.nansum(rows_L * (uneven_L - 1.0)) * 6.0)
        x = extra * count_parameters(self.config).routed_per_expert
        x /= training_flops_per_image(self.config) * self.config.train.global_batch_size
        return x / (1.0 + x)

    @cached_property
    def measured_uneven(self) -> np.ndarray:
        """Each layer's fullest rank over the mean, pass by pass (L,), NaN if not logged."""
        return known_mean(self.log.rank_uneven_TL[self.window], axis=0)

    @cached_property
    def present_uneven(self) -> np.ndarray:
        """The measured unevenness, or that of whole intervals if it was not logged."""
        return np.where(np.isnan(self.measured_uneven), self.present.uneven_L, self.measured_uneven)

    @cached_property
    def advised_uneven(self) -> np.ndarray:
        """What the advised placement is estimated to give, pass by pass as `present_uneven`.

        The measured unevenness also has what comes and goes from pass to pass, which no order
        removes: an order changes it by the factor by which it changes that of whole intervals.
        """
        before, after = self.present.uneven_L, self.advised.uneven_L
        return self.present_uneven * np.where(before > 0, divide(after, before), 1.0)


def open_runs(run_dirs: Sequence[Path], last_steps: int | None = None) -> list[RunView]:
    """Read runs that are shown side by side, each under a name of its own.

    Args:
        last_steps: as of `RunView.open`.
    """
    views = [RunView.open(run_dir, last_steps) for run_dir in run_dirs]
    if len(views) == 1:
        return views
    paths = [view.log.path.resolve() for view in views]
    # The file's name counts if one folder has several logs.
    if len({path.parent for path in paths}) == len(set(paths)):
        paths = [path.parent for path in paths]
    above = os.path.commonpath([path.parent for path in paths])
    for place, (view, path) in enumerate(zip(views, paths, strict=True), start=1):
        again = f" ({place})" if paths.count(path) > 1 else ""
        view.name = f"{path.relative_to(above)}{again}"
    return views


def _read_config(path: Path, log: RoutingLog) -> tuple[RunConfig | None, list[str]]:
    try:
        config = read_saved(path)
    except (OSError, PromoeError) as error:
        reason = "is missing" if isinstance(error, OSError) else "cannot be read as a config"
        left_out = "sizes, and what depends on them (time lost to imbalance), are left out"
        return None, [f"config.yaml {reason}: {left_out}"]
    if list(config.moe_block_indices) != log.layers or config.routing.num_experts != log.experts:
        return None, ["config.yaml describes other layers or experts than the log: it is not used"]
    return config, []


def _last(was_T: np.ndarray, steps_T: np.ndarray, log: RoutingLog) -> tuple[int, int]:
    """Return the step at which something was last so (where the log begins if never), and the
    number of intervals after it.
    """
    places = np.flatnonzero(was_T)
    if not len(places):
        return int(log.steps_T[0] - log.covered_T[0]), len(was_T)
    return int(steps_T[places[-1]]), len(was_T) - 1 - int(places[-1])
