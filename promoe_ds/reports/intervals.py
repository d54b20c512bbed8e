"""Which lines of a log count after interruptions and resumes, and to which interval they belong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class KeptLines:
    """The lines that count, and where each belongs.

    kept: their places in the file; at: interval, layer and bin of each; shape: how many there are
    of these; covered_T, bins_T: steps and bins of each interval.
    """

    kept: np.ndarray
    at: tuple[np.ndarray, np.ndarray, np.ndarray]
    shape: tuple[int, int, int]
    steps_T: np.ndarray
    layers_L: np.ndarray
    covered_T: np.ndarray
    bins_T: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, notes: list[str]) -> KeptLines:
        """Leave out what was repeated later.

        Args:
            keys: step, steps covered, layer, bin and number of bins of every line.
        """
        kept = np.flatnonzero(_newest_branch(keys, notes))
        steps_T, step_index = np.unique(keys[kept, 0], return_inverse=True)
        # A step has one number of bins: that of its last line.
        bins_T = np.zeros_like(steps_T)
        bins_T[step_index] = keys[kept, 4]
        kept = kept[keys[kept, 4] == bins_T[step_index]]
        layers_L, layer_index = np.unique(keys[kept, 2], return_inverse=True)
        at = np.searchsorted(steps_T, keys[kept, 0]), layer_index, keys[kept, 3]
        covered_T = np.zeros_like(steps_T)
        covered_T[at[0]] = keys[kept, 1]
        shape = len(steps_T), len(layers_L), int(bins_T.max())
        found = len(np.unique(np.ravel_multi_index(at, shape)))
        if missing := int(bins_T.sum()) * len(layers_L) - found:
            notes.append(
                f"{missing:,} line{'s' if missing > 1 else ''} of a layer and bin "
                f"{'are' if missing > 1 else 'is'} missing and count as no tokens"
            )
        _note_coverage(steps_T, covered_T, notes)
        return cls(kept, at, shape, steps_T, layers_L, covered_T, bins_T)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Return the lines' values by interval, layer and bin (T, L, Q, ...), the last of equal
        lines; 0 where there is none.
        """
        result = np.zeros((*self.shape, *values.shape[1:]), dtype=values.dtype)
        result[self.at] = values[self.kept]
        return result

    def last(self, values: np.ndarray, missing: float) -> np.ndarray:
        """Return the last line's value of every interval and layer (T, L)."""
        result = np.full(self.shape[:2], missing, dtype=values.dtype)
        result[self.at[:2]] = values[self.kept]
        return result


def _newest_branch(keys: np.ndarray, notes: list[str]) -> np.ndarray:
    """Return which lines stay.

    Where a log goes back in steps, or an interval begins before earlier ones, those are repeated.
    """
    kept, steps = np.ones(len(keys), dtype=bool), keys[:, 0]
    starts = steps - keys[:, 1]
    changes = np.flatnonzero(np.diff(steps)) + 1
    for place in changes[starts[changes] < steps[changes - 1]]:
        before, start = steps[place - 1], starts[place]
        repeated = (steps[:place] >= steps[place]) | (
            (steps[:place] > start) & (starts[:place] >= start)
        )
        if (kept[:place] & repeated).any():
            kept[:place] &= ~repeated
            notes.append(
                f"the run went back from step {before:,} to {start:,}; repeated steps "
                "count once, as they were done last"
            )
    return kept


def _note_coverage(steps_T: np.ndarray, covered_T: np.ndarray, notes: list[str]) -> None:
    """Say which steps no interval covers, and which two do."""
    gaps_T = np.diff(steps_T, prepend=0) - covered_T
    if gap := int(gaps_T.clip(min=0).sum()):
        notes.append(
            f"{gap:,} of {steps_T[-1]:,} steps are not covered: they ended in an "
            "interruption or before this log began"
        )
    if twice := int(-gaps_T.clip(max=0).sum()):
        notes.append(
            f"{twice:,} of {steps_T[-1]:,} steps count twice: a resume began within a log interval"
        )
