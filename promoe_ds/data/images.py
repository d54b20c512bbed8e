"""Trees of images: one folder a class, images at any depth below it.

Letters: H, W size in pixels, C colour channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from promoe_ds.errors import DataError
from promoe_ds.logs import get_logger, rank_from_environment

_LOG = get_logger("data")

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
#: Folders that may stand above the classes; the first two are taken for it wherever they stand.
_SPLITS = {"train", "val", "test"}
_SURE_SPLITS = {"train", "val"}
#: What Pillow raises for files that are no images, are cut off, or are made to exhaust the memory.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, UnidentifiedImageError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Tree:
    """Files below `root`, sorted by name, and the class of each; a class's label is its place among the sorted folders."""

    root: Path
    names: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def scan_tree(path: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES, *, split: str = "train") -> Tree:
    """List a tree of class folders.

    Args:
        path: the tree, or the folder that holds it as one of train, val and test.
        split: which of them, then.
    Returns: the tree; its classes are the folders of the first level, but for hidden ones, from which nothing is taken.
    Raises: DataError if there is no such tree, a file of that kind lies beside the class folders, or a class has none: left out,
        it would give all classes after it another label.
    """
    root = _root_of_split(path, split)
    names = [os.path.relpath(os.path.join(folder, file), root)  # noqa: PTH118 (Path costs minutes for millions of files)
             for folder, _, files in os.walk(root, followlinks=True) for file in files if file.lower().endswith(tuple(suffixes))]
    names = sorted(name for name in names if os.sep not in name or not name.startswith("."))
    if not names:
        raise DataError(f"{root}: no {', '.join(suffixes)} file below it")
    homeless = [name for name in names if os.sep not in name]
    if homeless:
        raise DataError(f"{root}: {homeless[0]} lies beside the class folders: move it into the folder of its class")
    folders = [name.partition(os.sep)[0] for name in names]
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if empty := sorted(set(classes) - set(folders)):
        raise DataError(f"{root}: {len(empty)} of {len(classes)} class folders hold no {', '.join(suffixes)} file, {empty[0]} is "
                        "the first. A class's label is its place among the sorted folders: fill them, or remove what is no class")
    label_of = {name: label for label, name in enumerate(classes)}
    return Tree(root, names, np.array([label_of[folder] for folder in folders], dtype=np.int64), tuple(classes))


def _root_of_split(path: Path, split: str) -> Path:
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    folders = {entry.name for entry in path.iterdir() if entry.is_dir()}
    if not folders & _SURE_SPLITS and not (folders and folders <= _SPLITS):
        return path
    if others := sorted(name for name in folders - _SPLITS if not name.startswith(".")):
        known = sorted(folders & _SPLITS)[0]
        raise DataError(f"{path}: holds {known} beside {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}: splits or "
                        f"classes? Name {path / known} itself, or rename {known} if it is a class")
    if split not in folders:
        raise DataError(f"{path}: holds {', '.join(sorted(folders))} but no {split}")
    return path / split


def check_classes(where: Path, count: int, num_classes: int) -> None:
    """Hold a data set's classes against the recipe's.

    Raises: DataError for more of them; fewer are told, once, by rank 0.
    """
    if count > num_classes:
        raise DataError(f"{where}: {count} classes, but model.num_classes={num_classes}")
    if count < num_classes and rank_from_environment() == 0:
        _LOG.warning("%s: %d classes of model.num_classes=%d: the labels from %d on never occur", where, count, num_classes, count)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Return the central square of an image, (size, size, 3) uint8.

    Source: ADM (Dhariwal & Nichol, 2021), the published code the same: halve by box filter while at least twice too large,
    then bicubic to the shorter side, then cut.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top:top + size, left:left + size]


def read_image(path: Path, size: int) -> np.ndarray:
    """Return an image's central square, (size, size, 3) uint8.

    Raises: DataError naming a file that is no whole image.
    """
    try:
        with Image.open(path) as image:
            return center_crop(image, size)
    except UNREADABLE as error:
        raise DataError(f"{path}: not a readable image ({type(error).__name__}: {str(error).splitlines()[0]})") from None


class CorruptFiles:
    """Counts unreadable files, by name, up to a limit."""

    def __init__(self, limit: int, setting: str) -> None:
        """Allow `limit` of them, as `setting` says."""
        self._limit, self._setting = limit, setting
        self.problems: dict[str, str] = {}

    def add(self, name: str, problem: str) -> None:
        """Name and count one; again the same costs nothing.

        Raises: DataError, naming the latest, when the limit is passed.
        """
        if name in self.problems:
            return
        self.problems[name] = problem
        if len(self.problems) > self._limit:
            raise DataError(f"{problem}; that makes {len(self.problems)} unreadable files, {self._setting}={self._limit} are "
                            "allowed: mend or remove them, or raise the limit")
        _LOG.warning("skipped %s (%d of %s=%d)", problem, len(self.problems), self._setting, self._limit)


class TreeReader:
    """Reads files of a tree in several threads: Pillow and numpy release Python's lock while they decode."""

    def __init__(self, tree: Tree, read: Callable[[Path], np.ndarray], workers: int) -> None:
        """Read with `read`, which raises DataError for a file that it cannot."""
        self._tree, self._read = tree, read
        self._pool = ThreadPoolExecutor(workers)

    def try_all(self, indices: Sequence[int]) -> list[np.ndarray | DataError]:
        """Return what each file holds, or what is wrong with it."""
        return list(self._pool.map(self._try, indices))

    def _try(self, index: int) -> np.ndarray | DataError:
        try:
            return self._read(self._tree.root / self._tree.names[index])
        except DataError as error:
            return error
