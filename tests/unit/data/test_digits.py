"""The embedded digits: range, split, and the data set that is built of them."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from promoe_ds.config import load_config
from promoe_ds.data import build_dataset
from promoe_ds.data.digits import load_digits_split

from .made import labelled


def rows(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    return [image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True)]


def test_digits_sides_share_nothing_and_are_all_1797_together() -> None:
    sides = [load_digits_split(0.2, heldout=heldout) for heldout in (False, True)]
    for images, labels in sides:
        assert images.min() == -1 and images.max() == 1 and images.shape[1:] == (1, 8, 8)
        assert (images.dtype, labels.dtype) == (np.float32, np.int64)
    bundle = load_digits()
    everything = rows((bundle.images / 8 - 1).astype(np.float32)[:, None], bundle.target)
    train, heldout = (rows(*side) for side in sides)
    assert len(everything) == 1797 and sorted(train + heldout) == sorted(everything)
    assert not set(train) & set(heldout)
    counts = [np.bincount(labels, minlength=10) for _, labels in sides]
    assert counts[1].tolist() == [round(0.2 * count) for count in counts[0] + counts[1]]


def test_digits_split_is_fixed_and_a_larger_share_contains_the_smaller() -> None:
    heldout = rows(*load_digits_split(0.2, heldout=True))
    assert heldout == rows(*load_digits_split(0.2, heldout=True))
    assert set(heldout) < set(rows(*load_digits_split(0.5, heldout=True)))


def test_digits_data_set_holds_copies_of_the_training_side_scaled() -> None:
    dataset = build_dataset(
        load_config("digits_promoe", ["data.latent_scale=0.5", "data.heldout_fraction=0.2"])
    )
    expected_images, expected_labels = load_digits_split(0.2, heldout=False)
    assert len(dataset) == len(expected_labels)
    for _ in range(2):
        images, labels = labelled(dataset.take(np.array([3, 0, 3])))
        expected = torch.from_numpy(expected_images[[3, 0, 3]] * np.float32(0.5))
        assert torch.equal(images, expected) and images.dtype == torch.float32
        assert labels.tolist() == expected_labels[[3, 0, 3]].tolist()
        images.zero_()
        labels.fill_(99)
