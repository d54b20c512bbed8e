"""Images and latents from parquet, tars and files of torch: packed as those of folders are,
resumed, and what is said of files that do not fit.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from promoe_ds.data.encode import encode
from promoe_ds.data.shards import LatentIndex, Shard, read_index
from promoe_ds.data.sources import parquet
from promoe_ds.data.sources.files import fetch_from_hub, find_files
from promoe_ds.data.sources.formats import IMAGES, open_captions_of, open_samples
from promoe_ds.data.sources.samples import Columns
from promoe_ds.distributed.context import single_process
from promoe_ds.errors import ConfigError, DataError, PromoeError

from .made import labelled, open_set, picture, request, rows, save_parquet, save_tars, write_tar

TEAM = single_process()
SAVERS: dict[str, Callable[..., Path]] = {"parquet": save_parquet, "tar": save_tars}


# From images to packed latents.


def encoded(made: Path, folder: Path, form: str) -> tuple[Path, LatentIndex]:
    """Write the images in a form into `source`, encode them into `out`; return source and index."""
    source = SAVERS[form](made / "images", folder / "source")
    return source, encode(request(made, folder / "out", source=source), TEAM)


@pytest.mark.parametrize("form", SAVERS)
def test_images_in_files_become_the_latents_of_their_tree(
    made: Path, tmp_path: Path, form: str
) -> None:
    source, index = encoded(made, tmp_path, form)
    tree, expected = read_index(made / "latents"), open_set(made / "latents")
    assert index.class_counts == tree.class_counts and index.encoding["source"] == form
    assert index.classes == (tree.classes if form == "parquet" else ("0", "1", "2"))
    where = np.arange(15), np.arange(15)
    pairs = labelled(open_set(tmp_path / "out").take(*where)), labelled(expected.take(*where))
    assert all(map(torch.equal, *pairs))
    names = {"parquet": "data/train-00001-of-00002.parquet/1", "tar": "train-001.tar/000009.png"}
    assert Shard(tmp_path / "out" / index.shards[2].file).name(1) == names[form]
    assert encode(request(made, tmp_path / "out", source=source), TEAM) == index


@pytest.mark.parametrize("form", SAVERS)
def test_encoding_of_files_resumes_and_refuses_others(
    made: Path, tmp_path: Path, form: str
) -> None:
    source, index = encoded(made, tmp_path, form)
    (tmp_path / "out" / "index.json").rename(tmp_path / "index.json")
    (tmp_path / "out" / "shard-00001.safetensors").unlink()
    samples, _ = open_samples(source, IMAGES, Columns(), split="train")
    saved = json.loads((tmp_path / "index.json").read_text())
    settings = {"files": 15, "listing": samples.listing(), "source": form}
    settings |= {name: saved[name] for name in ("image_size", "flipped", "dtype", "vae")}
    settings |= {"vae_dtype": "float32", "shard_size": 4}
    (tmp_path / "out" / "encoding.json").write_text(json.dumps(settings))
    for number in (0, 2, 3):
        entry = {"record": saved["shards"][number], "skipped": []}
        (tmp_path / "out" / f"shard-0000{number}.json").write_text(json.dumps(entry))
    # These entries are of a version that measured no statistics.
    expected = msgspec.structs.replace(index, statistics=None)
    assert encode(request(made, tmp_path / "out", source=source), TEAM) == expected
    for values in ({"label_column": ""}, {"source": made / "images"}):
        with pytest.raises(ConfigError, match=r"already holds other latents: .*listing is"):
            encode(request(made, tmp_path / "out", **{"source": source, **values}), TEAM)


@pytest.mark.parametrize(
    ("mode", "form", "more"),
    [
        ("CMYK", "jpeg", {}),
        ("P", "png", {}),
        ("I;16", "png", {}),
        ("L", "png", {}),
        ("RGB", "gif", {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}),
    ],
)
def test_pictures_of_any_mode_are_read_from_files_as_from_folders(
    tmp_path: Path, mode: str, form: str, more: dict[str, Any]
) -> None:
    content = picture(mode, form, **more)
    (tmp_path / "tree" / "a").mkdir(parents=True)
    (tmp_path / "tree" / "a" / f"x.{form}").write_bytes(content)
    pq.write_table(pa.table({"bytes": [content]}), tmp_path / "x.parquet")
    write_tar(tmp_path / "x.tar", {f"x.{form}": content})
    found = []
    for name in ("tree", "x.parquet", "x.tar"):
        samples, known = open_samples(tmp_path / name, IMAGES, Columns(), split="train")
        found.append(known.read(samples.take(0), 8))
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()
    assert found[0].shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("labels", "metadata", "classes", "expected"),
    [
        (["cat", "ape", "cat"], None, ("ape", "cat"), [1, 0, 1]),
        ([2, 0, 2], None, ("0", "1", "2"), [2, 0, 2]),
        ([1, 0, 1], ["cat", "ape", "bee"], ("cat", "ape", "bee"), [1, 0, 1]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), None, ("a", "b"), [1, 0, 1]),
        (None, None, ("all",), [0, 0, 0]),
    ],
)
def test_parquet_labels_are_numbers_or_places_among_sorted_names(
    tmp_path: Path, labels: Any, metadata: Any, classes: tuple[str, ...], expected: list[int]
) -> None:
    table = pa.table({"image": [picture()] * 3} | ({} if labels is None else {"label": labels}))
    described = {"info": {"features": {"label": {"names": metadata}}}}
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps(described if metadata else [])}
    )
    pq.write_table(table, tmp_path / "x.parquet")
    samples, _ = open_samples(tmp_path, IMAGES, Columns(), split="train")
    assert samples.classes == classes and samples.labels.tolist() == expected


@pytest.mark.parametrize(
    ("members", "column", "classes", "expected"),
    [
        ({"a.cls": b"10\n", "b.cls": b"2"}, None, tuple(map(str, range(11))), [10, 2]),
        ({"a.cls": b"dog", "b.cls": b"ant"}, None, ("ant", "dog"), [1, 0]),
        ({"a.json": b'{"y": 1}', "b.json": b'{"y": 0}'}, "y", ("0", "1"), [1, 0]),
        ({"a.json": b'{"y": "d"}', "b.json": b'{"y": "c"}'}, "y", ("c", "d"), [1, 0]),
        ({"a.word": b"d", "b.word": b"c", "a.json": b"{}"}, "word", ("c", "d"), [1, 0]),
        ({"a.cls": b"1", "b.cls": b"0"}, "", ("all",), [0, 0]),
        ({}, None, ("all",), [0, 0]),
    ],
)
def test_tar_labels_come_from_cls_or_what_is_named(
    tmp_path: Path, members: dict, column: str | None, classes: tuple, expected: list[int]
) -> None:
    images = {
        "./a.jpg": picture(),
        "b.PNG": picture(),
        "._a.jpg": b"",
        "readme.md": b"",
        "LICENSE": b"",
    }
    write_tar(tmp_path / "x.tar", {**images, **members})
    samples, _ = open_samples(tmp_path, IMAGES, Columns(label=column), split="train")
    assert samples.classes == classes and samples.labels.tolist() == expected
    assert [samples.name(index) for index in (0, 1)] == ["x.tar/a.jpg", "x.tar/b.PNG"]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([["a", "b"]], pa.large_list(pa.large_string())), ["a", "b"]),
        (pa.array([["a", "b"]], pa.list_(pa.string(), 2)), ["a", "b"]),
        (pa.array(["a"]).dictionary_encode(), ["a"]),
    ],
)
def test_parquet_captions_are_texts_however_they_are_stored(
    tmp_path: Path, column: pa.Array, expected: list[str]
) -> None:
    rows(text=column)(tmp_path)
    captions = open_captions_of(tmp_path, "parquet", "text", split="train")
    assert captions.of("x.parquet/0") == expected


# Which files are meant.


@pytest.mark.parametrize(
    ("path", "split", "expected"),
    [
        ("", "train", ["data/train-0.tar", "data/train-1.tar", "data/train-10.tar"]),
        ("", "val", ["data/validation-0.tar"]),
        ("data/train-{0..1}.tar", "val", ["train-0.tar", "train-1.tar"]),
        ("data/{train,validation}-0.tar", "train", ["train-0.tar", "validation-0.tar"]),
        ("data/train-?*.tar", "train", ["train-0.tar", "train-1.tar", "train-10.tar"]),
        ("data/train-1.tar", "train", ["train-1.tar"]),
        ("", "test", "are of train, val, none of test"),
        ("data/train-{0..2}.tar", "train", r"train-2\.tar: no such file"),
        ("data/nothing-*.tar", "train", "no such file"),
        ("nowhere", "train", "no such file"),
    ],
)
def test_files_are_found_by_split_pattern_and_name(
    tmp_path: Path, path: str, split: str, expected: list[str] | str
) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-0", "train-1", "train-10", "validation-0"):
        write_tar(tmp_path / "data" / f"{name}.tar", {"a.jpg": b""})
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            find_files(tmp_path / path, (".tar",), split=split)
    else:
        assert find_files(tmp_path / path, (".tar",), split=split).names == expected


def test_record_is_found_among_files_of_several_folders(tmp_path: Path) -> None:
    names = ["a-b/x.tar", "a/x.tar"]
    for name in names:
        write_tar(tmp_path / name, {"p.jpg": b""})
    files = find_files(tmp_path / "{a,a-b}" / "x.tar", (".tar",), split="train")
    assert files.names == names
    assert [files.file_of(f"{name}/p.jpg") for name in names] == [(0, "p.jpg"), (1, "p.jpg")]


def test_data_set_of_the_hub_is_read_from_its_cache(
    made: Path, tmp_path: Path, monkeypatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "datasets--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    save_parquet(made / "images", folder / "snapshots" / ("0" * 40))
    found = fetch_from_hub(Path("owner/name"), "train")
    assert len(open_samples(found, IMAGES, Columns(), split="train")[0]) == 15
    with pytest.raises(DataError, match="owner/other: not a readable folder, nor a data set"):
        fetch_from_hub(Path("owner/other"), "train")
    assert fetch_from_hub(made, "train") == made


# What does not fit.


def tar(**members: bytes) -> Callable[[Path], object]:
    named = {name.replace("_", "."): content for name, content in members.items()}
    return lambda folder: write_tar(folder / "x.tar", named)


def cut(folder: Path, share: float) -> None:
    path = write_tar(folder / "x.tar", {f"{n}.jpg": picture() * 20 for n in range(20)})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share) // 512 * 512])


def two_files(folder: Path) -> None:
    for name, labels in (("x", [0]), ("y", ["b"])):
        pq.write_table(
            pa.table({"image": [picture()], "label": labels}), folder / f"{name}.parquet"
        )


PNG = picture()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (rows(text=["a"]), r"x\.parquet: no column 'image', and 0 .* of text: .*--image-column"),
        (rows(image=["a.jpg"]), r"x\.parquet: image is string, no image"),
        (rows(image=[PNG], label=[0.5]), r"label is double, no integer .*--label-column"),
        (rows(image=[PNG], label=[-1]), r"reach from -1 to -1, .*--label-column"),
        (rows(image=[PNG], label=[10**9]), r"reach from 1000000000 .*--label-column"),
        (rows(image=[PNG] * 2, label=[0, None]), r"x\.parquet: row 1 has no label"),
        (rows(image=[PNG, None], label=[0, 1]), r"x\.parquet/1: image is null.*--max-corrupt=0"),
        (rows(image=[PNG, b"no"], label=[0, 1]), r"x\.parquet/1: not a readable image"),
        (rows(image=pa.array([], pa.binary())), "hold no sample"),
        (rows(image=pa.array([], pa.binary()), label=pa.array([], pa.int64())), "hold no sample"),
        (two_files, r"y\.parquet: label is string, in x\.parquet int64"),
        (lambda folder: (folder / "x.parquet").write_bytes(b"PAR1 no"), "not a readable parquet"),
        (
            lambda folder: (folder / "x.parquet").write_bytes(b"version https://git-lfs"),
            "Git LFS pointer",
        ),
        (tar(a_jpg=PNG, a_cls=b"0", b_cls=b"1"), r"x\.tar/b: a sample without an image.*corrupt=0"),
        (tar(a_jpg=PNG, a_cls=b"0", b_jpg=PNG), r"x\.tar/b\.jpg: has no label cls"),
        (tar(a_jpg=PNG, a_cls=b"-1", b_jpg=PNG, b_cls=b"5"), r"labels reach from -1 to 5"),
        (tar(a_jpg=PNG, a_png=PNG), r"a has several images \(jpg, png\): .*--image-column"),
        (tar(a_jpg=b"no"), r"x\.tar/a\.jpg: not a readable image"),
        (tar(a_txt=b"no image"), r"x\.tar/a: a sample without an image"),
        (tar(readme=b""), "hold no sample"),
        (lambda folder: cut(folder, 0.5), r"x\.tar: not a readable tar .*end of data"),
        (lambda folder: (folder / "x.tar").write_bytes(b"\x1f\x8b no"), "a gzip archive"),
        (lambda folder: None, r"no readable image, \.parquet, \.tar below it"),
        (
            lambda folder: (tar(a_jpg=PNG)(folder), rows(image=[PNG])(folder)),
            "files of several formats .1 of parquet and 1 of tar.",
        ),
    ],
)
def test_source_that_does_not_fit_is_refused_by_name(
    made: Path, tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write(source)
    with pytest.raises(PromoeError, match=message):
        encode(request(made, tmp_path / "out", source=source), TEAM)


def test_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    for share in np.linspace(0.03, 0.8, 20):
        cut(tmp_path, share)
        with pytest.raises(DataError, match=r"x\.tar: not a readable tar"):
            open_samples(tmp_path, IMAGES, Columns(), split="train")


def test_damaged_row_group_is_counted_row_by_row(made: Path, tmp_path: Path) -> None:
    source = save_parquet(made / "images", tmp_path / "source", files=1)
    path = next(source.rglob("*.parquet"))
    group = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + 200] = bytes(200)
    path.write_bytes(content)
    index = encode(request(made, tmp_path / "out", source=source, max_corrupt=3), TEAM)
    assert [name[-2:] for name in index.skipped] == ["/3", "/4", "/5"] and index.count == 12
    with pytest.raises(DataError, match="--max-corrupt=2"):
        encode(request(made, tmp_path / "other", source=source, max_corrupt=2), TEAM)


def test_columns_of_a_tree_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--label-column have no effect on files in class"):
        encode(request(made, tmp_path / "out", label_column="label"), TEAM)


def test_parquet_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    rows(image=[PNG])(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow .*promoe_ds\[data\]"):
        open_samples(tmp_path, IMAGES, Columns(), split="train")


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path: Path, monkeypatch) -> None:
    count, size = 4096, 5000
    path = tmp_path / "x.parquet"
    images = [np.random.default_rng(row).bytes(size) for row in range(count)]
    pq.write_table(pa.table({"image": images}), path, row_group_size=2048, use_dictionary=False)
    opened = []
    monkeypatch.setattr(
        parquet, "_open", lambda p, open_=parquet._open: opened.append(p) or open_(p)
    )
    samples, _ = open_samples(path, IMAGES, Columns(), split="train")
    del images
    footers, most, before = len(opened), 0, pa.total_allocated_bytes()
    for start in range(0, count, 32):
        found = [samples.take(index) for index in range(start, start + 32)]
        assert len(found[0].content()) == size and samples.name(start) == f"x.parquet/{start}"
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < count * size / 3 and len(opened) == footers + 1


def test_tar_of_long_and_foreign_names_is_read(tmp_path: Path) -> None:
    name = "/".join(["folder" * 9] * 4) + "/ä b.jpg"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        write_tar(tmp_path / "x.tar", {name: PNG}, form)
        samples, known = open_samples(tmp_path, IMAGES, Columns(), split="train")
        assert samples.name(0) == f"x.tar/{name}" and len(samples) == 1
        assert known.read(samples.take(0), 8).shape == (8, 8, 3)
