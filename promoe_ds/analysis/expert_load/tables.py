"""Tables of counts by row and expert over training, few whatever the length of the run."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_MOST_PARTS = 64


@dataclass
class TableSeries:
    """Sums of tables over stretches of `width` steps, which doubles whenever there would be too many.

    Stretches begin at multiples of their width, so that the same tables give the same sums, read at once or in parts.
    first: step of the first table; parts: by stretch, the last step in it and the sum.
    """

    width: int = 1
    first: int = 0
    parts: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)

    @property
    def newest(self) -> int:
        """Step of the last table."""
        return max(step for step, _ in self.parts.values())

    def add(self, step: int, counts: np.ndarray) -> None:
        """Add the table of a step; one that goes back in steps replaces what an abandoned branch had counted."""
        self.first = self.first or step
        self._drop_from(step)
        self._put(step, counts)
        self._thin()

    def join(self, later: TableSeries) -> None:
        """Add the tables of the lines that follow."""
        self.first = self.first or later.first
        self._drop_from(later.first)
        while self.width < later.width:
            self._widen()
        for step, counts in sorted(later.parts.values(), key=lambda part: part[0]):
            self._put(step, counts)
        self._thin()

    def sums(self) -> list[tuple[int, np.ndarray]]:
        """Return the stretches in order: the last step of each and its sum."""
        return sorted(self.parts.values(), key=lambda part: part[0])

    def _drop_from(self, step: int) -> None:
        self.parts = {place: part for place, part in self.parts.items() if part[0] < step}

    def _put(self, step: int, counts: np.ndarray) -> None:
        place = (step - 1) // self.width
        self.parts[place] = (step, counts + self.parts[place][1] if place in self.parts else counts)

    def _widen(self) -> None:
        self.width *= 2
        parts, self.parts = self.sums(), {}
        for step, counts in parts:
            self._put(step, counts)

    def _thin(self) -> None:
        while len(self.parts) > _MOST_PARTS:
            self._widen()
