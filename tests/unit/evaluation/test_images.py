"""The uint8 rule, file names, grids, and reading samples back."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from promoe_ds.data.vae import VaeIdentity
from promoe_ds.errors import DataError
from promoe_ds.evaluation.grids import make_grid
from promoe_ds.evaluation.images import image_shape, read_samples, to_uint8

from ..builders import small_config


def test_uint8_truncates_as_published_and_moves_channels_last() -> None:
    values = np.array([-2.0, -1.0, -0.999, 0.0, 0.0039, 0.5, 0.996, 1.0, 2.0], dtype=np.float64)
    expected = [0, 0, 0, 128, 128, 191, 254, 255, 255]
    assert to_uint8(values.reshape(-1, 1, 1, 1)).flatten().tolist() == expected
    assert to_uint8(np.zeros((2, 3, 4, 5))).shape == (2, 4, 5, 3)


@pytest.mark.parametrize(
    ("vae", "size", "expected"),
    [
        (None, None, (4, 6, 1)),
        (None, (6, 4), (6, 4, 1)),
        (2, None, (8, 12, 3)),
        (2, (2, 4), (4, 8, 3)),
    ],
)
def test_image_shape_is_that_of_the_latents_decoded(vae, size, expected) -> None:
    if vae is not None:
        identity = VaeIdentity(name="x", latent_channels=1, downsampling=vae)
        vae = SimpleNamespace(identity=identity)
    assert image_shape(small_config(model={"input_size": [4, 6]}), vae, size) == expected


def test_grid_has_one_row_a_class_in_order() -> None:
    images = np.stack([np.full((2, 2, 1), value, dtype=np.uint8) for value in (10, 20, 30)])
    grid = make_grid(images, np.array([7, 3, 7]), columns=2, zoom=1, gap=1)
    assert grid.shape == (2 * 3 + 1, 2 * 3 + 1, 1)
    assert grid[1, 1, 0] == 20  # class 3 first
    assert (grid[4, 1, 0], grid[4, 4, 0]) == (10, 30)
    assert grid[1, 4, 0] == 255  # class 3 has one image only


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"garbage",
        {"labels": np.zeros(3, int)},
        {"labels": np.zeros((2, 1), int)},
        {"labels": np.zeros(2)},
        {"arr_0": np.zeros((2, 8, 8, 1)), "labels": np.zeros(2, int)},
    ],
)
def test_read_samples_missing_or_broken_names_the_file(tmp_path, content) -> None:
    if isinstance(content, bytes):
        (tmp_path / "samples.npz").write_bytes(content)
    elif content is not None:
        np.savez(tmp_path / "samples.npz", **{"arr_0": np.zeros((2, 8, 8, 1), np.uint8), **content})
    with pytest.raises(DataError, match=r"samples\.npz: "):
        read_samples(tmp_path)
