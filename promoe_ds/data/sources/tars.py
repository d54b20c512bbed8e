"""Tars of samples, as WebDataset has them: files of one key, `17.jpg 17.cls 17.txt 17.json`.

The key of a file is its path up to the first dot of its name. Of a tar only the headers and what
labels need are read first; images are read by their place.
"""

from __future__ import annotations

import tarfile
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from promoe_ds.data.images import Blob
from promoe_ds.data.listing import Files, image_suffixes, is_leftover
from promoe_ds.data.reading import reading, shown
from promoe_ds.data.sources.labels import Labels
from promoe_ds.data.sources.samples import Columns, PackedSamples, place_of
from promoe_ds.data.text.captions import Captions, lines_of, texts_of
from promoe_ds.errors import DataError
from promoe_ds.file_kind import TAR
from promoe_ds.logs import Progress, get_logger

_LOG = get_logger("data")
#: Extensions of labels, of captions, and of a table of both.
_LABEL, _TEXT, _TABLE = "cls", "txt", "json"
_BLOCK = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A file in a tar: where its bytes are; with `content`, what they are."""

    name: str
    start: int
    size: int
    content: bytes | None


def read_samples(path: Path, keep: Collection[str] = ()) -> dict[str, dict[str, Member]]:
    """Return the files of a tar by key and extension.

    Args:
        keep: extensions whose files are read.
    Raises: DataError naming a tar that is damaged, cut off or compressed, or a file that is there
        twice.
    """
    samples: dict[str, dict[str, Member]] = defaultdict(dict)
    with reading(path, "tar archive", kind=TAR):
        for info, content in _members(path, keep):
            key, extension = _split(info.name)
            if extension in samples[key]:
                raise DataError(f"{shown(path)}: holds {shown(info.name)} twice")
            samples[key][extension] = Member(
                name=info.name, start=info.offset_data, size=info.size, content=content
            )
    return samples


class TarImages(PackedSamples[Blob]):
    """Images in tars."""

    def __init__(self, files: Files, columns: Columns) -> None:
        """Read the headers of all files, and the labels.

        Raises: DataError for a tar that cannot be read, a sample of several images, or one without
            a label where others have one.
        """
        self._columns, self._names = columns, list[str]()
        labels = Labels(files.root, columns.label, f"{_LABEL} file")
        places, unlabelled, counts = list[np.ndarray](), list[str](), list[int]()
        progress = Progress(_LOG, len(files.names), "tars")
        for file, path in zip(files.names, files.paths(), strict=True):
            images = [*self._images(path)]
            labels.add([label for *_, label in images if label is not None])
            self._names += [f"{file}/{name}" for name, *_ in images]
            unlabelled += [f"{file}/{name}" for name, *_, label in images if label is None]
            places.append(np.array([place[1:3] for place in images], np.int64).reshape(-1, 2))
            counts.append(len(images))
            progress.add(1)
        self._places = np.concatenate(places)
        super().__init__(files, counts, repr(columns))
        if unlabelled and (columns.label or len(unlabelled) < len(self._names)):
            where = shown(self.root / unlabelled[0])
            raise DataError(f"{where}: has no label {columns.label or _LABEL}")
        self.labels, self.classes = labels.finish(len(self._names), as_numbers=True)

    def name(self, index: int) -> str:
        """Return `TAR/FILE`, of a sample without an image `TAR/KEY`."""
        return self._names[index]

    def take(self, index: int) -> Blob:
        """Return the image of a sample.

        Raises: DataError for a sample without one.
        """
        start, size = self._places[index].tolist()
        where = self.root / self.name(index)
        if start < 0:
            raise DataError(f"{shown(where)}: a sample without an image")
        path = self.root / self.files.names[place_of(self.ends, index)[0]]
        return Blob(where, partial(_read, path, start, size))

    def _images(self, path: Path) -> Iterator[tuple[str, int, int, str | None]]:
        """Yield name, place, size and label of the image of each sample of a tar; without an image
        the place is -1.
        """
        wanted, label = self._columns.image, self._columns.label
        keep = (_LABEL,) if label is None else (label, _TABLE) if label else ()
        for key, sample in read_samples(path, keep).items():
            images = [wanted] if wanted in sample else []
            if wanted is None:
                images = [each for each in sample if f".{each}" in image_suffixes()]
            if len(images) > 1:
                raise DataError(
                    f"{shown(path)}: {shown(key)} has several images ({', '.join(images)}): name"
                    " one with --image-column"
                )
            value = None if label == "" else _label(path, sample, label)
            if images:
                image = sample[images[0]]
                yield image.name, image.start, image.size, value
            elif sample.keys() & {_LABEL, _TEXT, _TABLE, *keep}:
                yield key, -1, 0, value


class TarCaptions(Captions):
    """Captions in the tars that images come from: a file of texts, or a key of `json`."""

    def __init__(self, files: Files, source: str) -> None:
        """Read nothing yet.

        Args:
            source: `.EXTENSION` of a file of texts, a caption a line, or a key.
        """
        self._files, self._source, self._number = files, source, -1
        self._samples: dict[str, dict[str, Member]] = {}

    def of(self, name: str) -> list[str]:
        """Return the captions of an image: those of one tar are in memory."""
        number, member = self._files.file_of(name)
        where, extension = self._files.root / name, self._source.removeprefix(".")
        is_text = extension != self._source
        if number != self._number:
            path, keep = self._files.paths()[number], (extension if is_text else _TABLE,)
            samples = read_samples(path, keep).items()
            self._samples = {shown(key): sample for key, sample in samples}
            self._number = number
        sample = self._samples.get(_split(member)[0], {})
        with reading(where, f"sample with texts in {self._source}"):
            if is_text:
                found: Any = sample[extension].content if extension in sample else b""
                captions = texts_of(lines_of(found.decode("utf-8-sig")))
            else:
                captions = texts_of(_table(sample).get(self._source))
        if not captions:
            raise DataError(f"{shown(where)}: has no caption in {self._source}")
        return captions


def _members(path: Path, keep: Collection[str]) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Yield the files of a tar, with their bytes where they are kept.

    Raises: ValueError where it does not end as a tar does.
    """
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # they would all be kept
            info.name = info.name.removeprefix("./")
            if info.isreg() and not is_leftover(info.name.rpartition("/")[2]):
                wanted = _split(info.name)[1] in keep
                content = archive.extractfile(info) if wanted else None
                yield info, content.read() if content is not None else None
        file.seek(archive.offset)  # type: ignore[attr-defined]
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise ValueError("it is cut off or damaged: copy or download it again")


def _split(name: str) -> tuple[str, str]:
    """Return key and extension, in lower case, of a file."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _label(path: Path, sample: dict[str, Member], wanted: str | None) -> str | None:
    """Return what a sample says its label is, if it does."""
    name = _LABEL if wanted is None else wanted
    if name in sample:
        with reading(path / sample[name].name, "label"):
            return sample[name].content.decode().strip()
    value = _table(sample, path).get(wanted) if wanted else None
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        where = path / sample[_TABLE].name
        raise DataError(f"{shown(where)}: {wanted} is {value!r}, no integer and no text")
    return None if value is None else str(value)


def _table(sample: dict[str, Member], path: Path = Path()) -> dict[str, Any]:
    if _TABLE not in sample:
        return {}
    with reading(path / sample[_TABLE].name, "JSON object"):
        return msgspec.json.decode(sample[_TABLE].content, type=dict[str, Any])


def _read(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)
