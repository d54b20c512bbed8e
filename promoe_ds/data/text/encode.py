"""From captions to packed texts beside packed latents, on many ranks, resumable: a file a shard."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from promoe_ds.data.reading import some_of
from promoe_ds.data.shards import Entry, LatentIndex, Shard, ShardRecord, index_of
from promoe_ds.data.sources.formats import TREE, open_captions_of
from promoe_ds.data.text.captions import Captions
from promoe_ds.data.text.packed import (
    EMPTY,
    TEXT_INDEX,
    TextCounts,
    TextIndex,
    latents_digest,
    read_text_index,
    write_text_shard,
)
from promoe_ds.data.text_encoder import TextEncoder, TextIdentity
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.files import replacing
from promoe_ds.logs import Progress, get_logger
from promoe_ds.versions import versions_of

_LOG = get_logger("encode")


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What to encode: `captions` (`.txt` or a column) of the images below `images`, whose packed
    latents are in `out`.
    """

    images: Path
    out: Path
    captions: str
    text_encoder: str
    split: str = "train"
    text_length: int | None = None
    text_dtype: str = "float32"
    max_uncaptioned: int = 0

    def path(self, record: ShardRecord) -> Path:
        """Return the place of the texts of a shard of latents."""
        return self.out / f"text-{Path(record.file).stem}.safetensors"


class TextEntry(Entry, frozen=True, kw_only=True):
    """What `text-N.json` says: of which latents, encoder and captions a file is; which images have
    no caption.
    """

    latents: ShardRecord
    encoder: TextIdentity
    source: str
    counts: TextCounts
    uncaptioned: list[str]


def load_encoder(request: TextRequest, team: DistributedContext) -> TextEncoder:
    """Load the text encoder of a request; all ranks call this together.

    Raises: DataError if it cannot be read.
    """
    load = partial(
        TextEncoder,
        request.text_encoder,
        device=team.device,
        dtype=getattr(torch, request.text_dtype),
        max_length=request.text_length,
    )
    return team.main_first(load)


def encode_texts(
    request: TextRequest, team: DistributedContext, encoder: TextEncoder | None = None
) -> TextIndex:
    """Encode the captions of packed latents; all ranks call this together. Return the index.

    Args:
        encoder: the request's, if it is loaded already.
    Raises: DataError for images without captions, beyond `max_uncaptioned`, or captions that cannot
        be read, or if there are no latents; ConfigError if there are texts of another encoder.
    """
    latents = team.on_main(lambda: index_of(request.out))
    encoder = encoder or load_encoder(request, team)
    if (done := team.on_main(lambda: _finished(request, latents, encoder.identity))) is not None:
        return done
    form = latents.encoding.get("source", TREE)
    captions = open_captions_of(request.images, form, request.captions, split=request.split)
    todo = team.on_main(
        lambda: [
            record
            for record in latents.shards
            if not _is_complete(request, record, encoder.identity)
        ]
    )
    progress = Progress(_LOG, sum(record.count for record in todo), "images")
    for record in todo[team.rank :: team.world_size]:
        _encode_shard(request, record, captions, encoder)
        # The other ranks are about as far.
        progress.add(record.count * team.world_size)
    team.barrier()
    return team.on_main(lambda: _finish(request, latents, encoder))


def _finished(
    request: TextRequest, latents: LatentIndex, encoder: TextIdentity
) -> TextIndex | None:
    index = read_text_index(request.out)
    if index is None:
        return None
    found = index.encoder, index.source, index.latents
    if found != (encoder, request.captions, latents_digest(latents)):
        raise ConfigError(
            f"--out {request.out} already holds texts: {index.source} by {index.encoder.name}"
            f" ({index.encoder.fingerprint}, at most {index.encoder.max_length} tokens): remove"
            f" {TEXT_INDEX} there to encode them anew"
        )
    _LOG.info("%s: texts are there already", request.out)
    return index


def _is_complete(request: TextRequest, latents: ShardRecord, encoder: TextIdentity) -> bool:
    entry = TextEntry.of_complete(request.path(latents))
    if entry is None or entry.uncaptioned:  # images that had no caption may have one now
        return False
    return (entry.latents, entry.encoder, entry.source) == (latents, encoder, request.captions)


def _encode_shard(
    request: TextRequest, latents: ShardRecord, captions: Captions, encoder: TextEncoder
) -> None:
    texts: list[str] = []
    counts, uncaptioned = list[int](), list[str]()
    for name in Shard(request.out / latents.file).names():
        try:
            found = captions.of(name)
        except DataError as error:
            uncaptioned.append(str(error))
            found = [""]
        texts += found
        counts.append(len(found))
    if len(uncaptioned) > request.max_uncaptioned:
        raise DataError(
            f"{some_of(uncaptioned)}. {len(uncaptioned)} images of {latents.file} have no caption,"
            f" --max-uncaptioned={request.max_uncaptioned} are allowed"
        )
    path = request.path(latents)
    blank = [not text for text in texts]
    try:
        record, sums = write_text_shard(path, encoder.encode(texts), blank, counts)
        entry = TextEntry(
            record=record,
            latents=latents,
            encoder=encoder.identity,
            source=request.captions,
            counts=sums,
            uncaptioned=uncaptioned,
        )
        entry.write(path)
    except OSError as error:
        raise DataError(
            f"{path}: could not be written: {error}. Free the disk and run the same command again"
        ) from None


def _finish(request: TextRequest, latents: LatentIndex, encoder: TextEncoder) -> TextIndex:
    """Make the index from all entries; rank 0 only."""
    paths = [request.path(record) for record in latents.shards]
    entries = [TextEntry.read(path) for path in paths]
    uncaptioned = [problem for entry in entries for problem in entry.uncaptioned]
    if len(uncaptioned) > request.max_uncaptioned:
        raise DataError(
            f"{some_of(uncaptioned)}. {len(uncaptioned)} images have no caption,"
            f" --max-uncaptioned={request.max_uncaptioned} are allowed"
        )
    counts = sum((entry.counts for entry in entries), TextCounts())
    if counts.truncated:
        _LOG.warning(
            "%d of %d captions are longer than the %d tokens that %s takes: their ends are cut",
            *(counts.truncated, counts.captions, encoder.identity.max_length),
            encoder.identity.name,
        )
    if uncaptioned:
        _LOG.warning(
            "%d images have no caption, theirs is the empty text: %s",
            *(len(uncaptioned), some_of(uncaptioned)),
        )
    with replacing(request.out / EMPTY) as temporary:
        save_file({"states": encoder.empty.tokens_LC, "pooled": encoder.empty.pooled_C}, temporary)
    index = TextIndex(
        encoder=encoder.identity,
        source=request.captions,
        latents=latents_digest(latents),
        counts=counts,
        shards=tuple(entry.record for entry in entries),
        versions=versions_of("numpy", "safetensors", "transformers", "tokenizers"),
    )
    index.write(request.out)
    for path in paths:
        path.with_suffix(".json").unlink()
    return index
