"""From the labels that people write, numbers or names, to places among classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from promoe_ds.data.reading import shown, some_of, warn_once
from promoe_ds.errors import DataError

#: Names of the labels' column, the first that is there, where the user names none.
_USUAL = ("label", "labels")
#: More classes than anybody has: such numbers are no labels.
_MOST_CLASSES = 2**20
#: The single class of records without labels.
_UNLABELLED = "all"
_INTEGER = re.compile(r"-?\d+")


class Labels:
    """Collects labels file by file: integers stay what they are, names become places in their
    sorted list. Where none are added, all records are of one class.
    """

    def __init__(self, where: Path, wanted: str | None, what: str) -> None:
        """Begin with none.

        Args:
            where: what messages call the records. wanted: the user's name of the labels, None for
                the usual one, '' for none. what: would hold them.
        """
        self._where, self._wanted, self._what = where, wanted, what
        self._seen: dict[int | str, int] = {}
        self._parts: list[np.ndarray] = []

    def column(self, names: Collection[str]) -> str:
        """Return the name of the labels: the user's, else the first usual one of `names`; '' for
        none.
        """
        if self._wanted is not None:
            return self._wanted
        return next((each for each in _USUAL if each in names), "")

    def add(self, values: Iterable[int | str], codes: np.ndarray | None = None) -> None:
        """Add a label of each record; with `codes` (n,), the values that these count."""
        places = [self._seen.setdefault(value, len(self._seen)) for value in values]
        added = np.array(places, dtype=np.int64)
        self._parts.append(added if codes is None else added[codes])

    def finish(
        self, count: int, names: Sequence[str] | None = None, *, as_numbers: bool = False
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return labels (N,) int64, and the classes' names; rank 0 warns where there are none.

        Args:
            count: N.
            names: of the classes that integers count, if anything says them.
            as_numbers: texts of an integer are that integer.
        Raises: DataError for integers that are no labels.
        """
        values = list(self._seen)
        if not values:
            why = "no labels are read" if self._wanted == "" else f"no {self._what} is there"
            where = shown(self._where)
            warn_once("%s: %s: all %d records are of one class", *(where, why, count))
            return np.zeros(count, dtype=np.int64), (_UNLABELLED,)
        if as_numbers and all(_INTEGER.fullmatch(str(value)) for value in values):
            values = [int(value) for value in values]
        if all(isinstance(value, int) for value in values):
            classes = _numbered(self._where, [int(value) for value in values], names)
            final = np.array(values, dtype=np.int64)
        else:
            classes = tuple(sorted(map(str, values)))
            _warn_of_order(self._where, classes)
            label_of = {name: label for label, name in enumerate(classes)}
            final = np.array([label_of[str(value)] for value in values], dtype=np.int64)
        return final[np.concatenate(self._parts)], classes


def _warn_of_order(root: Path, classes: Sequence[str]) -> None:
    """Say what a person would not expect of the labels' order."""
    by_value = sorted(classes, key=_with_numbers)
    for label, (found, expected) in enumerate(zip(classes, by_value, strict=True)):
        if found != expected:
            warn_once(
                "%s: classes are sorted as text, not as numbers: label %d is %s, not %s. Pad the"
                " names with zeros for the order of numbers",
                *(shown(root), label, shown(found), shown(expected)),
            )
            break
    folded = Counter(name.casefold() for name in classes)
    if alike := [name for name in classes if folded[name.casefold()] > 1]:
        warn_once(
            "%s: classes that differ in capitals alone are classes of their own: %s",
            *(shown(root), some_of(alike)),
        )


def _numbered(where: Path, values: list[int], names: Sequence[str] | None) -> tuple[str, ...]:
    least, most = min(values), max(values)
    limit = len(names) if names is not None else _MOST_CLASSES
    if not 0 <= least <= most < limit:
        raise DataError(
            f"{shown(where)}: labels reach from {least} to {most}, expected 0 ... {limit - 1}: name"
            " another column with --label-column, or none with --label-column ''"
        )
    return tuple(names if names is not None else map(str, range(most + 1)))


def _with_numbers(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
