"""Plain shards as others write them, synthetic latents, and what is said about files that do not
fit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from promoe_ds.config.data import DATASETS as TRAITS
from promoe_ds.data import LatentDataset, build_dataset
from promoe_ds.data.build import DATASETS
from promoe_ds.errors import DataError

from ..builders import random_tensor, small_config
from .made import labelled

SHAPE = (1, 4, 4)


def write(folder: Path, name: str, latents: Tensor, labels: Tensor) -> None:
    save_file({"latents": latents, "labels": labels}, folder / name)


def open_folder(folder: Path, scale: float = 1.0) -> LatentDataset:
    return build_dataset(
        small_config(data={"dataset": "latents", "path": str(folder), "latent_scale": scale})
    )


def test_latents_of_several_shards_are_one_set_in_order_of_names(tmp_path: Path) -> None:
    latents, labels = random_tensor(6, *SHAPE), torch.tensor([9, 0, 4, 3, 2, 1])
    for name, rows in {"b": slice(2, 3), "a": slice(2), "bb": slice(0), "c": slice(3, 6)}.items():
        write(tmp_path, f"{name}.safetensors", latents[rows], labels[rows])
    for name in ("README.txt", "._a.safetensors"):
        (tmp_path / name).write_text("ignored")
    dataset, order = open_folder(tmp_path), [5, 0, 2, 1, 3, 4, 2]
    found, found_labels = labelled(dataset.take(np.array(order)))
    assert len(dataset) == 6 and torch.equal(found, latents[order])
    assert found_labels.tolist() == labels[order].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_latents_of_any_float_type_come_as_scaled_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    latents = random_tensor(2, *SHAPE, dtype=dtype)
    write(tmp_path, "a.safetensors", latents, torch.tensor([3, 1], dtype=torch.int32))
    found, labels = labelled(open_folder(tmp_path, scale=0.25).take(np.array([1, 0])))
    assert torch.equal(found, latents.flip(0).float() * 0.25)
    assert labels.tolist() == [1, 3] and labels.dtype == torch.int64


# What does not fit.


def test_latents_without_path_says_how_to_set_it() -> None:
    with pytest.raises(DataError, match=r"data\.path is not set: .*data\.path=DIR"):
        build_dataset(small_config(data={"dataset": "latents"}))


@pytest.mark.parametrize(
    "make",
    [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("file")],
    ids=["missing", "empty", "a file"],
)
def test_latents_no_shard_names_the_folder(tmp_path: Path, make: Any) -> None:
    folder = tmp_path / "latents"
    make(folder)
    with pytest.raises(DataError, match=re.escape(f"data.path={folder}: no *.safetensors shard")):
        open_folder(folder)


GOOD, LABELS = torch.zeros(2, *SHAPE), torch.tensor([0, 1])
WHOLE = save({"latents": GOOD, "labels": LABELS})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *(
            ({"latents": torch.zeros(latents), "labels": torch.zeros(labels).long()}, words)
            for latents, labels, words in (
                ((2, 1, 4, 5), (2,), ("(2, 1, 4, 5)", "(n, 1, 4, 4)")),
                ((2, 3, 4, 4), (2,), ("(2, 3, 4, 4)",)),
                ((2, 4, 4), (2,), ("(2, 4, 4)",)),
                ((2, 1, 4, 4), (3,), ("(3,)",)),
                ((2, 1, 4, 4), (2, 1), ("(2, 1)",)),
                ((4,), (4,), ("(4,)",)),
            )
        ),
        *(
            ({"latents": GOOD, "latents_flip": twin, "labels": LABELS}, words)
            for twin, words in (
                (GOOD.half(), ("float32", "float16")),
                (GOOD.to(torch.int8), ("float32", "int8")),
                (torch.zeros(2, 1, 4, 5), ("(2, 1, 4, 4)", "(2, 1, 4, 5)")),
            )
        ),
        ({"latents": GOOD.to(torch.int8), "labels": LABELS}, ("int8", "floats")),
        ({"latents": GOOD.bool(), "labels": LABELS}, ("bool", "floats")),
        ({"latents": torch.tensor(1.0), "labels": LABELS}, ()),
        ({"latents": GOOD}, ("not a readable", "labels")),
        ({"labels": LABELS}, ("holds labels, expected latents or moments",)),
        ({"latents": GOOD, "labels": LABELS + 9}, ("9 to 10", "model.num_classes=10")),
        ({"latents": GOOD, "labels": LABELS - 1}, ("-1 to 0",)),
        ({"latents": GOOD, "labels": LABELS.float()}, ("float32", "integers")),
        ({"latents": GOOD, "labels": LABELS.bool()}, ("bool", "integers")),
        (b"", ("not a readable", "empty file")),
        (b"garbage" * 100, ("not a readable",)),
        (WHOLE[:-8], ("not a readable",)),
    ],
)
def test_latents_that_do_not_fit_name_the_shard(
    tmp_path: Path, content: dict | bytes, words: tuple[str, ...]
) -> None:
    # One of thousands of shards: the folder alone does not help.
    (tmp_path / "a.safetensors").write_bytes(WHOLE)
    data = content if isinstance(content, bytes) else save(content)
    (tmp_path / "b.safetensors").write_bytes(data)
    with pytest.raises(DataError) as refusal:
        open_folder(tmp_path)
    assert all(word in str(refusal.value) for word in (str(tmp_path / "b.safetensors"), *words))


def test_latents_of_another_layout_than_the_first_shards_name_both(tmp_path: Path) -> None:
    write(tmp_path, "a.safetensors", GOOD, LABELS)
    write(tmp_path, "b.safetensors", GOOD.half(), LABELS)
    with pytest.raises(DataError, match=r"b\.safetensors: .*float16.*a\.safetensors .*float32"):
        open_folder(tmp_path)


def test_latents_only_empty_shards_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.safetensors", GOOD[:0], LABELS[:0])
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        open_folder(tmp_path)


def test_latents_not_finite_without_checksums_names_the_record(tmp_path: Path) -> None:
    latents = torch.zeros(3, *SHAPE)
    latents[1, 0, 2, 2] = torch.nan
    write(tmp_path, "a.safetensors", latents, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DataError, match=r"a\.safetensors: record 1 \(of unknown source\)"):
        open_folder(tmp_path).take(np.array([0, 1]))


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
    with pytest.raises(DataError, match=r"found 24 \.npy\. docs/reference/inputs\.md"):
        open_folder(tmp_path / "features")
    monkeypatch.chdir(tmp_path)
    documented = (Path(__file__).parents[3] / "docs/reference/inputs.md").read_text("utf-8")
    exec(documented.split("```python")[1].split("```")[0].replace("50_000", "5"), {})
    found, found_labels = labelled(open_folder(tmp_path / "latents").take(np.arange(12)))
    torch.testing.assert_close(found, torch.from_numpy(latents))
    assert found_labels.tolist() == labels.tolist()


# Synthetic.


def test_every_data_set_of_a_recipe_can_be_opened() -> None:
    assert tuple(TRAITS) == tuple(DATASETS)


def test_synthetic_sample_depends_on_seed_and_index_only() -> None:
    def opened(seed: int = 0) -> LatentDataset:
        sections = {"data": {"synthetic_samples": 200}, "train": {"seed": seed}}
        return build_dataset(small_config(model={"in_channels": 3}, **sections))

    whole, labels = labelled(opened().take(np.arange(200)))
    part, part_labels = labelled(opened().take(np.array([7, 2])))
    assert torch.equal(part, whole[[7, 2]]) and part_labels.tolist() == labels[[7, 2]].tolist()
    other, _ = labelled(opened(seed=1).take(np.arange(200)))
    assert len(opened()) == 200 and not (other == whole).flatten(1).all(dim=1).any()
    assert whole.shape == (200, 3, 4, 4) and set(labels.tolist()) == set(range(10))
    assert (whole.dtype, labels.dtype) == (torch.float32, torch.int64)
