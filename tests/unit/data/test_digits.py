"""The embedded digits: range, split, and the data set that is built of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from promoe_ds.config import load_config
from promoe_ds.data import build_dataset
from promoe_ds.data.digits import Digits, load_digits_split
from tests.unit.data.made import labelled


def rows(digits: Digits) -> list[bytes]:
    return [
        image.tobytes() + bytes([label])
        for image, label in zip(digits.images, digits.labels, strict=True)
    ]


@pytest.fixture(scope="module")
def split() -> tuple[Digits, Digits]:
    return load_digits_split(0.2, heldout=False), load_digits_split(0.2, heldout=True)


def test_digits_lie_between_minus_one_and_one(split: tuple[Digits, Digits]) -> None:
    for digits in split:
        assert digits.images.min() == -1 and digits.images.max() == 1
        assert digits.images.dtype == np.float32 and digits.labels.dtype == np.int64
        assert digits.images.shape[1:] == (1, 8, 8)
        assert set(digits.labels.tolist()) == set(range(10))


def test_digits_both_sides_together_are_all_1797_once(split: tuple[Digits, Digits]) -> None:
    bundle = load_digits()
    images = (bundle.images / 8 - 1).astype(np.float32)[:, None]
    everything = rows(Digits(images, bundle.target.astype(np.int64)))
    assert len(everything) == 1797
    assert sorted(rows(split[0]) + rows(split[1])) == sorted(everything)


def test_digits_sides_share_no_image(split: tuple[Digits, Digits]) -> None:
    assert not set(rows(split[0])) & set(rows(split[1]))


def test_digits_heldout_is_a_fifth_of_each_class(split: tuple[Digits, Digits]) -> None:
    train, heldout = (np.bincount(digits.labels, minlength=10) for digits in split)
    assert heldout.tolist() == [round(0.2 * n) for n in train + heldout]


def test_digits_split_is_fixed(split: tuple[Digits, Digits]) -> None:
    again = load_digits_split(0.2, heldout=True)
    assert np.array_equal(again.images, split[1].images) and np.array_equal(
        again.labels, split[1].labels
    )


def test_digits_larger_heldout_share_contains_the_smaller(split: tuple[Digits, Digits]) -> None:
    assert set(rows(split[1])) < set(rows(load_digits_split(0.5, heldout=True)))


def test_digits_data_set_holds_the_training_side_scaled(split: tuple[Digits, Digits]) -> None:
    dataset = build_dataset(
        load_config("digits_promoe", ["data.latent_scale=0.5", "data.heldout_fraction=0.2"])
    )
    images, labels = labelled(dataset.take(np.array([3, 0, 3])))
    assert len(dataset) == len(split[0].labels)
    assert torch.equal(images, torch.from_numpy(split[0].images[[3, 0, 3]] * np.float32(0.5)))
    assert labels.tolist() == split[0].labels[[3, 0, 3]].tolist()
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_digits_taken_are_copies() -> None:
    dataset = build_dataset(load_config("digits_promoe"))
    images, labels = labelled(dataset.take(np.array([0])))
    images.zero_()
    labels.fill_(99)
    again, labels_again = labelled(dataset.take(np.array([0])))
    assert again.abs().sum() > 0 and labels_again[0] != 99
