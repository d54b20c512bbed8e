"""What training takes from packed latents and from images: posteriors drawn by position, the same
for any batch, number of ranks and way of encoding; and what is said of what does not fit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from promoe_ds.data import build_dataset, sample_indices
from promoe_ds.data.shards import read_index, verify
from promoe_ds.data.trees import scan_tree
from promoe_ds.data.vae import Vae
from promoe_ds.distributed.context import single_process
from promoe_ds.errors import DataError

from ..builders import small_config
from .made import SCALE, copy_of, labelled, open_set, save_images, save_vae, true_moments


def test_latents_without_positions_are_the_scaled_posterior_means(made: Path) -> None:
    latents, labels = labelled(open_set(made / "latents").take(np.arange(15)))
    torch.testing.assert_close(latents, true_moments(made)[:, :1] * SCALE, rtol=1e-5, atol=1e-6)
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5


@pytest.mark.parametrize("flip", ["auto", False])
def test_latents_are_drawn_from_their_posteriors_by_position(made: Path, flip: str | bool) -> None:
    index, count = 4, 4000
    draws, _ = open_set(made / "latents", flip=flip).take(np.full(count, index), np.arange(count))
    sides = [true_moments(made, mirrored=m)[index] for m in (False, True)][: 2 if flip else 1]
    means = torch.stack([side[0] * SCALE for side in sides])
    variances = torch.stack([side[1].exp() * SCALE**2 for side in sides])
    spread = (variances.mean(0) + means.var(0, unbiased=False)).sqrt()
    # Six standard errors of 4000 draws, on each of 16 values.
    assert ((draws[:, 0].mean(0) - means.mean(0)).abs() < 6 * spread / count**0.5).all()
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


def test_training_stream_is_the_same_for_any_ranks_and_resumes_in_an_epoch(made: Path) -> None:
    batch, steps = 8, 6  # three epochs and a fifth

    def global_batch(step: int, world_size: int) -> Tensor:
        # A resumed run opens the set anew, and knows its position, nothing else.
        dataset, share, parts = open_set(made / "latents"), batch // world_size, []
        for start in range(step * batch, (step + 1) * batch, share):
            indices = sample_indices(len(dataset), seed=5, start=start, count=share)
            parts.append(dataset.take(indices, np.arange(start, start + share))[0])
        return torch.cat(parts)

    for step in range(steps):
        whole = global_batch(step, 1)
        assert all(torch.equal(global_batch(step, ranks), whole) for ranks in (2, 4))


def test_encoded_on_the_fly_equals_packed_and_is_close_in_bf16(made: Path) -> None:
    indices, positions = np.arange(15), np.arange(15) + 30
    packed, _ = open_set(made / "latents").take(indices, positions)
    live, _ = open_set(made / "images", "images", vae=str(made / "vae")).take(indices, positions)
    torch.testing.assert_close(live, packed, rtol=1e-5, atol=1e-6)  # fp32, other batches
    images = open_set(made / "images", "images", vae=str(made / "vae"), vae_dtype="bf16")
    live, _ = images.take(np.arange(3))
    assert live.dtype == torch.float32 and not live.requires_grad
    torch.testing.assert_close(live, true_moments(made)[:3, :1] * SCALE, rtol=0.05, atol=0.05)


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


def test_images_on_the_fly_replace_a_corrupt_one_by_the_next(tmp_path: Path) -> None:
    vae, images = str(save_vae(tmp_path / "vae")), save_images(tmp_path / "images")
    bad = scan_tree(images).names.index("n02/n02_4.png")
    (images / "n02" / "n02_4.png").write_bytes(b"broken")
    dataset = open_set(images, "images", vae=vae, max_corrupt=1)
    found, labels = labelled(dataset.take(np.array([bad, bad + 1, bad])))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert labels.tolist() == [2, 2, 2]
    with pytest.raises(DataError, match=r"n02_4\.png: .*data\.max_corrupt=0"):
        open_set(images, "images", vae=vae).take(np.array([bad]))
    for path in images.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="none of its 15 images"):
        open_set(images, "images", vae=vae, max_corrupt=100).take(np.array([3]))


# What does not fit.


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        ({"vae": "another/vae"}, {}, r"tiny \(xxh3_128:.*\), .*data\.vae=another"),
        ({"latent_scale": 0.18215}, {}, r"tiny has 1 .*by 0\.5, .*by 0\.18215"),
        ({}, {"input_size": 8}, r"\(4, 2, 4, 4\) .*\(n, 2, 8, 8\)"),
        ({}, {"num_classes": 2}, r"index\.json: 3 classes, but model\.num_classes=2"),
    ],
)
def test_latents_of_another_recipe_are_refused(
    made: Path, data: dict, model: dict, message: str
) -> None:
    common = {"dataset": "latents", "path": str(made / "latents"), "latent_scale": SCALE}
    with pytest.raises(DataError, match=message):
        build_dataset(small_config(data={**common, **data}, model=model))


def test_latents_of_an_unknown_vae_are_refused_or_reported_by_rank_0(
    made: Path, tmp_path: Path, monkeypatch, told: list[str]
) -> None:
    folder = copy_of(made, tmp_path)
    values = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**values, "vae": None}))
    with pytest.raises(DataError, match=r"data\.vae=tiny: .*--vae-name"):
        open_set(folder, vae="tiny")
    (folder / "index.json").unlink()  # plain shards, as others write them, cannot say it
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert len(open_set(folder, vae="tiny")) == 15
    assert len(told) == 1 and str(folder) in told[0] and "data.vae=tiny" in told[0]


def test_latents_of_fewer_classes_than_the_recipes_are_reported_by_rank_0(
    made: Path, monkeypatch, told: list[str]
) -> None:
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        open_set(made / "latents")
    assert len(told) == 1 and "3 classes of model.num_classes=10" in told[0]


def test_latents_of_the_recipes_vae_are_taken_by_name_fingerprint_or_copy(
    made: Path, tmp_path: Path
) -> None:
    index = read_index(made / "latents")
    for vae in ("tiny", index.vae.fingerprint, str(save_vae(tmp_path / "copy"))):
        assert len(open_set(made / "latents", vae=vae)) == 15
    with pytest.raises(DataError, match=r"the recipe wants data\.vae="):
        open_set(made / "latents", vae=str(save_vae(tmp_path / "other", seed=1)))


def test_latents_damaged_record_is_named_when_it_is_taken(made: Path, tmp_path: Path) -> None:
    folder = copy_of(made, tmp_path)
    file = folder / "shard-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[data.index(load_file(file)["moments"][2].numpy().tobytes()) + 5] ^= 1
    file.write_bytes(data)
    dataset = open_set(folder, flip=False)
    assert len(dataset.take(np.array([4, 5, 7]))[0]) == 3
    named = r"shard-00001\.safetensors: record 2 \(n02/deep/n02_3\.png\) is damaged"
    with pytest.raises(DataError, match=named):
        dataset.take(np.array([4, 6]))
    with pytest.raises(DataError, match=rf"shard-00001\.safetensors: its checksum .*; .*{named}"):
        verify(folder, single_process())
    assert verify(made / "latents", single_process()).count == 15


def test_latents_missing_or_cut_shard_is_named_at_once(made: Path, tmp_path: Path) -> None:
    folder = copy_of(made, tmp_path)
    file = folder / "shard-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard-00002\.safetensors: \d+ bytes, .* \d+ bytes"):
        open_set(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"shard-00002\.safetensors: missing"):
        open_set(folder)
    with pytest.raises(DataError, match=r"shard-00002\.safetensors: missing"):
        verify(folder, single_process())


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"count": 3},
        {"surplus": 1},
        {"shards": "../shard-00000.safetensors"},
        {"shape": [2]},
        {"vae": {"name": "x", "latent_channels": 1, "scaling_factor": "0.5"}},
        {"vae": 3},
        [],
        None,
        {"count": 15.0},
        {"shape": [8, 4, "4"]},
        {"class_counts": [5, True, 5]},
        {"classes": [1, 2, 3]},
    ],
)
def test_index_that_cannot_be_trusted_is_refused(made: Path, tmp_path: Path, change: Any) -> None:
    folder = copy_of(made, tmp_path)
    values = json.loads((folder / "index.json").read_text())
    if isinstance(change, dict) and "shards" in change:
        values["shards"][0]["file"] = change["shards"]
    else:
        values = {**values, **change} if isinstance(change, dict) else change
    (folder / "index.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"index\.json: not a readable index"):
        open_set(folder)
