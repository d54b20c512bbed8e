"""Encoded captions beside packed latents: a mapped safetensors file for each shard of latents, and
`text.json`, their index.

A file's tensors: `states` (tokens of all captions, C) bf16 and `pooled` (captions, P) fp32;
`state_ends` (captions,), where each caption's states end; `caption_ends` (n,), where the captions
of each image end; `checksums` (captions,), the xxh3_64 of a caption's states and vector as int64. A
caption without states is blank: null.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from promoe_ds.condition import EmptyText, TextCondition
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.reading import read_json, reading
from promoe_ds.data.shards import LatentIndex, ShardRecord, file_problem, save_shard
from promoe_ds.data.text_encoder import STATES_DTYPE, EncodedTexts, TextEncoder, TextIdentity
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import DataError, first_few
from promoe_ds.file_kind import SAFETENSORS
from promoe_ds.files import write_json
from promoe_ds.randomness import hashes

TEXT_INDEX = "text.json"
#: The encoder's empty text, kept once.
EMPTY = "text-empty.safetensors"


class TextCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Captions, their tokens, the longest of them in tokens; how many were cut, how many blank."""

    captions: int = 0
    tokens: int = 0
    longest: int = 0
    truncated: int = 0
    blank: int = 0

    def __add__(self, other: TextCounts) -> TextCounts:
        summed = {
            name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__
        }
        return TextCounts(**{**summed, "longest": max(self.longest, other.longest)})


class TextIndex(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="format",
    tag="promoe_ds.text/1",
):
    """What `text.json` says.

    source: where the captions come from, `.txt` or a column. latents: `latents_digest` of the
    images' index. shards: in the order of the latents' shards; their `count` is of images.
    """

    encoder: TextIdentity
    source: str
    latents: str
    counts: TextCounts
    shards: tuple[ShardRecord, ...]
    versions: dict[str, str] = {}

    def write(self, folder: Path) -> None:
        """Write `text.json`, in one move."""
        write_json(folder / TEXT_INDEX, msgspec.to_builtins(self))


def read_text_index(folder: Path) -> TextIndex | None:
    """Return a folder's index of texts, None where there is none.

    Raises: DataError naming the file that cannot be understood, and its field.
    """
    path = folder / TEXT_INDEX
    return read_json(path, "index of texts", TextIndex) if path.is_file() else None


def latents_digest(index: LatentIndex) -> str:
    """Return the xxh3_64 of the checksums of all shards of latents: whose captions texts are."""
    return xxhash.xxh3_64("".join(shard.checksum for shard in index.shards).encode()).hexdigest()


def verify_texts(folder: Path, team: DistributedContext) -> TextIndex | None:
    """Read every file of packed texts and compare it with their index, each rank a share of them.
    Return the index, None where there are no texts.

    Raises: DataError naming the files that are not what was written.
    """
    index = read_text_index(folder)
    own = index.shards[team.rank :: team.world_size] if index else ()
    found = team.gather([file_problem(folder, record, TEXT_INDEX) for record in own])
    if problems := [problem for of_rank in found for problem in of_rank if problem is not None]:
        raise DataError(first_few(problems))
    return index


class PackedTexts:
    """The captions of a folder of packed latents. A file is mapped when one of its captions is
    first taken: opening costs the index alone.
    """

    def __init__(self, folder: Path, latents: LatentIndex, config: RunConfig) -> None:
        """Read the index and compare it with the recipe and with the latents.

        Raises: DataError if there are no texts, or they were encoded by another encoder, belong to
            other latents or are longer than the recipe's.
        """
        self._folder, where = folder, folder / TEXT_INDEX
        index = read_text_index(folder)
        if index is None:
            raise DataError(
                f"{folder}: no {TEXT_INDEX} there, but model.condition=text: encode the captions"
                " with tools/encode_text.py"
            )
        if index.latents != latents_digest(latents):
            raise DataError(
                f"{where}: belongs to other latents than those beside it: encode the captions anew"
            )
        self.identity = index.encoder
        self.identity.check(where, config)
        if not self.identity.is_meant(config.data.text_encoder, TextEncoder):
            raise DataError(
                f"{where}: the captions were encoded by {index.encoder.name}"
                f" ({index.encoder.fingerprint}), the recipe wants"
                f" data.text_encoder={config.data.text_encoder}: encode them anew, or set"
                " data.text_encoder to the one that they come from"
            )
        if index.counts.longest > config.model.text_length:
            raise DataError(
                f"{where}: the longest caption has {index.counts.longest} tokens, but"
                f" model.text_length={config.model.text_length}: set it to that, or encode with"
                f" --text-length {config.model.text_length}"
            )
        with reading(folder / EMPTY, "empty text", kind=SAFETENSORS):
            empty = load_file(folder / EMPTY)
            self._empty = EmptyText(empty["states"], empty["pooled"])
        self._records, self._seed = index.shards, config.train.seed
        self._open: dict[int, TextShard] = {}

    def take(
        self, shards: Sequence[int], rows: Sequence[int], positions: np.ndarray | None
    ) -> TextCondition:
        """Return a caption of each image, given by its shard and its row there.

        Of several captions the one that is drawn is a function of (seed, position); the first
        without positions.
        Raises: DataError naming a file that is missing or damaged.
        """
        draws = np.zeros(len(rows), np.uint64)
        if positions is not None:
            draws = hashes(self._seed, "caption", positions)
        places = zip(shards, rows, draws.tolist(), strict=True)
        texts = [self._shard(shard).text(row, draw) for shard, row, draw in places]
        null_B = torch.tensor([not len(states) for states, _ in texts])
        states, pooled = zip(*texts, strict=True)
        condition = TextCondition.of_states(states, torch.stack(pooled), self._empty)
        return condition.drop(null_B) if null_B.any() else condition

    def _shard(self, number: int) -> TextShard:
        if number not in self._open:
            record = self._records[number]
            self._open[number] = TextShard(self._folder / record.file, record)
        return self._open[number]


class TextShard:
    """An open file of encoded captions."""

    def __init__(self, path: Path, record: ShardRecord) -> None:
        """Map the file.

        Raises: DataError naming one that is missing, damaged, or not what the index says.
        """
        self._path = path
        with reading(path, "file of encoded captions", kind=SAFETENSORS):
            tensors = load_file(path)
            self._states, self._pooled = tensors["states"], tensors["pooled"]
            self._state_ends = tensors["state_ends"].numpy()
            self._caption_ends = tensors["caption_ends"].numpy()
            self._checksums = tensors["checksums"].numpy().view(np.uint64)
        found = path.stat().st_size, len(self._caption_ends)
        if found != (record.bytes, record.count):
            raise DataError(
                f"{path}: {found[0]} bytes of {found[1]} images, {TEXT_INDEX} says {record.bytes}"
                f" of {record.count}: copy this file, or encode the captions anew"
            )

    def text(self, row: int, draw: int) -> tuple[Tensor, Tensor]:
        """Return states (L, C) and vector (P,) of one of an image's captions.

        Raises: DataError naming a caption that is not what was written.
        """
        first = self._caption_ends[row - 1] if row else 0
        caption = int(first + draw % int(self._caption_ends[row] - first))
        start = self._state_ends[caption - 1] if caption else 0
        states, pooled = self._states[start : self._state_ends[caption]], self._pooled[caption]
        if _checksum(states, pooled) != self._checksums[caption]:
            raise DataError(
                f"{self._path}: caption {caption} is damaged: its checksum does not match; encode"
                " the captions of this shard anew"
            )
        return states, pooled


def write_text_shard(
    path: Path, texts: EncodedTexts, blank: Sequence[bool], captions_of_images: Sequence[int]
) -> tuple[ShardRecord, TextCounts]:
    """Write the captions of one shard of latents, in one move; return its entry and counts.

    Args:
        texts: all captions of the first image, then of the second, and so on.
        blank: which of them say nothing; they are written without states.
        captions_of_images: how many each image has, at least one.
    """
    width = texts.states[0].shape[1] if texts.states else 0
    nothing = torch.empty(0, width, dtype=STATES_DTYPE)
    states = [
        nothing if is_blank else each for each, is_blank in zip(texts.states, blank, strict=True)
    ]
    lengths = [len(each) for each in states]
    checksums = [_checksum(*pair) for pair in zip(states, texts.pooled, strict=True)]
    tensors = {
        "states": torch.cat([nothing, *states]),
        "pooled": texts.pooled.contiguous(),
        "state_ends": torch.tensor(lengths, dtype=torch.int64).cumsum(0),
        "caption_ends": torch.tensor(captions_of_images, dtype=torch.int64).cumsum(0),
        "checksums": torch.from_numpy(np.array(checksums, dtype=np.uint64).view(np.int64)),
    }
    counts = TextCounts(
        captions=len(lengths),
        tokens=sum(lengths),
        longest=max(lengths, default=0),
        truncated=texts.truncated,
        blank=sum(blank),
    )
    return save_shard(path, tensors, len(captions_of_images)), counts


def _checksum(states_LC: Tensor, pooled_P: Tensor) -> int:
    digest = xxhash.xxh3_64()
    for values in (states_LC.contiguous(), pooled_P.contiguous()):
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.intdigest()
