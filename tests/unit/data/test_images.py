"""Trees of images, ADM's crop, files that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from promoe_ds.data.images import CorruptFiles, center_crop, check_classes, read_image, scan_tree
from promoe_ds.errors import DataError

from .made import save_images


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's description, step by step, on a list of sizes."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    factor = size / min(image.size)
    pixels = np.array(image.resize(tuple(round(side * factor) for side in image.size), resample=Image.BICUBIC))
    y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[y:y + size, x:x + size]


@pytest.mark.parametrize("size", [(64, 48), (17, 33), (8, 8), (5, 9), (200, 16)])
def test_center_crop_equals_adms(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    cropped = center_crop(image, 8)
    assert cropped.shape == (8, 8, 3)
    assert np.array_equal(cropped, adm_center_crop(image, 8))


def test_center_crop_grey_and_transparent_images_come_as_three_channels() -> None:
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert center_crop(Image.new(mode, (16, 20)), 8).shape == (8, 8, 3)


def test_tree_of_any_depth_is_sorted_and_labelled_by_first_folder(tmp_path: Path) -> None:
    tree = scan_tree(save_images(tmp_path / "images", per_class=2))
    assert tree.names == ["n01/deep/n01_1.png", "n01/n01_0.png", "n02/deep/n02_1.png", "n02/n02_0.png", "n03/deep/n03_1.png",
                          "n03/n03_0.png"]
    assert tree.labels.tolist() == [0, 0, 1, 1, 2, 2] and tree.classes == ("n01", "n02", "n03")


def test_tree_above_train_and_val_gives_the_split(tmp_path: Path) -> None:
    save_images(tmp_path / "train", per_class=3)
    save_images(tmp_path / "val", per_class=1)
    assert len(scan_tree(tmp_path)) == 9 and len(scan_tree(tmp_path, split="val")) == 3
    with pytest.raises(DataError, match="holds train, val but no test"):
        scan_tree(tmp_path, split="test")


def test_tree_of_a_split_beside_other_folders_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val", "devkit"):
        save_images(tmp_path / split, per_class=1)
    with pytest.raises(DataError, match=r"holds train beside devkit: splits or classes\? Name .*/train itself"):
        scan_tree(tmp_path)
    assert scan_tree(tmp_path / "train").classes == ("n01", "n02", "n03")
    (tmp_path / "devkit").rename(tmp_path / ".devkit")
    assert scan_tree(tmp_path).classes == ("n01", "n02", "n03")


def test_tree_with_a_class_without_images_is_refused(tmp_path: Path) -> None:
    images = save_images(tmp_path / "images", per_class=1)
    (images / "n02" / "n02_0.png").rename(images / "n02" / "n02_0.txt")
    with pytest.raises(DataError, match=r"1 of 3 class folders hold no \.jpeg, .* file, n02 is the first"):
        scan_tree(images)
    (images / "n02").rename(images / ".n02")
    assert scan_tree(images).classes == ("n01", "n03")


def test_classes_fewer_than_the_recipes_are_told_by_rank_0_and_more_refused(monkeypatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("promoe_ds.data.images._LOG.warning", lambda message, *values: told.append(message % values))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        check_classes(Path("tree"), 3, 10)
    assert told == ["tree: 3 classes of model.num_classes=10: the labels from 3 on never occur"]
    with pytest.raises(DataError, match=r"tree: 11 classes, but model\.num_classes=10"):
        check_classes(Path("tree"), 11, 10)


def test_tree_without_images_or_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        scan_tree(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no \.jpeg, .* file below it"):
        scan_tree(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png lies beside the class folders"):
        scan_tree(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"no image", lambda data: data[:len(data) // 2]],
                         ids=["empty", "garbage", "cut off"])
def test_image_damaged_is_named(tmp_path: Path, damage) -> None:
    path = save_images(tmp_path, per_class=1, size=(64, 64), suffix="jpg") / "n01" / "n01_0.jpg"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"n01_0\.jpg: not a readable image"):
        read_image(path, 8)


def test_corrupt_files_are_counted_once_up_to_the_limit() -> None:
    corrupt = CorruptFiles(2, "data.max_corrupt")
    for name in ("a", "b", "a"):
        corrupt.add(name, f"{name}: broken")
    with pytest.raises(DataError, match=r"c: broken; that makes 3 unreadable files, data\.max_corrupt=2 are allowed"):
        corrupt.add("c", "c: broken")
