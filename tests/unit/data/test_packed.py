"""Packed latents and their index against the recipe, and what is said of damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from promoe_ds.data import build_dataset
from promoe_ds.data.shards import read_index, verify
from promoe_ds.distributed.context import single_process
from promoe_ds.errors import DataError

from ..builders import small_config
from .made import SCALE, copy_of, open_set, save_vae


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
