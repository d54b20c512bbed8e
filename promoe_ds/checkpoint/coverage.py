"""The coverage check: every value of a source is read exactly once, or an error names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from promoe_ds.errors import CheckpointError, first_few


class Coverage:
    """Which ranges of a source's tensors were read."""

    def __init__(self, source: str, sizes: Mapping[str, int]) -> None:
        """Start with nothing read.

        Args:
            source: its name for messages.
            sizes: number of values of each of its tensors.
        """
        self._source, self._sizes = source, sizes
        self._ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}

    def add(self, tensor: str, start: int = 0, stop: int | None = None) -> None:
        """Note that the values [start, stop) of a tensor were read."""
        self._ranges[tensor].append((start, self._sizes[tensor] if stop is None else stop))

    def check(self, is_padding: Callable[[str, int, int], bool] = lambda *_: False) -> int:
        """Return how many values were read.

        Args:
            is_padding: whether the values [start, stop) of a tensor belong to no parameter.
        Raises: CheckpointError naming tensors or ranges that were not read, or read twice.
        """
        problems: list[str] = []
        for tensor, size in self._sizes.items():
            position = 0
            for start, stop in [*sorted(self._ranges[tensor]), (size, size)]:
                if start < position:
                    problems.append(f"{tensor}[{start}:{min(stop, position)}] was read twice")
                elif start > position and not is_padding(tensor, position, start):
                    problems.append(f"{tensor}[{position}:{start}] was not read")
                position = max(position, stop)
        if problems:
            raise CheckpointError(f"{self._source}: {first_few(problems)}")
        return sum(stop - start for ranges in self._ranges.values() for start, stop in ranges)
