"""An account of values: every value of a source is taken exactly once, or named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from promoe_ds.errors import CheckpointError

#: Longer lists are cut in messages.
_SHOWN = 5


@dataclass
class _Account:
    numel: int
    ranges: list[tuple[int, int, str]] = field(default_factory=list)


class Ledger:
    """Books what is in a source and what was taken from it, by tensor and range."""

    def __init__(self, source: str) -> None:
        """Start an empty account of `source`, a name for messages."""
        self._source = source
        self._accounts: dict[str, _Account] = {}

    def expect(self, tensor: str, numel: int) -> None:
        """Book a tensor of the source: all its values must be taken."""
        self._accounts[tensor] = _Account(numel)

    def take(self, tensor: str, start: int, stop: int, target: str) -> None:
        """Book that the values [start, stop) of a tensor went into `target`."""
        if tensor not in self._accounts:
            raise CheckpointError(f"{self._source}: {target} takes from {tensor}, which the source does not have")
        self._accounts[tensor].ranges.append((start, stop, target))

    def take_all(self, tensor: str, target: str) -> None:
        """Book that a whole tensor went into `target`."""
        numel = self._accounts[tensor].numel if tensor in self._accounts else 0
        self.take(tensor, 0, numel, target)

    def check(self, is_padding: Callable[[str, int, int], bool] = lambda tensor, start, stop: False) -> int:
        """Close the account.

        Args:
            is_padding: says whether values that nobody took are only padding.
        Returns: how many values were taken.
        Raises: CheckpointError naming tensors or ranges that were dropped or taken twice.
        """
        problems, taken = [], 0
        for tensor, account in self._accounts.items():
            reached, previous = 0, ""
            for start, stop, target in [*sorted(account.ranges), (account.numel, account.numel, "")]:
                if start < reached:
                    problems.append(f"{tensor}[{start}:{min(stop, reached)}] was taken twice, by {previous} and {target}")
                elif start > reached and not is_padding(tensor, reached, start):
                    whole = reached == 0 and start == account.numel
                    problems.append(f"{tensor}{'' if whole else f'[{reached}:{start}]'} was dropped")
                taken += stop - start
                reached, previous = max(reached, stop), target
            if not account.numel and not account.ranges:
                problems.append(f"{tensor} was dropped")
        if problems:
            more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise CheckpointError(f"{self._source}: {'; '.join(problems[:_SHOWN])}{more}")
        return taken
