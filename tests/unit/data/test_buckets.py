"""Latents of several sizes: where each image goes, what training takes of them, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from promoe_ds.cli.encode_latents import main
from promoe_ds.data import LatentDataset, bucket_lengths, build_dataset, largest_bucket
from promoe_ds.data.buckets.dataset import latent_folders
from promoe_ds.data.buckets.encode import encode_buckets, nearest_sizes
from promoe_ds.data.images import read_image
from promoe_ds.data.normalization.statistics import merge
from promoe_ds.data.shards import read_index, verify
from promoe_ds.data.text.encode import TextRequest, encode_texts
from promoe_ds.data.text_encoder import TextEncoder
from promoe_ds.data.trees import scan_tree
from promoe_ds.data.vae import Vae
from promoe_ds.distributed.context import single_process
from promoe_ds.errors import ConfigError, DataError

from ..builders import small_config
from .made import SCALE, labelled, picture, request, save_images, save_vae, write_tar
from .text_encoders import LONGEST, WIDTH, save_encoder

TEAM = single_process()
#: Of images: a square, a wide one, a high one; of their latents half of it.
SIZES = (8, (4, 12), (12, 4))
#: (width, height) of images, and the place of the size that is nearest.
SHAPES = {"n01": ((20, 17), 0), "n02": ((36, 12), 1), "n03": ((9, 30), 2)}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Return a folder with `images`, `vae` and `latents` of three sizes; nobody writes into it."""
    folder = tmp_path_factory.mktemp("buckets")
    save_vae(folder / "vae")
    for name, (size, _) in SHAPES.items():
        save_images(folder / "images", per_class=5, classes=(name,), size=size)
    encode_buckets(request(folder, "latents"), SIZES, TEAM)
    return folder


@pytest.fixture
def own(packed: Path, tmp_path: Path) -> Path:
    """Return a copy of the latents, to be damaged."""
    return shutil.copytree(packed / "latents", tmp_path / "latents")


def open_buckets(
    path: Path,
    batch: int = 2,
    buckets: tuple[Any, ...] = (4, (2, 6), (6, 2)),
    data: dict[str, Any] | None = None,
    **model: Any,
) -> LatentDataset:
    data = {"dataset": "latents", "path": str(path), "latent_scale": SCALE, **(data or {})}
    train = {"global_batch_size": batch}
    return build_dataset(small_config(data=data, train=train, model={"buckets": buckets, **model}))


def test_images_go_to_the_nearest_shape_and_every_folder_is_latents_of_its_own(packed) -> None:
    folders = latent_folders(packed / "latents")
    assert [folder.name for folder in folders] == ["12x4", "4x12", "8x8"]
    indices = {folder.name: verify(folder, TEAM) for folder in folders}
    assert [index.image_size for index in indices.values()] == [[12, 4], [4, 12], 8]
    assert [index.shape for index in indices.values()] == [(2, 6, 2), (2, 2, 6), (2, 4, 4)]
    assert {index.classes for index in indices.values()} == {tuple(SHAPES)}
    assert indices["4x12"].class_counts == (0, 5, 0)
    again = encode_buckets(request(packed, "latents"), SIZES, TEAM)
    assert {folder.name: index for folder, index in again.items()} == indices


def test_buckets_hold_the_crops_of_their_size_and_the_labels(packed) -> None:
    dataset, vae = open_buckets(packed / "latents"), Vae(str(packed / "vae"))
    assert (len(dataset), bucket_lengths(dataset)) == (15, (5, 5, 5))
    tree = scan_tree(packed / "images")
    for place, size in enumerate(SIZES):
        latents, labels = labelled(dataset.take(np.arange(5 * place, 5 * place + 5)))
        assert labels.tolist() == [place] * 5
        names = [name for name in tree.names if name.startswith(f"n0{place + 1}")]
        images = np.stack([read_image(tree.root / name, size) for name in names])
        means = vae.encode(images)[:, :1] * SCALE
        torch.testing.assert_close(latents, means, rtol=1e-5, atol=1e-6)
    assert largest_bucket(dataset).take(np.arange(2))[0].shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match="several buckets"):
        dataset.take(np.array([4, 5]))


def test_image_is_turned_as_it_is_shown_and_what_cannot_be_read_goes_to_the_first(
    tmp_path: Path,
) -> None:
    save_images(tmp_path / "images", per_class=1, classes=("a",), size=(30, 9))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (30, 9)).save(tmp_path / "images" / "a" / "b.jpg", exif=exif)
    (tmp_path / "images" / "a" / "c.png").write_bytes(b"broken")
    Image.new("L", (7, 7)).save(tmp_path / "images" / "a" / "d.png")
    asked = request(tmp_path, "out")
    found = nearest_sizes(asked, asked.samples()[0], (8, (12, 4), (4, 12)), TEAM)
    # By name: a_0.png is wide, b.jpg is turned, c.png broken, d.png square.
    assert found == [[2, 3], [1], [0]]


def test_sample_without_an_image_counts_once_and_shifts_no_other(tmp_path: Path) -> None:
    save_vae(tmp_path / "vae")
    wide, square = (picture(size=size) for size in ((30, 9), (9, 9)))
    members = {"a.cls": b"0", "b.png": wide, "b.cls": b"1", "c.png": square, "c.cls": b"2"}
    source = write_tar(tmp_path / "x.tar", members)
    asked = request(tmp_path, "out", source=source, max_corrupt=1)
    indices = encode_buckets(asked, (8, (4, 12)), TEAM)
    assert [index.class_counts for index in indices.values()] == [(0, 0, 1), (0, 1, 0)]
    assert [index.skipped for index in indices.values()] == [("x.tar/a",), ()]


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((8, (4, 9)), ConfigError, "4x9: must be a multiple of the 2 pixels"),
        ((8, (4, 12)), ConfigError, r"holds 12x4, which is none of --buckets"),
        ((*SIZES, (16, 2)), ConfigError, "--buckets 16x2: no image"),
    ],
)
def test_sizes_that_cannot_be_encoded_are_refused_before_anything_is_written(
    packed, tmp_path: Path, sizes, error, message
) -> None:
    out = packed / "latents" if "none of" in message else tmp_path / "out"
    with pytest.raises(error, match=message):
        encode_buckets(request(packed, out), sizes, TEAM)
    assert not (tmp_path / "out").exists()


def test_another_choice_of_images_for_a_folder_is_refused(packed, tmp_path: Path) -> None:
    shutil.copytree(packed / "latents" / "8x8", tmp_path / "out" / "8x8")
    with pytest.raises(ConfigError, match="chosen is"):
        encode_buckets(request(packed, tmp_path / "out"), (8, (12, 4)), TEAM)


@pytest.mark.parametrize(
    ("buckets", "batch", "message"),
    [
        ((4, (2, 6)), 2, r"latents of 6x2, which is none of model\.buckets \(4x4, 2x6\)"),
        ((4, (2, 6), (6, 2), (2, 4)), 2, r"no folder of latents of 2x4 \(model\.buckets\)"),
        ((4, (2, 6), (6, 2)), 6, r"4x4 has 5 samples, fewer than train\.global_batch_size=6"),
        ((), 2, r"several sizes: .* model\.buckets"),
    ],
)
def test_buckets_that_do_not_fit_the_recipe_are_refused(packed, buckets, batch, message) -> None:
    with pytest.raises(DataError, match=message):
        open_buckets(packed / "latents", batch, buckets)


def test_buckets_are_normalised_by_what_was_measured_of_all_of_them(packed, own: Path) -> None:
    parts = [read_index(folder).statistics for folder in latent_folders(own)]
    for folder in latent_folders(own):
        index = json.loads((folder / "index.json").read_text())
        del index["statistics"]
        (folder / "index.json").write_text(json.dumps(index))
    by_channel = {"latent_normalization": "channel", "latent_scale": 1.0}
    with pytest.raises(DataError, match=r"latents: .*no measured statistics: .*--measure"):
        open_buckets(own, data=by_channel)
    main(["--measure", str(own), "--device", "cpu"])
    assert [read_index(folder).statistics for folder in latent_folders(own)] == parts
    dataset, plain = open_buckets(own, data=by_channel), open_buckets(own)
    pooled = merge(parts)
    assert len({part.mean for part in parts}) == 3 and pooled not in parts
    for first in (0, 5, 10):
        taken, usual = (each.take(np.array([first]))[0] for each in (dataset, plain))
        expected = (usual / SCALE - pooled.mean[0]) / pooled.std[0]
        torch.testing.assert_close(taken, expected, rtol=1e-5, atol=1e-5)
    assert largest_bucket(dataset).normalization.latents_mean == pooled.mean


def test_folder_of_one_size_or_of_other_channels_is_refused(packed) -> None:
    with pytest.raises(DataError, match="holds latents of one size"):
        open_buckets(packed / "latents" / "8x8")
    with pytest.raises(DataError, match=r"8x8.*model\.in_channels"):
        open_buckets(packed / "latents", in_channels=2)
    with pytest.raises(DataError, match=r"no index\.json"):
        open_buckets(packed / "nothing")
    texts = {"condition": "text", "text_width": WIDTH, "text_length": LONGEST, "num_classes": 1000}
    with pytest.raises(DataError, match=r"several sizes: .* model\.buckets"):
        open_buckets(packed / "latents", buckets=(), **texts)


def damage(folder: Path, how: str) -> None:
    index = json.loads((folder / "8x8" / "index.json").read_text())
    if how == "classes":
        index["classes"] = ["x", "y", "z"]
    elif how == "vae":
        index["vae"]["name"] = "another"
    elif how == "twice":
        shutil.copytree(folder / "8x8", folder / "again")
    elif how == "unfinished":
        (folder / "8x8" / "index.json").rename(folder / "8x8" / "encoding.json")
        return
    elif how == "strange":
        (folder / "images").mkdir()
    (folder / "8x8" / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("classes", "in its classes"),
        ("vae", "in its vae"),
        ("twice", r"again: has latents of 4x4|8x8: has latents of 4x4"),
        ("unfinished", "8x8: these latents are not complete"),
        ("strange", r"no index\.json in images"),
    ],
)
def test_folders_that_do_not_belong_together_are_named(own: Path, how: str, message: str) -> None:
    damage(own, how)
    with pytest.raises(DataError, match=message):
        open_buckets(own)


def test_captions_of_every_bucket_are_beside_its_latents(packed, own: Path, tmp_path) -> None:
    shutil.copytree(packed / "images", tmp_path / "images")
    words = dict(zip(SHAPES, ("heart", "apple", "gold"), strict=True))
    for name in scan_tree(tmp_path / "images").names:
        (tmp_path / "images" / name).with_suffix(".txt").write_text(words[name[:3]])
    encoders = [str(save_encoder(tmp_path / kind, kind)) for kind in ("bert", "clip_text")]

    def encode_with(encoder: str, *folders: str) -> None:
        for folder in folders:
            (own / folder / "text.json").unlink(missing_ok=True)
            encode_texts(
                TextRequest(
                    images=tmp_path / "images",
                    out=own / folder,
                    captions=".txt",
                    text_encoder=encoder,
                ),
                TEAM,
            )

    encode_with(encoders[0], "8x8", "4x12", "12x4")
    text = {"condition": "text", "text_width": WIDTH, "text_length": LONGEST, "num_classes": 1000}
    dataset, encoder = open_buckets(own, **text), TextEncoder(encoders[0])
    assert dataset.text_identity == encoder.identity
    for place, word in enumerate(words.values()):
        _, condition = dataset.take(np.array([5 * place]))
        wanted = encoder.condition([word])
        torch.testing.assert_close(condition.pooled_BC, wanted.pooled_BC)
    encode_with(encoders[1], "4x12")
    with pytest.raises(DataError, match="several text encoders"):
        open_buckets(own, **text)
