"""From images and from other trainers' caches to packed latents: resumed, counted, refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import ExifTags, Image

from promoe_ds.data import encode as module
from promoe_ds.data.buckets.dataset import latent_folders
from promoe_ds.data.encode import encode, missing_shards
from promoe_ds.data.shards import Shard, read_index, verify, write_shard
from promoe_ds.data.sources.packing import EncodeRequest
from promoe_ds.data.trees import scan_tree
from promoe_ds.data.vae import Vae
from promoe_ds.distributed.context import single_process
from promoe_ds.errors import ConfigError, DataError

from .made import copy_of, labelled, open_set, request, save_images, save_vae, true_moments

TEAM = single_process()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a folder with images of its own, to be damaged."""
    save_vae(tmp_path / "vae")
    save_images(tmp_path / "images")
    return tmp_path


def test_encode_interrupted_resumes_and_ends_the_same(
    made: Path, tmp_path: Path, monkeypatch
) -> None:
    out, written = tmp_path / "out", []

    def write_two(path, *content):
        if len(written) == 2:
            raise OSError("No space left on device")
        written.append(path.name)
        return write_shard(path, *content)

    monkeypatch.setattr(module, "write_shard", write_two)
    with pytest.raises(DataError, match=r"shard-00002\.safetensors: .*No space left"):
        encode(request(made, out), TEAM)
    with pytest.raises(DataError, match=r"encoding\.json"):
        open_set(out)
    with pytest.raises(DataError, match="out: these latents are not complete"):
        latent_folders(out)
    monkeypatch.setattr(
        module,
        "write_shard",
        lambda path, *content: written.append(path.name) or write_shard(path, *content),
    )
    encode(request(made, out, batch_size=4), TEAM)
    assert written == [f"shard-0000{number}.safetensors" for number in range(4)]
    assert sorted(path.name for path in out.iterdir()) == ["index.json", *written]
    for name in written[:2]:
        assert (out / name).read_bytes() == (made / "latents" / name).read_bytes()
    statistics = [read_index(folder).statistics for folder in (out, made / "latents")]
    np.testing.assert_allclose(*((each.mean, each.std) for each in statistics), rtol=1e-5)
    encode(request(made, out), TEAM)  # nothing left to do
    assert len(written) == 4


def test_encode_counts_changed_images_and_keeps_names_on_one_line(
    tmp_path: Path, told: list[str]
) -> None:
    save_vae(tmp_path / "vae")
    odd, exif = tmp_path / "images" / os.fsdecode(b"b\xff\nc"), Image.Exif()
    save_images(tmp_path / "images", classes=("a", odd.name))
    exif[ExifTags.Base.Orientation] = 6
    for number in range(3):
        image, more = Image.new("RGBA", (9, 9), (0, 0, 0, 9)), {} if number else {"exif": exif}
        image.save(odd / f"clear{number}.png", **more)
    for path in (tmp_path / "images" / "a").rglob("*.png"):
        path.write_bytes(b"broken")
    index = encode(request(tmp_path, "out", max_corrupt=5, shard_size=5), TEAM)
    assert index == read_index(tmp_path / "out") == verify(tmp_path / "out", TEAM)
    assert (index.classes, index.class_counts) == (("a", "b\\udcff\\nc"), (0, 8))
    assert any(" 3 images with transparent" in line and " 1 turned" in line for line in told)
    assert any("classes could be" in line for line in told)
    shard = Shard(tmp_path / "out" / index.shards[1].file)
    assert shard.name(0) == "b\\udcff\\nc/b\\udcff\\nc_0.png"


def test_encode_into_a_folder_begun_otherwise_is_refused(made: Path, tmp_path: Path) -> None:
    others = save_images(tmp_path / "others", classes=("n01", "n02", "n04"))
    for values, message in (
        ({"dtype": "float16"}, "dtype is 'float32'"),
        ({"shard_size": 5}, "shard_size is 4"),
        ({"vae_dtype": "bfloat16"}, "vae_dtype is 'float32'"),
        ({"source": others}, r"listing is '\w+'"),
    ):
        with pytest.raises(ConfigError, match=f"latents already holds other latents: {message}"):
            encode(request(made, "latents", **values), TEAM)
    out = tmp_path / "out"
    out.mkdir()
    (out / "encoding.json").write_text(json.dumps({"files": 15}))
    with pytest.raises(ConfigError, match="listing is None"):
        encode(request(made, out), TEAM)
    (out / "encoding.json").write_text("[15]")
    with pytest.raises(DataError, match=r"encoding\.json"):
        encode(request(made, out), TEAM)
    (out / "encoding.json").rename(out / "other.txt")
    with pytest.raises(ConfigError, match="is no empty folder"):
        encode(request(made, out), TEAM)


def test_encode_skips_corrupt_images_by_name_up_to_the_limit(own: Path) -> None:
    (own / "images" / "n02" / "n02_2.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"n02_2\.png: not a readable image .*--max-corrupt=0"):
        encode(request(own, "none"), TEAM)
    index = encode(request(own, "one", max_corrupt=1), TEAM)
    assert (index.skipped, index.count) == (("n02/n02_2.png",), 14)
    assert index.class_counts == (5, 4, 5) and read_index(own / "one") == index
    assert len(open_set(own / "one")) == 14


def test_encode_shard_of_corrupt_images_alone_is_empty(own: Path) -> None:
    for number in (0, 2, 4):
        (own / "images" / "n03" / f"n03_{number}.png").write_bytes(b"broken")
    index = encode(request(own, "out", max_corrupt=3, shard_size=12), TEAM)
    assert [shard.count for shard in index.shards] == [12, 0] and len(index.skipped) == 3
    assert len(open_set(own / "out").take(np.arange(12), np.arange(12))[0]) == 12
    assert verify(own / "out", TEAM) == index
    for path in (own / "images").rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="none of its 15 files"):
        encode(request(own, "none", max_corrupt=15), TEAM)


def test_encode_finds_the_missing_shards_only(made: Path, tmp_path: Path) -> None:
    out = copy_of(made, tmp_path)
    for number, shard in enumerate(json.loads((out / "index.json").read_text())["shards"]):
        (out / f"shard-0000{number}.json").write_text(json.dumps({"record": shard, "skipped": []}))
    assert missing_shards(request(made, out), 4) == []
    (out / "shard-00001.json").unlink()
    (out / "shard-00003.safetensors").write_bytes(b"cut")
    assert missing_shards(request(made, out), 4) == [1, 3]


def test_encode_by_an_autoencoder_that_does_not_fit_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--image-size 9: .* 2 pixels that tiny"):
        encode(request(made, tmp_path / "out", image_size=9), TEAM)
    vae = str(save_vae(tmp_path / "vae", kind="rae"))
    with pytest.raises(DataError, match=r"tiny: takes images of 8x8 pixels, these have 16x16"):
        encode(request(made, tmp_path / "out", image_size=16, vae=vae), TEAM)
    with pytest.raises(DataError, match=r"makes images of 8x8 pixels, 16x16 .* of 4x4 alone"):
        Vae(vae).decode(torch.zeros(1, 64, 8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"not a readable autoencoder .*config\.json"),
        (
            {"_class_name": "AutoencoderOfOld"},
            r"_class_name=AutoencoderOfOld, .*diffusers",
        ),
        ({"_class_name": "UNet2DModel"}, r"_class_name=UNet2DModel, which is no autoencoder"),
        ({"_class_name": "AutoencoderKLWan"}, "not a readable autoencoder"),
        ({"latents_mean": [0.0, 0.0]}, "2 latents_mean of 1 latent_channels"),
        ({"latent_channels": 2}, "not a readable autoencoder"),
    ],
)
def test_autoencoder_that_cannot_be_loaded_says_why(
    tmp_path: Path, change: dict | None, message: str
) -> None:
    config = save_vae(tmp_path / "vae") / "config.json"
    values = {**json.loads(config.read_text()), **(change or {})}
    config.write_text(json.dumps(values)) if change else config.unlink()
    with pytest.raises(DataError, match=message):
        Vae(str(tmp_path / "vae"))


def test_autoencoder_of_a_hub_id_may_be_in_a_subfolder(monkeypatch) -> None:
    asked = []

    def load_config(source, subfolder):
        asked.append((source, subfolder))
        return {"_class_name": "none"}

    monkeypatch.setattr(AutoencoderKL, "load_config", load_config)
    for source in ("owner/name", "owner/name/vae"):
        with pytest.raises(DataError, match="_class_name=none"):
            Vae(source)
    assert asked == [("owner/name", None), ("owner/name", "vae")]
    for source in ("name", "owner/", "/nowhere/at/all"):
        with pytest.raises(DataError, match="no such folder, and no hub id"):
            Vae(source)


def test_shard_of_a_latent_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    records = torch.tensor([0.0, 1e5]).view(2, 1, 1, 1).expand(2, 2, 4, 4).half()
    with pytest.raises(DataError, match=r"a/1\.png: .* float16"):
        write_shard(tmp_path / "x.safetensors", [records], torch.zeros(2), ["a/0.png", "a/1.png"])


# Caches of other trainers.


def cached(folder: Path, files: dict[str, dict[str, np.ndarray]]) -> EncodeRequest:
    """Write npz files below `folder/npz`; return the request to pack them."""
    for name, content in files.items():
        path = folder / "npz" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **content)
    common = {"source": folder / "npz", "out": folder / "packed", "vae_name": "tiny"}
    return EncodeRequest(**common, from_latents=True, shard_size=6)


@pytest.mark.parametrize(
    ("names", "suffix"),
    [
        (("latent", "latent_flip"), ".latent.npz"),
        (("moments", "moments_flip"), ".npz"),
        (("moments",), ".npz"),
        (("latent",), ".npz"),
    ],
)
def test_npz_caches_are_read_and_packed_alike(
    made: Path, tmp_path: Path, names: tuple[str, ...], suffix: str
) -> None:
    sides = [true_moments(made, mirrored=mirrored).numpy() for mirrored in (False, True)]
    files = {
        str(Path(name).with_suffix(suffix)): {
            key: side[row] for key, side in zip(names, sides, strict=False)
        }
        for row, name in enumerate(scan_tree(made / "images").names)
    }
    encode(cached(tmp_path, files), TEAM)
    where = np.array([2, 0, 14]), np.array([5, 6, 7])
    flip = "auto" if len(names) == 2 else False
    expected, labels = labelled(open_set(made / "latents", flip=flip).take(*where))
    for found in (open_set(tmp_path / "npz"), open_set(tmp_path / "packed", vae="tiny")):
        latents, found_labels = labelled(found.take(*where))
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(found_labels, labels)
    if len(names) == 1:
        with pytest.raises(DataError, match="holds no mirrored latents"):
            open_set(tmp_path / "npz", flip=True)
    with pytest.raises(DataError, match=r"tiny \(weights unknown\), .*data\.vae=other"):
        open_set(tmp_path / "packed", vae="other")


def test_npz_cache_of_several_shapes_or_without_a_name_is_refused(tmp_path: Path) -> None:
    both = ("latent", "latent_flip")
    sizes = {"a/0": 4, "a/1": 4, "b/2": 6}
    packing = cached(
        tmp_path, {f"{n}.npz": dict.fromkeys(both, np.zeros((2, s, s))) for n, s in sizes.items()}
    )
    with pytest.raises(DataError, match=r"b/2\.npz: .*\(2, 6, 6\) .* 2 x \(2 x 4 x 4\)"):
        encode(packing, TEAM)
    with pytest.raises(ConfigError, match=r"--from-latents: .*--vae-name"):
        encode(replace(packing, vae_name=None), TEAM)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": np.zeros(1)}, "holds other, expected latent or moments"),
        ({"latent": np.zeros((2, 4, 4), dtype=np.int8)}, r"int8 \(2, 4, 4\) .*floats"),
        ({"moments": np.zeros((3, 4, 4))}, r"\(3, 4, 4\) do not fit"),
        ({"moments": np.zeros(4)}, r"\(4,\) do not fit"),
        ({"latent": np.zeros((2, 4, 4)), "latent_flip": np.zeros((2, 4, 5))}, "do not fit"),
        (dict.fromkeys(("latent", "latent_flip"), np.zeros((8, 4, 4))), r"2 x \(2 x 4 x 4\)"),
        ({"latent": np.full((2, 4, 4), np.nan)}, "not finite"),
        (b"PK broken", "not a readable latent file"),
    ],
)
def test_npz_file_that_does_not_fit_is_named(
    tmp_path: Path, content: dict | bytes, message: str
) -> None:
    source = cached(tmp_path, {"a/x.npz": content if isinstance(content, dict) else {}}).source
    if isinstance(content, bytes):
        (source / "a/x.npz").write_bytes(content)
    with pytest.raises(DataError, match=rf"a/x\.npz: .*{message}"):
        open_set(source).take(np.array([0]))
