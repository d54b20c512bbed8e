"""Packed latents on disk, synthetic ones, and what is said about files that do not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from promoe_ds.config.data import DataConfig
from promoe_ds.data import LatentDataset, build_dataset
from promoe_ds.data.build import DATASETS
from promoe_ds.errors import DataError

from ..builders import random_tensor, small_config
from .made import labelled

SHAPE = (1, 4, 4)


def write(folder: Path, name: str, latents: Tensor, labels: Tensor) -> Path:
    save_file({"latents": latents, "labels": labels}, folder / name)
    return folder / name


def open_folder(folder: Path, scale: float = 1.0) -> LatentDataset:
    return build_dataset(
        small_config(data={"dataset": "latents", "path": str(folder), "latent_scale": scale})
    )


def raises_saying(message: str) -> Any:
    return pytest.raises(DataError, match=re.escape(message))


def test_latents_of_several_shards_are_one_set_in_order_of_names(tmp_path: Path) -> None:
    latents, labels = random_tensor(6, *SHAPE), torch.tensor([9, 0, 4, 3, 2, 1])
    write(tmp_path, "b.safetensors", latents[2:3], labels[2:3])
    write(tmp_path, "a.safetensors", latents[:2], labels[:2])
    write(tmp_path, "c.safetensors", latents[3:], labels[3:])
    dataset = open_folder(tmp_path)
    order = [5, 0, 2, 1, 3, 4, 2]
    found, found_labels = labelled(dataset.take(np.array(order)))
    assert len(dataset) == 6
    assert torch.equal(found, latents[order])
    assert found_labels.tolist() == labels[order].tolist()


def test_latents_shard_without_rows_between_others_is_passed_over(tmp_path: Path) -> None:
    latents, labels = random_tensor(2, *SHAPE), torch.tensor([1, 2])
    write(tmp_path, "a.safetensors", latents[:1], labels[:1])
    write(tmp_path, "b.safetensors", latents[:0], labels[:0])
    write(tmp_path, "c.safetensors", latents[1:], labels[1:])
    found, found_labels = labelled(open_folder(tmp_path).take(np.array([0, 1])))
    assert torch.equal(found, latents) and found_labels.tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_latents_of_any_float_type_come_as_scaled_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    latents = random_tensor(2, *SHAPE, dtype=dtype)
    write(tmp_path, "a.safetensors", latents, torch.tensor([0, 1]))
    found, _ = open_folder(tmp_path, scale=0.25).take(np.array([1, 0]))
    assert torch.equal(found, latents.flip(0).float() * 0.25)


def test_latents_other_files_of_the_folder_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, "a.safetensors", random_tensor(1, *SHAPE), torch.tensor([0]))
    for name in ("README.txt", "._a.safetensors"):
        (tmp_path / name).write_text("hello")
    assert len(open_folder(tmp_path)) == 1


# What does not fit.


def test_latents_without_path_says_how_to_set_it() -> None:
    with raises_saying(
        "data.path is not set: data.dataset=latents needs the folder of *.safetensors shards (--set"
        " data.path=DIR)"
    ):
        build_dataset(small_config(data={"dataset": "latents"}))


@pytest.mark.parametrize(
    "make",
    [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("file")],
    ids=["missing", "empty", "a file"],
)
def test_latents_no_shard_names_the_folder(tmp_path: Path, make: Any) -> None:
    folder = tmp_path / "latents"
    make(folder)
    with raises_saying(f"data.path={folder}: no *.safetensors shard there"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("latents", "labels"),
    [
        ((2, 1, 4, 5), (2,)),
        ((2, 3, 4, 4), (2,)),
        ((2, 4, 4), (2,)),
        ((2, 1, 4, 4), (3,)),
        ((2, 1, 4, 4), (2, 1)),
        ((4,), (4,)),
    ],
)
def test_latents_wrong_shape_names_the_file_and_both_shapes(
    tmp_path: Path, latents: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    write(tmp_path, "a.safetensors", random_tensor(1, *SHAPE), torch.tensor([0]))
    bad = write(
        tmp_path, "b.safetensors", random_tensor(*latents), torch.zeros(labels, dtype=torch.int64)
    )
    with raises_saying(
        f"{bad}: latents {latents} and labels {labels} do not fit the recipe's (n, 1, 4, 4) and"
        " (n,)"
    ):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("twin", "words"),
    [
        (torch.float16, ("float32", "float16")),
        (torch.int8, ("float32", "int8")),
        ((2, 1, 4, 5), ("(2, 1, 4, 4)", "(2, 1, 4, 5)")),
    ],
)
def test_latents_twins_of_another_shape_or_type_name_both(
    tmp_path: Path, twin: Any, words: tuple[str, ...]
) -> None:
    flipped = torch.zeros(twin) if isinstance(twin, tuple) else torch.zeros(2, *SHAPE, dtype=twin)
    save_file(
        {
            "latents": torch.zeros(2, *SHAPE),
            "latents_flip": flipped,
            "labels": torch.tensor([0, 1]),
        },
        tmp_path / "a.safetensors",
    )
    with pytest.raises(DataError, match=r"a\.safetensors") as refusal:
        open_folder(tmp_path)
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize(
    "latents",
    [
        torch.zeros(2, *SHAPE, dtype=torch.int8),
        torch.zeros(2, *SHAPE, dtype=torch.int64),
        torch.zeros(2, *SHAPE, dtype=torch.bool),
        torch.tensor(1.0),
    ],
)
def test_latents_that_are_no_rows_of_floats_are_refused(tmp_path: Path, latents: Tensor) -> None:
    write(tmp_path, "a.safetensors", latents, torch.tensor([0, 1]))
    with raises_saying("a.safetensors"):
        open_folder(tmp_path)


@pytest.mark.parametrize("key", ["latents", "labels"])
def test_latents_tensor_missing_names_file_and_key(tmp_path: Path, key: str) -> None:
    tensors = {"latents": random_tensor(1, *SHAPE), "labels": torch.tensor([0])}
    del tensors[key]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        DataError, match=rf"{re.escape(str(tmp_path / 'a.safetensors'))}: not a readable .*{key}"
    ):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: b"garbage" * 100, lambda data: data[:-8]],
    ids=["empty", "garbage", "cut off"],
)
def test_latents_damaged_file_is_named(tmp_path: Path, damage: Any) -> None:
    write(tmp_path, "a.safetensors", random_tensor(1, *SHAPE), torch.tensor([0]))
    bad = write(tmp_path, "b.safetensors", random_tensor(1, *SHAPE), torch.tensor([0]))
    bad.write_bytes(damage(bad.read_bytes()))
    with raises_saying(f"{bad}: not a readable latent shard"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 10], "labels reach from 0 to 10, but model.num_classes=10"),
        ([-1, 3], "labels reach from -1 to 3"),
    ],
)
def test_latents_label_out_of_range_names_folder_and_range(
    tmp_path: Path, labels: list[int], message: str
) -> None:
    write(tmp_path, "a.safetensors", random_tensor(2, *SHAPE), torch.tensor(labels))
    with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path))}.*{re.escape(message)}"):
        open_folder(tmp_path)


def test_latents_label_out_of_range_names_the_file(tmp_path: Path) -> None:
    # One of thousands of shards: the folder alone does not help.
    write(tmp_path, "a.safetensors", random_tensor(2, *SHAPE), torch.tensor([0, 1]))
    write(tmp_path, "b.safetensors", random_tensor(2, *SHAPE), torch.tensor([0, 10]))
    with raises_saying("b.safetensors"):
        open_folder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_latents_labels_that_are_no_integers_are_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    write(tmp_path, "a.safetensors", random_tensor(2, *SHAPE), torch.tensor([0, 1]).to(dtype))
    with raises_saying("a.safetensors"):
        open_folder(tmp_path)


def test_latents_labels_of_another_integer_type_come_as_int64(tmp_path: Path) -> None:
    write(
        tmp_path, "a.safetensors", random_tensor(2, *SHAPE), torch.tensor([3, 1], dtype=torch.int32)
    )
    try:
        _, labels = labelled(open_folder(tmp_path).take(np.array([0, 1])))
    except DataError:
        return
    assert labels.dtype == torch.int64


def test_latents_only_empty_shards_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.safetensors", random_tensor(0, *SHAPE), torch.zeros(0, dtype=torch.int64))
    with raises_saying(str(tmp_path)):
        open_folder(tmp_path)


def test_fast_dit_features_are_refused_and_train_once_converted_as_documented(
    tmp_path: Path, monkeypatch
) -> None:
    latents, labels = random_tensor(12, *SHAPE).numpy(), np.arange(12) % 10
    for folder, values in (
        ("imagenet256_features", latents * np.float32(0.18215)),
        ("imagenet256_labels", labels),
    ):
        (tmp_path / "features" / folder).mkdir(parents=True)
        for number in range(12):
            np.save(tmp_path / "features" / folder / f"{number}.npy", values[number : number + 1])
    with raises_saying("found 24 .npy. docs/inputs.md"):
        open_folder(tmp_path / "features")
    monkeypatch.chdir(tmp_path)
    documented = (Path(__file__).parents[3] / "docs" / "inputs.md").read_text(encoding="utf-8")
    exec(documented.split("```python")[1].split("```")[0].replace("50_000", "5"), {})
    found, found_labels = labelled(open_folder(tmp_path / "latents").take(np.arange(12)))
    torch.testing.assert_close(found, torch.from_numpy(latents))
    assert found_labels.tolist() == labels.tolist()


# Synthetic.


def test_every_data_set_of_a_recipe_can_be_opened() -> None:
    assert get_args(DataConfig.model_fields["dataset"].annotation) == tuple(DATASETS)


def test_synthetic_sample_depends_on_seed_and_index_only() -> None:
    dataset = build_dataset(small_config(data={"synthetic_samples": 30}))
    whole, labels = labelled(dataset.take(np.arange(30)))
    part, part_labels = labelled(
        build_dataset(small_config(data={"synthetic_samples": 30})).take(np.array([7, 2]))
    )
    assert len(dataset) == 30
    assert torch.equal(part, whole[[7, 2]]) and part_labels.tolist() == labels[[7, 2]].tolist()
    other, _ = build_dataset(small_config(data={"synthetic_samples": 30}, train={"seed": 1})).take(
        np.arange(30)
    )
    assert not (other == whole).flatten(1).all(dim=1).any()


def test_synthetic_samples_have_the_recipes_shape_and_labels() -> None:
    latents, labels = labelled(
        build_dataset(small_config(model={"in_channels": 3})).take(np.arange(200))
    )
    assert latents.shape == (200, 3, 4, 4) and latents.dtype == torch.float32
    assert set(labels.tolist()) == set(range(10)) and labels.dtype == torch.int64
