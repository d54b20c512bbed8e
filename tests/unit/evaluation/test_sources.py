"""Images to evaluate: folders and npz files as people have them."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from promoe_ds.config.model import sides
from promoe_ds.errors import DataError
from promoe_ds.evaluation.images import open_samples
from promoe_ds.evaluation.sources import FolderImages, NpzImages


def test_folder_with_grey_and_coloured_files_gives_the_samples_channels(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 7).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), (7, 7, 9)).save(tmp_path / "b.png")
    assert FolderImages(tmp_path, 8, 3).read(range(2))[:, 0, 0].tolist() == [[7, 7, 7], [7, 7, 9]]
    with pytest.raises(DataError, match=r"b\.png: is in colour"):
        FolderImages(tmp_path).read(range(2))
    assert FolderImages(tmp_path, 4, 1).read(range(1)).shape == (1, 4, 4, 1)


def test_folder_with_an_image_of_another_size_or_a_bomb_names_it(
    tmp_path: Path, monkeypatch
) -> None:
    Image.new("L", (8, 9)).save(tmp_path / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    images = FolderImages(tmp_path)
    assert (images.size, images.read(range(1)).shape) == ((9, 8), (1, 9, 8, 1))
    with pytest.raises(DataError, match=r"b\.png: 8 x 8 pixels, expected 8 x 9"):
        images.read(range(2))
    for size in (8, (4, 6)):
        expected = (2, *sides(size), 1)
        assert FolderImages(tmp_path, size, 1).read(range(2)).shape == expected
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"a\.png: not a readable image"):
        FolderImages(tmp_path, 8, 3)


def test_samples_of_any_size_are_resized_and_the_first_taken(tmp_path: Path) -> None:
    for index, side in enumerate((8, 20, 9)):
        Image.new("RGB", (side, side + index), (index, 0, 0)).save(tmp_path / f"{index}.png")
    images, record = open_samples(tmp_path, size=8, num=2)
    assert len(images) == 2 and record is None
    assert images.read(range(2))[:, 0, 0, 0].tolist() == [0, 1]
    with pytest.raises(DataError, match="3 images, --num 4"):
        open_samples(tmp_path, size=8, num=4)
    np.savez(tmp_path / "whole.npz", arr_0=np.zeros((3, 8, 8, 3), dtype=np.uint8))
    assert len(open_samples(tmp_path / "whole.npz", num=1)[0]) == 1
    with pytest.raises(DataError, match="8x8 pixels, --image-size 8x16"):
        open_samples(tmp_path / "whole.npz", size=(8, 16))


@settings(max_examples=60)
@given(
    st.booleans(),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=5),
    st.one_of(st.just(1.0), st.floats(0.3, 1.0)),
)
def test_any_damage_of_an_npz_gives_its_shape_or_names_it(
    compressed: bool, changes: list, kept: float
) -> None:
    out, save = io.BytesIO(), np.savez_compressed if compressed else np.savez
    save(out, arr_0=np.arange(192, dtype=np.uint8).reshape(4, 4, 4, 3))
    data = bytearray(out.getvalue())
    for place, value in changes:
        data[int(place * len(data))] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npz"
        path.write_bytes(data[: int(len(data) * kept) + 1])
        try:
            images = NpzImages(path)
            shape = (len(images), *sides(images.size), images.channels)
            assert images.read(range(len(images))).shape == shape
        except DataError as error:
            assert "x.npz" in str(error)
