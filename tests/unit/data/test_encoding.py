"""From images to packed latents and back: through the tool's own code, with a tiny autoencoder
saved to disk.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from promoe_ds.data import LatentDataset, build_dataset, sample_indices
from promoe_ds.data.encode import EncodeRequest, encode, missing_shards
from promoe_ds.data.images import read_image
from promoe_ds.data.index import read_index
from promoe_ds.data.shards import Shard, ShardContent, verify, write_shard
from promoe_ds.data.trees import scan_tree
from promoe_ds.data.vae import Vae
from promoe_ds.distributed.context import single_process
from promoe_ds.errors import ConfigError, DataError

from ..builders import small_config
from .made import SCALE, labelled, save_images, save_vae


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a folder with images, an autoencoder and their latents."""
    folder = tmp_path_factory.mktemp("made")
    save_vae(folder / "vae")
    save_images(folder / "images")
    encode(request(folder, "latents"), single_process())
    return folder


def request(folder: Path, out: str | Path, **values: Any) -> EncodeRequest:
    return replace(
        EncodeRequest(
            source=folder / "images",
            out=folder / out,
            vae=str(folder / "vae"),
            vae_name="tiny",
            image_size=8,
            shard_size=4,
            batch_size=3,
            workers=2,
        ),
        **values,
    )


def open_set(path: Path, dataset: str = "latents", **data: Any) -> LatentDataset:
    values = {
        "dataset": dataset,
        "path": str(path),
        "latent_scale": SCALE,
        "vae_dtype": "fp32",
        **data,
    }
    return build_dataset(small_config(data=values))


def true_moments(folder: Path, *, mirrored: bool = False) -> Tensor:
    """Encode image by image with diffusers itself."""
    vae, tree = (
        AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False),
        scan_tree(folder / "images"),
    )
    result = []
    for name in tree.names:
        pixels = (
            torch.from_numpy(read_image(tree.root / name, 8).copy()).permute(2, 0, 1)[None].float()
            / 127.5
            - 1
        )
        with torch.no_grad():
            result.append(vae.encode(pixels.flip(3) if mirrored else pixels).latent_dist.parameters)
    return torch.cat(result)


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_latents_without_positions_are_the_scaled_posterior_means(made: Path) -> None:
    latents, labels = labelled(open_set(made / "latents").take(np.arange(15)))
    torch.testing.assert_close(latents, true_moments(made)[:, :1] * SCALE, rtol=1e-5, atol=1e-6)
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_latents_are_drawn_from_both_posteriors_by_position(made: Path) -> None:
    dataset, index, count = open_set(made / "latents"), 4, 4000
    draws, _ = dataset.take(np.full(count, index), np.arange(count))
    sides = [true_moments(made, mirrored=mirrored)[index] for mirrored in (False, True)]
    means, deviations = (
        [side[0] * SCALE for side in sides],
        [(side[1] / 2).exp() * SCALE for side in sides],
    )
    expected = (means[0] + means[1]) / 2
    spread = (
        (deviations[0] ** 2 + deviations[1] ** 2) / 2 + ((means[0] - means[1]) / 2) ** 2
    ).sqrt()
    # Six standard errors of 4000 draws, on each of 16 values.
    assert ((draws[:, 0].mean(0) - expected).abs() < 6 * spread / count**0.5).all()
    torch.testing.assert_close(draws[:, 0].std(0), spread, rtol=0.1, atol=0)


@pytest.mark.parametrize("source", ["latents", "images"])
def test_samples_depend_on_index_and_position_not_on_their_batch(made: Path, source: str) -> None:
    dataset = open_set(made / source, source, vae=str(made / "vae"))
    indices, positions = np.array([3, 9, 3, 14]), np.array([100, 7, 8, 2])
    whole, _ = dataset.take(indices, positions)
    parts = [dataset.take(indices[i : i + 1], positions[i : i + 1])[0] for i in range(4)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)
    assert source == "images" or torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole[0], whole[2])


def test_training_stream_is_the_same_for_any_ranks_and_goes_on_in_the_middle_of_an_epoch(
    made: Path,
) -> None:
    dataset, batch, steps = open_set(made / "latents"), 8, 6  # three epochs and a fifth

    def global_batch(step: int, world_size: int) -> Tensor:
        share, parts = batch // world_size, []
        for rank in range(world_size):
            start = step * batch + rank * share
            indices = sample_indices(len(dataset), seed=5, start=start, count=share)
            parts.append(dataset.take(indices, np.arange(start, start + share))[0])
        return torch.cat(parts)

    alone_ = [global_batch(step, 1) for step in range(steps)]
    assert all(
        torch.equal(global_batch(step, ranks), alone_[step])
        for ranks in (2, 4)
        for step in range(steps)
    )
    reopened = open_set(made / "latents")  # a resumed run knows its position, nothing else
    indices = sample_indices(15, seed=5, start=3 * batch, count=batch)
    assert torch.equal(reopened.take(indices, np.arange(3 * batch, 4 * batch))[0], alone_[3])


def test_encoded_on_the_fly_equals_packed(made: Path) -> None:
    indices, positions = np.arange(15), np.arange(15) + 30
    packed, _ = open_set(made / "latents").take(indices, positions)
    live, _ = open_set(made / "images", "images", vae=str(made / "vae")).take(indices, positions)
    torch.testing.assert_close(live, packed, rtol=1e-5, atol=1e-6)  # fp32, other batches


def test_encoded_on_the_fly_in_bf16_is_close_and_needs_no_gradient(made: Path) -> None:
    live, _ = open_set(made / "images", "images", vae=str(made / "vae"), vae_dtype="bf16").take(
        np.arange(3)
    )
    assert live.dtype == torch.float32 and not live.requires_grad
    torch.testing.assert_close(live, true_moments(made)[:3, :1] * SCALE, rtol=0.05, atol=0.05)


def test_flip_false_takes_the_image_as_it_is(made: Path) -> None:
    never = open_set(made / "latents", flip=False)
    latents = never.take(np.zeros(200, dtype=int), np.arange(200))[0]
    spread = (true_moments(made)[0, 1] / 2).exp() * SCALE
    assert (
        (latents[:, 0].mean(0) - true_moments(made)[0, 0] * SCALE).abs() < 6 * spread / 200**0.5
    ).all()


def test_encode_interrupted_goes_on_and_ends_the_same(
    made: Path, tmp_path: Path, monkeypatch
) -> None:
    from promoe_ds.data import encode as module

    real, written = module.write_shard, []

    def write_two(path, content):
        if len(written) == 2:
            raise OSError("No space left on device")
        written.append(path)
        return real(path, content)

    monkeypatch.setattr(module, "write_shard", write_two)
    with pytest.raises(
        DataError, match=r"shard-00002\.safetensors: could not be written: No space left"
    ):
        encode(request(made, tmp_path / "out"), single_process())
    with pytest.raises(
        DataError,
        match=r"these latents are not complete, there is encoding\.json and no index\.json",
    ):
        open_set(tmp_path / "out")
    monkeypatch.setattr(
        module, "write_shard", lambda path, content: written.append(path) or real(path, content)
    )
    encode(request(made, tmp_path / "out", batch_size=4), single_process())
    assert [path.name for path in written] == [f"shard-0000{i}.safetensors" for i in (0, 1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "index.json",
        *sorted(p.name for p in written),
    ]
    for name in ("shard-00000.safetensors", "shard-00001.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (made / "latents" / name).read_bytes()
    encode(request(made, tmp_path / "out"), single_process())  # nothing left to do
    assert len(written) == 4


def test_encode_counts_changed_images_and_keeps_names_on_one_line(
    tmp_path: Path, monkeypatch
) -> None:
    told: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            f"promoe_ds.data.encode._LOG.{level}",
            lambda message, *values: told.append(message % values),
        )
    save_vae(tmp_path / "vae")
    odd, exif = tmp_path / "images" / os.fsdecode(b"b\xff\nc"), Image.Exif()
    save_images(tmp_path / "images", classes=("a", odd.name))
    exif[ExifTags.Base.Orientation] = 6
    for number in range(3):
        Image.new("RGBA", (9, 9), (0, 0, 0, 9)).save(
            odd / f"clear{number}.png", **({} if number else {"exif": exif})
        )
    for path in (tmp_path / "images" / "a").rglob("*.png"):
        path.write_bytes(b"broken")
    index = encode(request(tmp_path, "out", max_corrupt=5, shard_size=5), single_process())
    assert (
        index == read_index(tmp_path / "out")
        and index.classes == ("a", "b\\udcff\\nc")
        and index.class_counts == (0, 8)
    )
    assert (
        len(told) == 2
        and " 3 images with transparent" in told[0]
        and " 1 turned" in told[0]
        and "classes could be" in told[1]
    )
    assert verify(tmp_path / "out", single_process()) == index
    assert (
        Shard(tmp_path / "out" / index.shards[1].file).name(0) == "b\\udcff\\nc/b\\udcff\\nc_0.png"
    )


def test_encoded_on_the_fly_not_finite_names_the_image(made: Path, monkeypatch) -> None:
    dataset = open_set(made / "images", "images", vae=str(made / "vae"))
    encode_ = Vae.encode

    def broken(vae: Vae, images: np.ndarray) -> Tensor:
        moments = encode_(vae, images)
        moments[1, 1, 0, 0] = torch.inf
        return moments

    monkeypatch.setattr(Vae, "encode", broken)
    with pytest.raises(DataError, match=r"n02_0\.png: its latent is not finite"):
        dataset.take(np.array([0, 7]))


def test_encode_into_a_folder_begun_otherwise_is_refused(made: Path, tmp_path: Path) -> None:
    others = save_images(tmp_path / "others", classes=("n01", "n02", "n04"))
    for values, message in (
        ({"dtype": "float16"}, "dtype is 'float32'"),
        ({"shard_size": 5}, "shard_size is 4"),
        ({"vae_dtype": "bfloat16"}, "vae_dtype is 'float32'"),
        ({"source": others}, r"listing is '\w+'"),
    ):
        with pytest.raises(
            ConfigError,
            match=f"latents already holds other latents: {message}.*Choose another folder",
        ):
            encode(request(made, "latents", **values), single_process())
    tmp_path /= "out"
    tmp_path.mkdir()
    (tmp_path / "encoding.json").write_text(json.dumps({"files": 15}))
    with pytest.raises(ConfigError, match=r"listing is None"):
        encode(request(made, tmp_path), single_process())
    (tmp_path / "encoding.json").rename(tmp_path / "other.txt")
    with pytest.raises(ConfigError, match="is no empty folder and holds no latents"):
        encode(request(made, tmp_path), single_process())


def test_encode_skips_corrupt_images_by_name_up_to_the_limit(tmp_path: Path) -> None:
    save_vae(tmp_path / "vae")
    images = save_images(tmp_path / "images")
    (images / "n02" / "n02_2.png").write_bytes(b"broken")
    with pytest.raises(
        DataError,
        match=r"n02_2\.png: not a readable image .*that makes 1 unreadable files, --max-corrupt=0",
    ):
        encode(request(tmp_path, "none"), single_process())
    index = encode(request(tmp_path, "one", max_corrupt=1), single_process())
    assert (
        index.skipped == ("n02/n02_2.png",)
        and index.count == 14
        and index.class_counts == (5, 4, 5)
    )
    assert read_index(tmp_path / "one") == index
    assert len(open_set(tmp_path / "one")) == 14


def test_encode_shard_of_corrupt_images_alone_is_empty(tmp_path: Path) -> None:
    save_vae(tmp_path / "vae")
    images = save_images(tmp_path / "images")
    for number in (0, 2, 4):
        (images / "n03" / f"n03_{number}.png").write_bytes(b"broken")
    index = encode(request(tmp_path, "out", max_corrupt=3, shard_size=12), single_process())
    assert [shard.count for shard in index.shards] == [12, 0] and len(index.skipped) == 3
    assert len(open_set(tmp_path / "out").take(np.arange(12), np.arange(12))[0]) == 12
    assert verify(tmp_path / "out", single_process()) == index
    for path in images.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="none of its 15 files could be read"):
        encode(request(tmp_path, "none", max_corrupt=15), single_process())


def test_encode_deals_out_the_missing_shards_only(made: Path, tmp_path: Path, monkeypatch) -> None:
    out = copy_of(made / "latents", tmp_path / "out")
    index = json.loads((out / "index.json").read_text())
    for number, shard in enumerate(index["shards"]):
        (out / f"shard-0000{number}.json").write_text(json.dumps({"record": shard, "skipped": []}))
    assert missing_shards(out, 4) == []
    (out / "shard-00001.json").unlink()
    (out / "shard-00003.safetensors").write_bytes(b"cut")
    assert missing_shards(out, 4) == [1, 3]


def test_encode_at_a_size_that_the_autoencoder_would_cut_is_refused(
    made: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError,
        match="--image-size 9: must be a multiple of the 2 pixels that tiny makes one latent of",
    ):
        encode(request(made, tmp_path / "out", image_size=9), single_process())


def test_autoencoder_that_shifts_its_latents_is_refused(tmp_path: Path) -> None:
    config = save_vae(tmp_path / "vae") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift_factor": 0.1159}))
    with pytest.raises(
        DataError,
        match=r"shifts its latents by shift_factor=0\.1159, this package only scales them",
    ):
        Vae(str(tmp_path / "vae"))


def test_images_on_the_fly_of_which_none_can_be_read_is_an_error(tmp_path: Path) -> None:
    vae, images = str(save_vae(tmp_path / "vae")), save_images(tmp_path / "images")
    for path in images.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="none of its 15 images could be read"):
        open_set(images, "images", vae=vae, max_corrupt=100).take(np.array([3]))


def test_images_on_the_fly_replace_a_corrupt_one_by_the_next(tmp_path: Path) -> None:
    vae, images = str(save_vae(tmp_path / "vae")), save_images(tmp_path / "images")
    bad = scan_tree(images).names.index("n02/n02_2.png")
    (images / "n02" / "n02_2.png").write_bytes(b"broken")
    found = open_set(images, "images", vae=vae, max_corrupt=1).take(np.array([bad, bad + 1]))[0]
    torch.testing.assert_close(found[0], found[1])
    with pytest.raises(
        DataError, match=r"n02_2\.png: not a readable image .*data\.max_corrupt=0 are allowed"
    ):
        open_set(images, "images", vae=vae).take(np.array([bad]))


# What does not fit.


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        (
            {"vae": "another/vae"},
            {},
            (
                r"index\.json: the latents were encoded by tiny \(xxh3_128:.*\), the recipe wants"
                r" data\.vae=another"
            ),
        ),
        (
            {"latent_scale": 0.18215},
            {},
            r"tiny scales its latents by 0\.5, but data\.latent_scale=0\.18215",
        ),
        (
            {},
            {"input_size": 8},
            "latents are 1 x 4 x 4, from images of 8 pixels, the recipe's .* say 1 x 8 x 8",
        ),
        ({}, {"num_classes": 2}, r"index\.json: 3 classes, but model\.num_classes=2"),
    ],
)
def test_latents_of_another_recipe_are_refused(
    made: Path, data: dict, model: dict, message: str
) -> None:
    config = small_config(
        data={"dataset": "latents", "path": str(made / "latents"), "latent_scale": SCALE, **data},
        model=model,
    )
    with pytest.raises(DataError, match=message):
        build_dataset(config)


def test_latents_of_an_unknown_vae_are_refused_or_told(
    made: Path, tmp_path: Path, monkeypatch
) -> None:
    folder = copy_of(made / "latents", tmp_path / "copy")
    values = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**values, "vae": None}))
    with pytest.raises(
        DataError,
        match=r"does not say which autoencoder .*data\.vae=tiny: pack them anew with --vae-name",
    ):
        open_set(folder, vae="tiny")
    told: list[str] = []
    monkeypatch.setattr(
        "promoe_ds.data.index._LOG.warning", lambda message, *values: told.append(message % values)
    )
    (folder / "index.json").unlink()  # plain shards, as others write them, cannot say it
    assert len(open_set(folder, vae="tiny")) == 15
    assert told == [
        f"{folder}: nothing there says which autoencoder the latents come from; that it is"
        " data.vae=tiny is taken on trust"
    ]


def test_latents_of_the_recipes_vae_are_taken_by_name_fingerprint_or_copy(
    made: Path, tmp_path: Path
) -> None:
    index = read_index(made / "latents")
    for vae in ("tiny", index.vae.fingerprint, str(save_vae(tmp_path / "copy"))):
        assert len(open_set(made / "latents", vae=vae)) == 15
    with pytest.raises(DataError, match=r"the recipe wants data\.vae="):
        open_set(made / "latents", vae=str(save_vae(tmp_path / "other", seed=1)))


def test_latents_damaged_record_is_named_when_it_is_taken(made: Path, tmp_path: Path) -> None:
    folder = copy_of(made / "latents", tmp_path / "copy")
    file = folder / "shard-00001.safetensors"
    data = bytearray(file.read_bytes())
    moments = load_file(file)["moments"]
    data[data.index(moments[2].numpy().tobytes()) + 5] ^= 1
    file.write_bytes(data)
    dataset = open_set(folder, flip=False)
    assert len(dataset.take(np.array([4, 5, 7]))[0]) == 3
    with pytest.raises(
        DataError,
        match=(
            r"shard-00001\.safetensors: record 2 \(n02/deep/n02_3\.png\) is damaged: its checksum"
        ),
    ):
        dataset.take(np.array([4, 6]))
    with pytest.raises(
        DataError,
        match=r"shard-00001\.safetensors: its checksum is not that of index\.json; .*record 2",
    ):
        verify(folder, single_process())
    assert verify(made / "latents", single_process()).count == 15


def test_latents_missing_or_cut_shard_is_named_at_once(made: Path, tmp_path: Path) -> None:
    folder = copy_of(made / "latents", tmp_path / "copy")
    file = folder / "shard-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=r"shard-00002\.safetensors: \d+ bytes, index\.json says \d+"
    ):
        open_set(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"shard-00002\.safetensors: missing, index\.json lists it"):
        open_set(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"count": 3},
        {"surplus": 1},
        {"shards": "../shard-00000.safetensors"},
        {"shape": ["2", 4, 4]},
        {"shape": [2]},
        {"vae": {"name": "x", "latent_channels": 1, "scaling_factor": "0.5"}},
        {"vae": 3},
        [],
        "text",
        7,
        None,
        {"count": 15.0},
        {"count": "15"},
        {"shape": [8, 4, "4"]},
        {"class_counts": [5, True, 5]},
        {"classes": [1, 2, 3]},
    ],
)
def test_index_that_cannot_be_trusted_is_refused(made: Path, tmp_path: Path, change: Any) -> None:
    folder = copy_of(made / "latents", tmp_path / "copy")
    values = json.loads((folder / "index.json").read_text())
    if isinstance(change, dict) and "shards" in change:
        values["shards"][0]["file"] = change["shards"]
    else:
        values = {**values, **change} if isinstance(change, dict) else change
    (folder / "index.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"index\.json: (not a readable index|the file name)"):
        open_set(folder)


def test_latents_not_finite_without_checksums_names_the_record(tmp_path: Path) -> None:
    latents = torch.zeros(3, 1, 4, 4)
    latents[1, 0, 2, 2] = torch.nan
    save_file(
        {"latents": latents, "labels": torch.zeros(3, dtype=torch.int64)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(
        DataError, match=r"a\.safetensors: record 1 \(of unknown source\) is not finite"
    ):
        open_set(tmp_path).take(np.array([0, 1]))


def test_shard_of_a_latent_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    records = torch.full((2, 2, 4, 4), 1e5)
    records[0] = 0
    content = ShardContent(
        kind="moments",
        records=records.half(),
        flipped=None,
        labels=torch.zeros(2, dtype=torch.int64),
        names=["a/0.png", "a/1.png"],
    )
    with pytest.raises(
        DataError,
        match=r"a/1\.png: its latent is not finite as float16: store or compute in a wider type",
    ):
        write_shard(tmp_path / "x.safetensors", content)


# Caches of other trainers.


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
    tree, sides = (
        scan_tree(made / "images"),
        [true_moments(made, mirrored=m).numpy() for m in (False, True)],
    )
    for row, name in enumerate(tree.names):
        path = (tmp_path / "npz" / name).with_suffix(suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path, **{key: side[row] for key, side in zip(names, sides, strict=False)}
        )
    indices, positions = np.array([2, 0, 14]), np.array([5, 6, 7])
    expected, labels = labelled(
        open_set(made / "latents", flip=False if len(names) == 1 else "auto").take(
            indices, positions
        )
    )
    encode(
        EncodeRequest(
            source=tmp_path / "npz",
            from_npz=True,
            vae_name="tiny",
            out=tmp_path / "packed",
            shard_size=6,
        ),
        single_process(),
    )
    for found in (open_set(tmp_path / "npz"), open_set(tmp_path / "packed", vae="tiny")):
        latents, found_labels = labelled(found.take(indices, positions))
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(found_labels, labels)
    if len(names) == 1:
        with pytest.raises(DataError, match="holds no mirrored latents"):
            open_set(tmp_path / "npz", flip=True)
    with pytest.raises(
        DataError, match=r"encoded by tiny \(weights unknown\), the recipe wants data\.vae=other"
    ):
        open_set(tmp_path / "packed", vae="other")


def test_npz_cache_of_several_shapes_names_the_file_that_differs(tmp_path: Path) -> None:
    for name, size in (("a/0", 4), ("a/1", 4), ("b/2", 6)):
        path = tmp_path / "npz" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, latent=np.zeros((2, size, size)), latent_flip=np.zeros((2, size, size)))
    packing = EncodeRequest(
        source=tmp_path / "npz",
        from_npz=True,
        vae_name="tiny",
        out=tmp_path / "packed",
        shard_size=2,
    )
    with pytest.raises(
        DataError, match=r"b/2\.npz: .*\(2, 6, 6\) .* do not fit, expected 2 x \(2 x 4 x 4\)"
    ):
        encode(packing, single_process())
    with pytest.raises(
        ConfigError,
        match=(
            "--from-npz: the files do not say which autoencoder they come from: name it with --vae"
        ),
    ):
        encode(replace(packing, vae_name=None), single_process())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": np.zeros(1)}, "holds other, expected latent or moments"),
        ({"latent": np.zeros((2, 4, 4), dtype=np.int8)}, r"int8 \(2, 4, 4\), expected floats"),
        ({"moments": np.zeros((3, 4, 4))}, "channels cannot be halved"),
        ({"moments": np.zeros(4)}, "do not fit"),
        ({"latent": np.zeros((2, 4, 4)), "latent_flip": np.zeros((2, 4, 5))}, "do not fit"),
        (
            {"latent": np.zeros((8, 4, 4)), "latent_flip": np.zeros((8, 4, 4))},
            r"do not fit, expected 2 x \(2 x 4 x 4\)",
        ),
        ({"latent": np.full((2, 4, 4), np.nan), "latent_flip": np.zeros((2, 4, 4))}, "not finite"),
        (None, "not a readable latent file"),
    ],
)
def test_npz_file_that_does_not_fit_is_named(
    tmp_path: Path, content: dict | None, message: str
) -> None:
    (tmp_path / "a").mkdir()
    if content is None:
        (tmp_path / "a" / "x.npz").write_bytes(b"PK broken")
    else:
        np.savez(tmp_path / "a" / "x.npz", **content)
    with pytest.raises(DataError, match=rf"a/x\.npz: .*{message}"):
        open_set(tmp_path).take(np.array([0]))
