"""Captions beside packed latents: from files and tables to what training takes, and what is said of
captions that are none.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from promoe_ds.config.loader import config_from_dict
from promoe_ds.config.schema import RunConfig
from promoe_ds.data import LatentDataset, build_dataset
from promoe_ds.data.encode import encode
from promoe_ds.data.listing import Files
from promoe_ds.data.shards import ShardRecord, read_index
from promoe_ds.data.sources.formats import open_captions_of
from promoe_ds.data.text.captions import open_captions
from promoe_ds.data.text.encode import TextRequest, encode_texts
from promoe_ds.data.text.packed import (
    TEXT_INDEX,
    PackedTexts,
    TextCounts,
    latents_digest,
    verify_texts,
)
from promoe_ds.data.text_encoder import TextEncoder
from promoe_ds.data.trees import scan_tree
from promoe_ds.distributed.context import single_process
from promoe_ds.errors import ConfigError, DataError

from ..builders import small_values
from .made import SCALE, save_parquet, save_tars, save_vae, write_tar
from .made import request as image_request
from .text_encoders import LONGEST, WIDTH, save_encoder

TEAM = single_process()
PHRASES = ["a red apple", "purple heart", "a heart of gold", "apple"]


def captions_of(number: int) -> list[str]:
    """Return one to three captions of an image."""
    return [PHRASES[(number + each) % 4] for each in range(1 + number % 3)]


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """Return a copy of images with captions, latents and an encoder."""
    for name in ("images", "latents"):
        shutil.copytree(made / name, tmp_path / name)
    save_encoder(tmp_path / "encoder", "bert")
    for number, name in enumerate(scan_tree(tmp_path / "images").names):
        path = (tmp_path / "images" / name).with_suffix(".txt")
        path.write_text("\n\n".join(captions_of(number)) + "\n", encoding="utf-8")
    return tmp_path


def request(own: Path, **values: Any) -> TextRequest:
    common = TextRequest(
        images=own / "images",
        out=own / "latents",
        captions=".txt",
        text_encoder=str(own / "encoder"),
    )
    return replace(common, **values)


def text_config(own: Path, text_length: int = LONGEST, **data: Any) -> RunConfig:
    values = small_values(
        data={"dataset": "latents", "path": str(own / "latents"), "latent_scale": SCALE, **data},
        model={"condition": "text", "text_width": WIDTH, "text_length": text_length},
    )
    del values["model"]["num_classes"]
    return config_from_dict(values, source="texts")


def open_texts(own: Path, text_length: int = LONGEST, **data: Any) -> LatentDataset:
    return build_dataset(text_config(own, text_length, **data))


def test_packed_captions_are_what_their_encoder_makes(own: Path) -> None:
    index = encode_texts(request(own), TEAM)
    everything = [caption for number in range(15) for caption in captions_of(number)]
    lengths = [len(caption.split()) + 2 for caption in everything]
    assert index.counts == TextCounts(captions=30, tokens=sum(lengths), longest=max(lengths))
    assert verify_texts(own / "latents", TEAM) == index
    dataset, encoder = open_texts(own, caption_groups=3), TextEncoder(str(own / "encoder"))
    indices = np.array([14, 2, 5, 0])
    _, condition = dataset.take(indices)
    wanted = encoder.condition([captions_of(number)[0] for number in indices])
    assert torch.equal(condition.mask_BL, wanted.mask_BL)
    torch.testing.assert_close(condition.pooled_BC, wanted.pooled_BC)
    torch.testing.assert_close(condition.tokens_BLC, wanted.tokens_BLC, atol=2e-2, rtol=2e-2)
    assert torch.equal(condition.empty.tokens_LC, encoder.empty.tokens_LC)
    assert condition.group_B.tolist() == [2, 0, 1, 0] and condition.num_groups == 3
    assert open_texts(own).take(indices)[1].group_B is None
    assert dataset.text_identity == encoder.identity


def test_caption_is_drawn_by_seed_and_position_alone(own: Path) -> None:
    encode_texts(request(own), TEAM)
    dataset, index, count = open_texts(own), 2, 300  # three captions
    _, drawn = dataset.take(np.full(count, index), np.arange(count))
    kinds, counts = torch.unique(drawn.pooled_BC, dim=0, return_counts=True)
    assert len(kinds) == 3 and int(counts.min()) > count / 3 - 6 * (count * 2 / 9) ** 0.5
    _, alone = dataset.take(np.array([7, index]), np.array([5, 123]))
    assert torch.equal(alone.pooled_BC[1], drawn.pooled_BC[123])


@pytest.mark.parametrize("form", ["metadata.jsonl", "metadata.csv"])
def test_captions_of_a_table_are_those_of_text_files(own: Path, form: str) -> None:
    names, table = scan_tree(own / "images").names, own / "images" / form
    rows = [(name, captions_of(number)) for number, name in enumerate(names)]
    if form.endswith("jsonl"):
        lines = [json.dumps({"file_name": name, "what": texts}) for name, texts in rows]
    else:
        lines = ["file_name,what", *(f'{name},"{each}"' for name, texts in rows for each in texts)]
    table.write_text("\n".join(lines), encoding="utf-8-sig")
    by_file = encode_texts(request(own), TEAM)
    (own / "latents" / TEXT_INDEX).unlink()
    by_column = encode_texts(request(own, captions="what"), TEAM)
    assert by_column.shards == by_file.shards and by_column.source == "what"
    with pytest.raises(
        DataError, match=rf"{form}: row \d has no column 'caption', but 'file_name'"
    ):
        (own / "latents" / TEXT_INDEX).unlink()
        encode_texts(request(own, captions="caption"), TEAM)


def test_only_a_line_feed_or_carriage_return_ends_a_caption(tmp_path: Path) -> None:
    # Texts of web pages hold these: `str.splitlines` would end a line, and a row, at each.
    captions = [f"a red{mark}apple" for mark in "\u2028\x85\x0b\x1c"]
    (tmp_path / "x.txt").write_bytes("\r\n".join([*captions, "b\rc"]).encode())
    assert open_captions(Files(tmp_path, []), ".txt").of("x.png") == [*captions, "b", "c"]
    rows = [f"x.png,{each}\n" for each in captions]
    (tmp_path / "metadata.csv").write_text("".join(["file_name,what\n", *rows]), encoding="utf-8")
    assert open_captions(Files(tmp_path, []), "what").of("x.png") == captions
    path = write_tar(tmp_path / "x.tar", {"x.txt": "\n".join(captions).encode(), "x.png": b""})
    assert open_captions_of(path, "tar", ".txt", split="train").of("x.tar/x.png") == captions


def test_encoding_resumes_with_what_is_missing_and_refuses_other_texts(own: Path) -> None:
    index = encode_texts(request(own), TEAM)
    assert encode_texts(request(own), TEAM) == index
    with pytest.raises(ConfigError, match=r"already holds texts: \.txt by .*remove text\.json"):
        encode_texts(request(own, text_length=4), TEAM)
    (own / "latents" / TEXT_INDEX).unlink()
    missing = own / "images" / scan_tree(own / "images").names[-1]
    missing.with_suffix(".txt").rename(own / "aside")
    with pytest.raises(DataError, match=r"1 images of shard-00003.* have no caption"):
        encode_texts(request(own), TEAM)
    written = [own / "latents" / f"text-shard-0000{number}.safetensors" for number in range(3)]
    before = [path.stat().st_mtime_ns for path in written]
    (own / "aside").rename(missing.with_suffix(".txt"))
    assert encode_texts(request(own), TEAM) == index
    assert [path.stat().st_mtime_ns for path in written] == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"n02_2\.txt: no such file: the image n02/n02_2\.png has no caption"),
        (b" \n\t\n", r"n02_2\.txt: is empty: the image n02/n02_2\.png has no caption"),
        (b"a red\ncaf\xe9", r"n02_2\.txt: line 2 is not UTF-8 \(byte 0xe9\): convert it"),
    ],
)
def test_caption_that_is_none_is_named_and_where_allowed_empty(
    own: Path, content: bytes | None, message: str
) -> None:
    path = own / "images" / "n02" / "n02_2.txt"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message + ".*--max-uncaptioned=0 are allowed"):
        encode_texts(request(own), TEAM)
    index = encode_texts(request(own, max_uncaptioned=1), TEAM)
    assert index.counts.blank == 1
    _, condition = open_texts(own, caption_groups=3).take(np.array([5, 8]))
    assert condition.is_null_B.tolist() == [False, True] and condition.group_B.tolist() == [1, 3]
    assert torch.equal(condition.pooled_BC[1], condition.empty.pooled_C)


def test_captions_too_long_are_cut_counted_and_said(own: Path, caplog) -> None:
    index = encode_texts(request(own, text_length=4), TEAM)
    assert (index.counts.longest, index.counts.truncated) == (4, 16)
    assert "16 of 30 captions are longer than the 4 tokens" in caplog.text


def test_captions_of_a_shard_without_images_are_none(own: Path) -> None:
    for number in (0, 2, 4):
        (own / "images" / "n03" / f"n03_{number}.png").write_bytes(b"broken")
    save_vae(own / "vae")
    encode(image_request(own, own / "few", max_corrupt=3, shard_size=12), TEAM)
    index = encode_texts(request(own, out=own / "few"), TEAM)
    assert [shard.count for shard in index.shards] == [12, 0]
    assert verify_texts(own / "few", TEAM) == index
    assert len(build_dataset(text_config(own, path=str(own / "few"))).take(np.arange(12))[1]) == 12


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"text_encoder": "google/t5-v1_1-xl"}, "the recipe wants data.text_encoder=google/t5"),
        ({"text_fingerprint": "other"}, "trained with other"),
        ({"text_length": 5}, r"the longest caption has 6 tokens, but model\.text_length=5"),
    ],
)
def test_recipe_of_another_encoder_is_refused(
    own: Path, data: dict[str, Any], message: str
) -> None:
    encode_texts(request(own), TEAM)
    with pytest.raises(DataError, match=message):
        open_texts(own, **data)


def test_recipe_may_name_a_copy_of_the_encoder(own: Path) -> None:
    index = encode_texts(request(own), TEAM)
    copy = shutil.copytree(own / "encoder", own / "copy")
    for name in (str(copy), index.encoder.fingerprint, str(own / "encoder")):
        assert open_texts(own, text_encoder=name).text_identity == index.encoder
    with pytest.raises(DataError, match=r"encoded by .*encoder .*xxh3"):
        open_texts(own, text_encoder=str(save_encoder(own / "other", "bert", seed=1)))


def test_latents_without_texts_or_with_those_of_others_are_refused(own: Path) -> None:
    with pytest.raises(DataError, match=r"no text\.json there, but model\.condition=text"):
        open_texts(own)
    index = encode_texts(request(own), TEAM)
    msgspec.structs.replace(index, latents="0" * 16).write(own / "latents")
    with pytest.raises(DataError, match="belongs to other latents"):
        open_texts(own)
    (own / "latents" / "index.json").unlink()
    with pytest.raises(DataError, match=r"needs packed latents with captions, .* no index\.json"):
        open_texts(own)


def test_damaged_captions_are_named(own: Path) -> None:
    index = encode_texts(request(own), TEAM)
    path = own / "latents" / index.shards[1].file
    content = bytearray(path.read_bytes())
    dataset = open_texts(own)
    header = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + header])["states"]["data_offsets"][0] + 8 + header
    content[start] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"text-shard-00001\.safetensors: caption 0 is damaged"):
        dataset.take(np.array([4]))
    with pytest.raises(DataError, match=r"its checksum is not that of text\.json"):
        verify_texts(own / "latents", TEAM)
    path.unlink()
    with pytest.raises(DataError, match=r"text-shard-00001\.safetensors: .*"):
        open_texts(own).take(np.array([4]))


def test_index_of_a_hundred_million_captions_opens_without_a_file(own: Path) -> None:
    encode_texts(request(own), TEAM)
    shards, images = 24_415, 4096
    records = tuple(
        ShardRecord(file=f"shard-{n:05d}.safetensors", count=images, bytes=1, checksum=f"{n:016x}")
        for n in range(shards)
    )
    latents = read_index(own / "latents")
    latents = msgspec.structs.replace(latents, count=shards * images, shards=records)
    index = json.loads((own / "latents" / TEXT_INDEX).read_text())
    index |= {"shards": msgspec.to_builtins(records), "latents": latents_digest(latents)}
    (own / "latents" / TEXT_INDEX).write_text(json.dumps(index))
    texts = PackedTexts(own / "latents", latents, text_config(own))
    with pytest.raises(DataError, match=r"shard-20000\.safetensors"):
        texts.take([20_000], [7], None)


# Captions in parquet and tars.


@pytest.mark.parametrize(
    ("form", "source"),
    [("parquet", "text"), ("parquet", "texts"), ("tar", ".txt"), ("tar", "text")],
)
def test_captions_in_files_are_encoded_beside_their_latents(
    made: Path, tmp_path: Path, form: str, source: str
) -> None:
    captions = [PHRASES[number % 4] for number in range(15)]
    if form == "parquet":
        columns = {"text": captions, "texts": [[each, None, " "] for each in captions]}
    else:
        columns = {
            "txt": [f"{each}\n\n".encode() for each in captions],
            "json": [json.dumps({"text": each}).encode() for each in captions],
        }
    images = (save_parquet if form == "parquet" else save_tars)(
        made / "images", tmp_path / "images", **columns
    )
    encode(image_request(made, tmp_path / "latents", source=images), TEAM)
    save_encoder(tmp_path / "encoder", "bert")
    index = encode_texts(request(tmp_path, captions=source), TEAM)
    assert (index.counts.captions, index.counts.blank) == (15, 0)
    _, condition = open_texts(tmp_path, caption_groups=3).take(np.array([0, 4, 1, 14]))
    assert torch.equal(condition.pooled_BC[0], condition.pooled_BC[1])
    assert not torch.equal(condition.pooled_BC[0], condition.pooled_BC[2])
    assert condition.group_B.tolist() == [0, 0, 0, 2]
    (tmp_path / "latents" / "text.json").unlink()
    with pytest.raises(DataError, match="other"):
        encode_texts(request(tmp_path, captions=".other" if form == "tar" else "other"), TEAM)


def test_rows_without_a_caption_are_counted(made: Path, tmp_path: Path) -> None:
    images = save_parquet(made / "images", tmp_path / "images", text=["a heart", None, " "] * 5)
    encode(image_request(made, tmp_path / "latents", source=images), TEAM)
    save_encoder(tmp_path / "encoder", "bert")
    asked = request(tmp_path, captions="text", max_uncaptioned=10)
    assert encode_texts(asked, TEAM).counts.blank == 10
    (tmp_path / "latents" / "text.json").unlink()
    with pytest.raises(DataError, match=r"/1: text is blank: no caption.*--max-uncaptioned=9"):
        encode_texts(replace(asked, max_uncaptioned=9), TEAM)
