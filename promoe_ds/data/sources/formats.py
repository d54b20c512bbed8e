"""The tables of formats: of images, and of latents that are encoded already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.data.images import read_image
from promoe_ds.data.listing import FileList, Files, image_suffixes
from promoe_ds.data.reading import shown
from promoe_ds.data.sources.cached import read_record
from promoe_ds.data.sources.files import find_files
from promoe_ds.data.sources.parquet import ParquetCaptions, ParquetImages
from promoe_ds.data.sources.parquet_latents import ParquetLatents
from promoe_ds.data.sources.samples import Columns, Samples
from promoe_ds.data.sources.tars import TarCaptions, TarImages
from promoe_ds.data.sources.torch_files import TorchLatents
from promoe_ds.data.text.captions import Captions, open_captions
from promoe_ds.data.trees import Tree, root_of_split, tree_of
from promoe_ds.data.unpacked import NPZ_SUFFIX, read_npz_moments
from promoe_ds.errors import ConfigError, DataError

#: The format of one file a sample, in class folders.
TREE = "tree"


@dataclass(frozen=True)
class Format:
    """A format of files: what they are called, how their samples are opened, how one of them is
    decoded, and where their captions are.
    """

    name: str
    kind: str
    suffixes: Collection[str]
    open: Callable[[Files, Columns], Samples[Any]]
    read: Callable[..., np.ndarray]
    captions: Callable[[Files, str], Captions]


def _open_tree(files: Files, columns: Columns) -> Tree:
    if columns != Columns():
        raise ConfigError(
            f"{shown(files.root)}: --image-column and --label-column have no effect on files in"
            " class folders: leave them out"
        )
    if not isinstance(files, FileList):
        raise DataError(f"{shown(files.root)}: pass the folder of the class folders")
    return tree_of(files)


def _packed(
    suffix: str,
    open_: Callable[[Files, Columns], Samples[Any]],
    read: Callable[..., np.ndarray],
    captions: Callable[[Files, str], Captions],
) -> Format:
    """Return the format of files of one extension, which hold many samples each."""
    return Format(suffix[1:], suffix, (suffix,), open_, read, captions)


IMAGES = (
    Format(TREE, "readable image", image_suffixes(), _open_tree, read_image, open_captions),
    _packed(".parquet", ParquetImages, read_image, ParquetCaptions),
    _packed(".tar", TarImages, read_image, TarCaptions),
)
LATENTS = (
    Format(TREE, NPZ_SUFFIX, (NPZ_SUFFIX,), _open_tree, read_npz_moments, open_captions),
    _packed(".parquet", ParquetLatents, read_record, ParquetCaptions),
    _packed(".pt", TorchLatents, read_record, open_captions),
)


def open_samples(
    path: Path, formats: Collection[Format], columns: Columns, *, split: str
) -> tuple[Samples[Any], Format]:
    """Return the samples that are meant by a path, and their format.

    Raises: DataError if there are none, or files of several formats.
    """
    format_of = {suffix: each for each in formats for suffix in each.suffixes}
    kind = ", ".join(each.kind for each in formats)
    files = find_files(path, format_of, split=split, kind=kind)
    suffixes = (f".{name.rpartition('.')[2].lower()}" for name in files.names)
    counts = Counter(format_of[suffix].name for suffix in suffixes)
    if len(counts) > 1:
        found = " and ".join(f"{count} of {name}" for name, count in counts.items())
        raise DataError(
            f"{shown(path)}: files of several formats ({found}): pass one of them, e.g."
            " 'DIR/*.parquet', or move the others out"
        )
    found_format = next(each for each in formats if each.name in counts)
    return found_format.open(files, columns), found_format


def open_captions_of(path: Path, name: str, source: str, *, split: str) -> Captions:
    """Return the captions of samples of a format.

    Args:
        source: `.txt`, or the column or key.
    Raises: DataError for files that are missing, cannot be read, or lack the column.
    """
    known = next(each for each in (*IMAGES, *LATENTS) if each.name == name)
    if known.name == TREE:
        return known.captions(Files(root_of_split(path, split), []), source)
    return known.captions(find_files(path, known.suffixes, split=split), source)
