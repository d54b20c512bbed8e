"""Which lines of a log count after interruptions and resumes, and to which interval they belong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class KeptLines:
    """The lines that count, and where each belongs.

    kept: their places, in order; keys: theirs; at: interval and layer of each; order, starts: the
    lines sorted by interval and layer, and where each of these begins.
    """

    kept: np.ndarray
    keys: np.ndarray
    steps: np.ndarray
    layers: np.ndarray
    at: tuple[np.ndarray, np.ndarray]
    order: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, notes: list[str]) -> KeptLines:
        """Leave out what was repeated later, and all but the last of equal lines."""
        kept = np.flatnonzero(_newest_branch(keys, notes))
        steps, step_index = np.unique(keys[kept, 0], return_inverse=True)
        # A step has one number of bins: that of its last line.
        bins_T = np.zeros(len(steps), dtype=np.int64)
        bins_T[step_index] = keys[kept, 4]
        kept = kept[keys[kept, 4] == bins_T[step_index]]
        step_index = np.searchsorted(steps, keys[kept, 0])
        layers, layer_index = np.unique(keys[kept, 2], return_inverse=True)
        shape = (len(steps), len(layers), int(bins_T.max()))
        places = np.ravel_multi_index((step_index, layer_index, keys[kept, 3]), shape)
        unique = np.sort(len(kept) - 1 - np.unique(places[::-1], return_index=True)[1])
        if missing := int(bins_T.sum()) * len(layers) - len(unique):
            notes.append(
                f"{missing:,} line{'s' if missing > 1 else ''} of a layer and bin "
                f"{'are' if missing > 1 else 'is'} missing and count as no tokens"
            )
        at = step_index[unique], layer_index[unique]
        flat = at[0] * len(layers) + at[1]
        order = np.argsort(flat, kind="stable")
        return cls(
            kept=kept[unique],
            keys=keys[kept[unique]],
            steps=steps,
            layers=layers,
            at=at,
            order=order,
            starts=np.flatnonzero(np.diff(flat[order], prepend=-1)),
        )

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum the kept lines' values of every interval and layer (T, L, ...)."""
        return self._place(np.add.reduceat(values[self.order], self.starts, axis=0), 0)

    def mean(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Average the kept lines' values that are not NaN, by weight; NaN without weight (T, L)."""
        weights = np.where(np.isnan(values), 0, weights)
        sums, total = self.total(np.nan_to_num(values) * weights), self.total(weights)
        return np.divide(sums, total, out=np.full(total.shape, np.nan), where=total > 0)

    def last(self, values: np.ndarray, missing: float) -> np.ndarray:
        """Return the last kept line's value of every interval and layer (T, L)."""
        ends = np.append(self.starts[1:], len(self.order)) - 1
        return self._place(values[self.order[ends]], missing)

    def _place(self, values: np.ndarray, missing: float) -> np.ndarray:
        shape = (len(self.steps), len(self.layers), *values.shape[1:])
        result = np.full(shape, missing, dtype=values.dtype)
        first = self.order[self.starts]
        result[self.at[0][first], self.at[1][first]] = values
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


def note_coverage(steps: np.ndarray, covered: np.ndarray, notes: list[str]) -> None:
    """Say which steps no interval covers, and which two do."""
    before = np.concatenate([[0], steps[:-1]])
    twice = int(np.maximum(0, before - (steps - covered)).sum())
    if gap := int(np.maximum(0, steps - covered - before).sum()):
        notes.append(
            f"{gap:,} of {steps[-1]:,} steps are not covered: they ended in an "
            "interruption or before this log began"
        )
    if twice:
        notes.append(
            f"{twice:,} of {steps[-1]:,} steps count twice: a resume began within a log interval"
        )
